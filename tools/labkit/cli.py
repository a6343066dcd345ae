"""The command: tools/lab run | kernel | doctor | deps."""

import argparse
import os
import re
import shutil
import signal
import sys
from pathlib import Path

from . import cache, emulator, guest, host, kernel, machine
from .report import LabError, say

PROJECT = Path(__file__).resolve().parents[2]

EPILOG = """\
exit status of `run`
  the program's own, or 128 + N when signal N ended it, and
   70   the kernel printed a splat (WARNING, BUG, Oops, stall, ...), whatever the program said
   71   the lab itself failed: a missing tool, a guest that did not come up, a wrong argument
  124   the time was up

examples
  tools/lab kernel                                   build the kernel once (about 6 minutes)
  tools/lab run -- iovane probe                      the release build's command, inside
  tools/lab run --out results -- build/dev/tests/lab_test --gtest_output=xml:/out/report.xml
  tools/lab run --cpus 4 --numa 2 --memory 4G --hugepages 64 -- build/dev/bench/map_bench
  tools/lab run --device nvme,serial=a,drive=d --qemu=-drive --qemu=if=none,id=d,file=null-co://,format=raw \\
                --bind 1b36:0010 -- ./my_nvme_test
"""


def main(arguments: list[str]) -> int:
    options = _parser().parse_args(arguments)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # so that clean-up runs
    try:
        return options.action(options)
    except LabError as error:
        say(str(error))
        return guest.EXIT_LAB
    except KeyboardInterrupt:
        say("interrupted")
        return 128 + signal.SIGINT
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # nobody reads our output any more; do not fail again at exit
        return 128 + signal.SIGPIPE


class _Parser(argparse.ArgumentParser):
    """argparse's own exit status for a wrong argument, 2, would look like the program's."""

    def error(self, message: str):
        self.print_usage(sys.stderr)
        self.exit(guest.EXIT_LAB, f"lab: {message}\n")


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="tools/lab",
        description="Runs a program on a real Linux kernel with an emulated IOMMU and devices: iommufd, VFIO and page tables that a device's\n"
        "DMA really walks, on any Linux host, without root and without hardware.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")

    def command(name: str, action, text: str) -> argparse.ArgumentParser:
        made = commands.add_parser(name, help=text, description=text, formatter_class=argparse.RawDescriptionHelpFormatter)
        made.set_defaults(action=action)
        group = made.add_argument_group("machine")
        group.add_argument("--arch", default="x86_64", choices=sorted({m.architecture for m in machine.MACHINES}), help="the guest's architecture (%(default)s)")
        group.add_argument("--machine", metavar="NAME", help="one of its machines: " + ", ".join(f"{m.name} ({m.architecture})" for m in machine.MACHINES))
        if name in ("run", "kernel"):
            group.add_argument("--kernel-config", type=Path, metavar="FILE", help="more CONFIG_X=y lines; makes a kernel of its own in the cache")
        return made

    run = command("run", _run, "boot, run one program, bring back what it said and left")
    run.usage = "tools/lab run [options] -- PROGRAM [ARGUMENT ...]"
    run.epilog = EPILOG
    _run_options(run)
    build = command("kernel", _kernel, "make the kernel ready, and print where it is")
    build.add_argument("--refresh", action="store_true", help="ask Debian for a newer source first")
    doctor = command("doctor", _doctor, "say what is missing on this host and how to install it")
    doctor.add_argument("--install", action="store_true", help="install it (needs root)")
    command("deps", _deps, "print the Debian packages that the lab needs")
    return parser


# Without "sleep=off" a guest that waits would wait as long as the host's clock says.
COUNTED = ["-icount", "shift=1,sleep=off"]


def _run_options(run: argparse.ArgumentParser) -> None:
    size = run.add_argument_group("size")
    size.add_argument("--cpus", type=int, metavar="N", help="(2; with --counted 1)")
    size.add_argument("--counted", action="store_true", help="a clock that counts instructions, two nanoseconds each: waiting takes no time, ratios are exact whatever the host does, and one CPU runs at a time")
    size.add_argument("--numa", type=int, default=1, metavar="N", help="NUMA nodes; CPUs and memory are dealt out evenly (%(default)s)")
    size.add_argument("--memory", type=_size_mib, default=2048, metavar="SIZE", help="like 512M or 4G (2G)")
    size.add_argument("--hugepages", type=int, default=0, metavar="N", help="huge pages of the default size, reserved at boot")

    devices = run.add_argument_group("devices")
    devices.add_argument("--edu", type=int, default=2, metavar="N", help="devices that do DMA on command (%(default)s)")
    devices.add_argument("--iommu", metavar="MODE", help="; ".join(f"{m.name}: {', '.join(m.iommus)}" for m in machine.MACHINES if len(m.iommus) > 1) + "; the first unless said")
    devices.add_argument("--device", action="append", default=[], metavar="SPEC", help="one more device, in QEMU's words; may repeat")
    devices.add_argument("--bind", action="append", default=[], metavar="ID", help="bind these to vfio-pci too: vendor:device or a PCI address; may repeat")
    devices.add_argument("--dma-entry-limit", type=int, metavar="N", help="type1's limit on mappings (the kernel's own is 65535)")
    devices.add_argument("--qemu", action="append", default=[], metavar="WORD", help="one more word for QEMU's command line, as --qemu=-WORD; may repeat")
    devices.add_argument("--append", action="append", default=[], metavar="TEXT", help="more of the kernel's command line; may repeat")

    files = run.add_argument_group("files and environment")
    files.add_argument("--file", action="append", default=[], metavar="PATH[:GUEST]", help="put a file or directory into the guest, with the libraries it needs; may repeat")
    files.add_argument("--out", type=Path, metavar="DIRECTORY", help="bring back what the program left in /out, its working directory")
    files.add_argument("--bring", action="append", default=[], metavar="GUEST", help="with --out: this file or directory as well, under its full path; may repeat")
    files.add_argument("--env", action="append", default=[], metavar="NAME[=VALUE]", help="for the program; NAME alone passes this shell's value; may repeat")

    judging = run.add_argument_group("judging")
    judging.add_argument("--timeout", type=float, default=300, metavar="SECONDS", help="for boot and program together (%(default)s)")
    judging.add_argument("--allow", action="append", default=[], metavar="TEXT", help="a kernel message with this exact text is no splat; may repeat")
    judging.add_argument("--console", type=Path, metavar="FILE", help="keep the kernel's console output")
    judging.add_argument("--kernel", type=Path, metavar="IMAGE", help="boot this kernel instead of the lab's own")
    run.add_argument("command", nargs="+", metavar="PROGRAM", help="without a slash: from build/release, then from PATH")


