"""What a result is worth nothing without: processor, kernel, compiler, flags and commit, as key=value pairs."""

import os
import platform
import re
import subprocess
from pathlib import Path

NOT_STATED = "not stated"


def _first_line(command: list[str], folder: Path) -> str:
    try:
        run = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return NOT_STATED
    return (run.stdout.strip().split("\n") or [NOT_STATED])[0]


def _cpu_model() -> str:
    text = Path("/proc/cpuinfo").read_text()
    match = re.search(r"^model name\s*: (.+)$", text, re.MULTILINE) or re.search(r"^cpu\s*: (.+)$", text, re.MULTILINE)
    return match.group(1).strip() if match else NOT_STATED


def _threads_of_core() -> str:
    path = Path("/sys/devices/system/cpu/cpu0/topology/thread_siblings_list")
    return path.read_text().strip() if path.exists() else NOT_STATED


def _governor() -> str:
    path = Path("/sys/devices/system/cpu/cpu0/cpufreq/scaling_governor")
    return path.read_text().strip() if path.exists() else "none"


def _from_cache(build: Path, key: str) -> str:
    match = re.search(rf"^{key}:\w+=(.*)$", (build / "CMakeCache.txt").read_text(), re.MULTILINE)
    return match.group(1) if match else NOT_STATED


def stamp(project: Path, build: Path) -> dict[str, str]:
    commit = _first_line(["git", "rev-parse", "--short=12", "HEAD"], project)
    changed = _first_line(["git", "status", "--porcelain", "--untracked-files=no"], project)
    return {
        "cpu": _cpu_model(),
        "cpus": str(os.cpu_count()),
        "threads_of_core_0": _threads_of_core(),
        "governor": _governor(),
        "kernel": platform.release(),
        "compiler": _first_line([_from_cache(build, "CMAKE_CXX_COMPILER"), "--version"], project),
        "build_type": _from_cache(build, "CMAKE_BUILD_TYPE"),
        "flags": f"{_from_cache(build, 'CMAKE_CXX_FLAGS')} {_from_cache(build, 'CMAKE_CXX_FLAGS_RELEASE')}".strip(),
        "commit": commit + ("" if changed in ("", NOT_STATED) else " with changes"),
    }
