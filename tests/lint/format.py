#!/usr/bin/env python3
"""Holds the formatting: clang-format-14 would change nothing. Skipped (77) where that program is missing.

usage: format.py [PROJECT]
"""

import re
import shutil
import subprocess
import sys
from pathlib import Path

import sources

PROGRAM = "clang-format-14"
SKIP = 77


def check(root: Path) -> list[str]:
    paths = [str(path.relative_to(root)) for path in sources.cpp_files(root)]
    if not paths:
        return []
    style = f"--style=file:{root / '.clang-format'}"
    run = subprocess.run([PROGRAM, style, "--dry-run", *paths], cwd=root, capture_output=True, text=True)
    if run.returncode != 0:
        return [run.stderr.strip()]
    first: dict[str, str] = {}
    for match in re.finditer(r"^(\S+?):(\d+):\d+: warning: code should be clang-formatted", run.stderr, re.MULTILINE):
        first.setdefault(match.group(1), match.group(2))
    return [f"{path}:{line}: not formatted; run: {PROGRAM} -i {path}" for path, line in first.items()]


if __name__ == "__main__":
    if not shutil.which(PROGRAM):
        print(f"skipped: {PROGRAM} is not installed (apt-get install {PROGRAM})")
        sys.exit(SKIP)
    sources.finish(check(Path(sys.argv[1]) if len(sys.argv) > 1 else sources.PROJECT), "formatting")