def _size_mib(text: str) -> int:
    match = re.fullmatch(r"(\d+)([MG])i?B?", text, re.IGNORECASE)
    if not match:
        raise argparse.ArgumentTypeError(f"{text!r} is no size like 512M or 4G")
    return int(match[1]) * (1024 if match[2] in "gG" else 1)


def find_program(name: str, project: Path = PROJECT) -> Path:
    """A path as it stands; a bare name from the release build, then from PATH."""
    if "/" in name:
        path = Path(name).absolute()
        if not path.is_file():
            raise LabError(f"no program {name}")
        return path
    release = project / "build" / "release"
    built = sorted(path for path in release.rglob(name) if path.is_file() and os.access(path, os.X_OK)) if release.is_dir() else []
    if len(built) > 1:
        raise LabError(f"{name} is in build/release more than once: {', '.join(str(path) for path in built)}; give a path")
    found = str(built[0]) if built else shutil.which(name)
    if not found:
        raise LabError(f"no program {name} in {release} or in PATH")
    return Path(found).absolute()


def _files(words: list[str]) -> list[tuple[Path, str]]:
    result = []
    for word in words:
        source, _, target = word.partition(":")
        path = Path(source).absolute()
        if not path.exists():
            raise LabError(f"--file {source}: no such file")
        result.append((path, target or str(path)))
    return result


def _environment(words: list[str]) -> dict[str, str]:
    result = {}
    for word in words:
        name, equals, value = word.partition("=")
        result[name] = value if equals else os.environ.get(name, "")
    return result


def _extra_config(options) -> str:
    if not options.kernel_config:
        return ""
    try:
        return "\n" + options.kernel_config.read_text()
    except OSError as error:
        raise LabError(f"--kernel-config: {error}") from None


def _run(options) -> int:
    chosen = machine.find(options.arch, options.machine)
    cpus = options.cpus or (1 if options.counted else 2)
    wish = machine.Wish(cpus, options.numa, options.memory, options.edu, options.iommu or chosen.iommus[0])
    machine.check(wish, chosen)
    job = guest.Job(
        program=find_program(options.command[0]),
        arguments=options.command[1:],
        wish=wish,
        timeout_s=options.timeout,
        files=_files(options.file),
        bring=options.bring,
        out=options.out,
        environment=_environment(options.env),
        bind=([machine.EDU] if options.edu and wish.iommu != "none" else []) + options.bind,
        devices=options.device,
        emulator_arguments=(COUNTED if options.counted else []) + options.qemu,
        command_line=([f"hugepages={options.hugepages}"] if options.hugepages else []) + options.append,
        dma_entry_limit=options.dma_entry_limit,
        allowed=options.allow,
        console=options.console,
    )
    if options.kernel and not options.kernel.is_file():
        raise LabError(f"no kernel {options.kernel}")
    booted = kernel.Kernel(options.kernel, "given") if options.kernel else kernel.get(chosen, _extra_config(options))
    outcome = guest.run(job, chosen, booted)
    if outcome.status == guest.EXIT_LAB or (outcome.status == guest.EXIT_TIMEOUT):
        sys.stderr.write("lab: the end of the kernel's console:\n" + "\n".join(outcome.console.splitlines()[-40:]) + "\n")
    if outcome.remark:
        say(outcome.remark)
    return outcome.status


def _kernel(options) -> int:
    chosen = machine.find(options.arch, options.machine)
    emulator.command(chosen)  # a newer emulator may have to come too
    print(kernel.get(chosen, _extra_config(options), options.refresh).image)
    return 0


def _doctor(options) -> int:
    chosen = machine.find(options.arch, options.machine)
    missing = host.missing(chosen)
    if missing and options.install:
        host.install(missing)
        missing = host.missing(chosen)
    if missing:
        say(f"missing on this host: {', '.join(missing)}")
        say(f"install with: {host.install_command(missing)}")
        return 1
    say(f"everything that {chosen.architecture}/{chosen.name} needs is here; the cache is {cache.root()}")
    return 0


def _deps(options) -> int:
    print("\n".join(host.packages(machine.find(options.arch, options.machine))))
    return 0
