"""tools/bench: list, run, chart and figures."""

import argparse
import subprocess
import sys
from pathlib import Path

from benchkit import chart, figures, stamp, suites
from benchkit.report import BenchError, say

PROJECT = Path(__file__).resolve().parents[2]

EPILOG = """examples
  tools/bench list                               the benchmark programs
  tools/bench run engine_bench                   one of them, recorded in build/bench-results/engine_bench.json
  tools/bench run --out docs/benchmarks          all of them, recorded for the documents
  tools/bench chart docs/benchmarks/engine_bench.json --filter 'EngineBatch/' --out batch.svg
  tools/bench figures                            the pictures of the documents, from docs/benchmarks

Every result carries processor, kernel, compiler, flags and commit. Times of two runs do not compare on a machine that
others share: compare within one file. exit status: 0 done, 1 something failed, 2 wrong usage
"""


def _positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError("expected a number of at least 1")
    return number


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="tools/bench", description="Records benchmarks with what they ran on, and draws them.", epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--build", type=Path, default=PROJECT / "build/release", help="build tree (default: release)")
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("list", help="name the benchmark programs")
    run = commands.add_parser("run", help="run them and write their JSON")
    run.add_argument("names", nargs="*", metavar="NAME", help="programs (default: all)")
    run.add_argument("--out", type=Path, default=PROJECT / "build/bench-results", help="folder of the results")
    run.add_argument("--repetitions", type=_positive, default=3, help="runs of each, of which medians are kept (default 3)")
    run.add_argument("--min-time", type=float, metavar="SECONDS", help="least time per row and repetition (default: the program's)")
    run.add_argument("--filter", default="", help="regular expression of benchmark names")
    run.add_argument("--as-built", dest="build_first", action="store_false", help="take the programs as they are")
    draw = commands.add_parser("chart", help="draw a result as SVG")
    draw.add_argument("result", type=Path, help="a JSON file of run")
    draw.add_argument("--out", type=Path, help="the SVG (default: beside the result)")
    draw.add_argument("--filter", default="", help="regular expression of benchmark names")
    draw.add_argument("--metric", default="real_time", help="real_time, cpu_time, items_per_second or a counter's name")
    draw.add_argument("--ours", default="^(?!.*(Baseline|Floor|Peer))", help="regular expression of the bars to colour")
    draw.add_argument("--title", default="", help="above the chart")
    pictures = commands.add_parser("figures", help="draw the comparisons that the documents show")
    pictures.add_argument("folder", nargs="?", type=Path, default=PROJECT / "docs/benchmarks",
                          help="recorded runs (default: docs/benchmarks)")
    return parser


def _run(options: argparse.Namespace) -> None:
    known = suites.programs(options.build)
    unknown = [name for name in options.names if name not in known]
    if unknown:
        raise BenchError(f"no benchmark program {', '.join(unknown)}; there are: {', '.join(known)}")
    if options.build_first:
        subprocess.run(["ninja", "-C", str(options.build), *(options.names or known)], check=True, stdout=sys.stderr)
    options.out.mkdir(parents=True, exist_ok=True)
    facts = stamp.stamp(PROJECT, options.build)
    if facts["build_type"] != "Release":
        say(f"warning: a {facts['build_type']} build; recorded as such")
    wanted = options.names or list(known)
    for number, name in enumerate(wanted, start=1):
        out = options.out / f"{name}.json"
        say(f"{number} of {len(wanted)}: {name}")
        suites.run(known[name], out, facts, options.repetitions, options.filter, options.min_time)
        say(f"wrote {out}")


def main(arguments: list[str]) -> int:
    options = _parser().parse_args(arguments)
    try:
        if options.command == "list":
            print("\n".join(suites.programs(options.build)))
        elif options.command == "run":
            _run(options)
        elif options.command == "figures":
            figures.draw_all(options.folder)
        else:
            chart.draw(options.result, options.out or options.result.with_suffix(".svg"), options.filter, options.metric,
                       options.title, options.ours)
    except (BenchError, OSError, ValueError, subprocess.CalledProcessError) as error:
        say(str(error))
        return 1
    except KeyboardInterrupt:
        say("interrupted; results that were written are whole")
        return 1
    return 0
