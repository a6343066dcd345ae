#!/usr/bin/env python3
"""Holds tools/packages.txt: every line has a name, a scope and a reason, no package twice, the lab's packages all in it.

usage: packages.py [PROJECT]
"""

import subprocess
import sys
from pathlib import Path

import sources

SCOPES = {"run", "test", "lab", "bench", "ppc64le"}


def check(root: Path) -> list[str]:
    findings = []
    seen: set[str] = set()
    for number, line in enumerate((root / "tools/packages.txt").read_text().splitlines(), 1):
        if line.startswith("#") or not line.strip():
            continue
        words = line.split(None, 2)
        if len(words) < 3 or words[1] not in SCOPES:
            findings.append(f"tools/packages.txt:{number}: expected: name, one of {', '.join(sorted(SCOPES))}, reason")
            continue
        if words[0] in seen:
            findings.append(f"tools/packages.txt:{number}: {words[0]} is there twice")
        seen.add(words[0])
    lab = root / "tools/lab"
    if lab.is_file():
        run = subprocess.run([str(lab), "deps"], capture_output=True, text=True)
        if run.returncode != 0:
            findings.append(f"tools/lab deps failed: {run.stderr.strip()}")
        for package in run.stdout.split():
            if package not in seen:
                findings.append(f"tools/packages.txt: {package} is missing, which the lab needs")
    return findings


if __name__ == "__main__":
    sources.finish(check(Path(sys.argv[1]) if len(sys.argv) > 1 else sources.PROJECT), "the package list")
