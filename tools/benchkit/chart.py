"""Bars of a result file, one per benchmark, as SVG: the reader compares within one run at a glance."""

import json
import re
from pathlib import Path

from benchkit.report import BenchError

BARS_MAX = 60
OURS, PEER = "#1f6f8b", "#b8b8b8"
UNITS = {"ns": 1.0, "us": 1e3, "ms": 1e6, "s": 1e9}


def _place(entry: dict) -> tuple[int, int]:
    """Where the program defines it: runs are interleaved at random."""
    return entry.get("family_index", 0), entry.get("per_family_instance_index", 0)


def median_entries(result: dict) -> list[tuple[str, dict]]:
    """One entry per benchmark that ran, by its full name, in the order of the program."""
    entries = sorted(result["benchmarks"], key=_place)
    return [(entry["name"].removesuffix("_median"), entry) for entry in entries
            if not entry.get("error_occurred") and entry.get("aggregate_name", "median") == "median"]


def _rows(result: dict, pattern: str, metric: str) -> list[tuple[str, float]]:
    rows = []
    for full_name, entry in median_entries(result):
        name = re.sub(r"^BM_|/real_time|/process_time|/iterations:\d+|/min_time:[\d.]+", "", full_name)
        if metric not in entry or not re.search(pattern, name):
            continue
        value = entry[metric] * (UNITS[entry["time_unit"]] if metric.endswith("_time") else 1.0)
        rows.append((name, value))
    return rows


def caption(context: dict) -> str:
    facts = [context.get("cpu", ""), f"{context.get('num_cpus', '?')} CPUs", re.sub(r" \(.*?\)", "", context.get("compiler", "")),
             context.get("build_type", ""), f"commit {context.get('commit', '?')}", context.get("date", "")[:10]]
    return ", ".join(fact for fact in facts if fact)


def pyplot():
    """matplotlib, set up so that the same result makes the same file."""
    try:
        import matplotlib
    except ImportError as missing:
        raise BenchError(f"charts need Debian's python3-matplotlib ({missing}): tools/setup bench") from missing
    matplotlib.use("svg")
    matplotlib.rcParams.update({"svg.hashsalt": "iovane", "svg.fonttype": "none", "font.size": 9})
    from matplotlib import pyplot as plot
    return plot


def draw(source: Path, out: Path, pattern: str, metric: str, title: str, ours: str) -> None:
    plot = pyplot()
    result = json.loads(source.read_text())
    rows = _rows(result, pattern, metric)
    if not rows:
        raise BenchError(f"{source}: nothing matches {pattern!r} and has {metric!r}")
    if len(rows) > BARS_MAX:
        raise BenchError(f"{source}: {len(rows)} bars are too many to read, at most {BARS_MAX}: narrow --filter")
    figure, axes = plot.subplots(figsize=(8, 0.9 + 0.22 * len(rows)), layout="constrained")
    names, values = [name for name, _ in rows], [value for _, value in rows]
    colours = [OURS if re.search(ours, name) else PEER for name in names]
    bars = axes.barh(names, values, color=colours)
    axes.bar_label(bars, labels=[f"{value:,.3g}" if value < 1000 else f"{value:,.0f}" for value in values], padding=3)
    if max(values) > 30 * max(min(values), 1e-9):
        axes.set_xscale("log")
    axes.invert_yaxis()
    axes.margins(x=0.15)
    axes.spines[["top", "right"]].set_visible(False)
    axes.set_title(title or source.stem, loc="left", fontweight="bold")
    axes.set_xlabel(f"{'ns per iteration' if metric.endswith('_time') else metric}\n{caption(result['context'])}")
    figure.savefig(out, metadata={"Date": None})
    plot.close(figure)
