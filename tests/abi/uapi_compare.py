#!/usr/bin/env python3
"""Compares backends/uapi with the newest kernel headers that apt can fetch: Debian sid's linux-libc-dev.

The headers are kept in WORK and fetched again after a week. Exit status 77, with the reason, when there is no way to get
them. What the headers have and we do not declare is listed, and is no failure.
usage: uapi_compare.py COMPILER PROJECT WORK
"""

import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

SKIP = 77
WEEK_S = 7 * 24 * 3600
FETCH_TIMEOUT_S = 90


def fetch(project: Path, work: Path) -> str:
    """Puts the headers below work/headers; returns the reason why not, or nothing."""
    sys.path.insert(0, str(project / "tools"))
    from labkit import debian
    from labkit.report import LabError

    for tool in ("apt-get", "dpkg-deb"):
        if not shutil.which(tool):
            return f"{tool} is missing: the headers come from Debian's archive"
    fresh = work / "fetching"
    shutil.rmtree(fresh, ignore_errors=True)
    fresh.mkdir(parents=True)
    try:
        options = debian.apt_options(debian.Suite("sid", "amd64"))
        for command in (["update"], ["download", "linux-libc-dev"]):
            run = subprocess.run(["apt-get", "-q", *options, *command], cwd=fresh, capture_output=True, text=True,
                                 timeout=FETCH_TIMEOUT_S)
            # apt-get update succeeds without a network; then there is no package to download.
            if run.returncode != 0:
                return f"apt-get {command[0]} failed: {run.stderr.strip()[-300:]}"
        debs = list(fresh.glob("*.deb"))
        if len(debs) != 1:
            return "apt-get download left no package"
        debian.unpack(debs[0], fresh / "headers")
    except (LabError, OSError, subprocess.TimeoutExpired) as problem:
        return str(problem)
    (fresh / "headers/version").write_text(debs[0].name)
    shutil.rmtree(work / "headers", ignore_errors=True)
    (fresh / "headers").rename(work / "headers")
    shutil.rmtree(fresh)
    return ""


def undeclared(header: Path, comparison: str) -> list[str]:
    names = re.findall(r"^struct ((?:iommu|iommufd)_\w+) \{", header.read_text(), re.MULTILINE)
    return [name for name in names if name not in comparison]


def main() -> int:
    compiler, project, work = sys.argv[1], Path(sys.argv[2]), Path(sys.argv[3])
    stamp = work / "headers/version"
    if not stamp.exists() or time.time() - stamp.stat().st_mtime > WEEK_S:
        work.mkdir(parents=True, exist_ok=True)
        reason = fetch(project, work)
        if reason and not stamp.exists():
            print(f"skipped: no newer kernel headers: {reason}")
            return SKIP
    include = work / "headers/usr/include"
    source = project / "tests/abi/uapi_compare.cpp"
    command = [compiler, "-std=c++20", "-fsyntax-only", "-w", f"-I{project}", "-isystem", str(include)]
    command += [word for path in sorted(include.glob("x86_64-linux-gnu")) for word in ("-isystem", str(path))]
    run = subprocess.run([*command, str(source)])
    missing = undeclared(include / "linux/iommufd.h", source.read_text())
    print(f"compared with {stamp.read_text()}" + (f"; not declared by us: {', '.join(missing)}" if missing else ""))
    return run.returncode


if __name__ == "__main__":
    sys.exit(main())
