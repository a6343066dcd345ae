"""Finds the emulator: this host's own QEMU where it is new enough, otherwise a newer one from Debian, kept in the cache.

The newer one is never installed. Its packages and everything they depend on, the C library too, are unpacked side by side, and
their own loader starts it, so it does not care what the host has.
"""

import re
import shutil
import subprocess
from pathlib import Path

from . import cache, debian, libraries
from .machine import Machine
from .report import LabError, Progress, say

NEWER = debian.Suite("trixie", "amd64")


def parse_version(text: str) -> tuple[int, ...]:
    """(major, minor, ...) out of `qemu-system-x --version`."""
    match = re.search(r"version (\d+(?:\.\d+)+)", text)
    return tuple(int(part) for part in match[1].split(".")) if match else ()


def command(machine: Machine) -> list[str]:
    """The words that start the machine's emulator."""
    here = shutil.which(machine.emulator)
    if here:
        version = parse_version(subprocess.run([here, "--version"], capture_output=True, text=True).stdout)
        if version >= machine.emulator_version:
            return [here]
    if not machine.emulator_package:
        raise LabError(f"{machine.emulator} is missing; tools/lab doctor says how to install it")
    root = cache.entry(f"emulators/{NEWER.name}-{machine.emulator_package}", lambda empty: _fetch(machine.emulator_package, empty))
    program = root / "usr/bin" / machine.emulator
    loader = root / "usr" / libraries.loader(program).lstrip("/")
    directories = sorted({str(path.parent) for path in root.glob("usr/lib/**/lib*.so.*")})
    modules = next(root.glob("usr/lib/*/qemu"), root)
    return ["env", f"QEMU_MODULE_DIR={modules}", str(loader), "--library-path", ":".join(directories), str(program), "-L", str(root / "usr/share/qemu")]


def _fetch(package: str, into: Path) -> None:
    debian.update(NEWER)
    say(f"this host's emulator is missing or too old: taking {package} from Debian {NEWER.name}")
    debs = into / "debs"
    debs.mkdir()
    with Progress(f"emulator: fetching {package} and its libraries"):
        for deb in debian.download_closure([package], NEWER, debs):
            debian.unpack(deb, into)
    shutil.rmtree(debs)
