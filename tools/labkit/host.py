"""What this host has and lacks, in Debian packages."""

import os
import shutil
import subprocess

from .machine import Machine
from .report import LabError, say

COMMON = ("python3", "apt", "dpkg", "util-linux")


def packages(machine: Machine) -> list[str]:
    return sorted({*COMMON, *machine.packages})


def missing(machine: Machine) -> list[str]:
    """The packages that dpkg does not call installed."""
    if not shutil.which("dpkg-query"):
        raise LabError("this host has no dpkg: the lab needs a Debian or a system made from it")
    run = subprocess.run(["dpkg-query", "-W", "-f", "${db:Status-Status} ${Package}\n", *packages(machine)], capture_output=True, text=True)
    present = {line.split()[1] for line in run.stdout.splitlines() if line.startswith("installed ")}
    return [package for package in packages(machine) if package not in present]


def install_command(wanted: list[str]) -> str:
    return "apt-get install --no-install-recommends " + " ".join(wanted)


def install(wanted: list[str]) -> None:
    if os.geteuid() != 0:
        raise LabError(f"installing needs root: {install_command(wanted)}")
    say(install_command(wanted))
    environment = {**os.environ, "DEBIAN_FRONTEND": "noninteractive"}
    run = subprocess.run([*install_command(wanted).split(), "-y", "-q"], env=environment)
    if run.returncode != 0:
        raise LabError("apt-get failed; `apt-get update` first may help")
