#!/usr/bin/env python3
"""Holds the shell scripts to shellcheck. Skipped (77) where that program is missing. usage: shell.py [PROJECT]"""

import shutil
import subprocess
import sys
from pathlib import Path

import sources

SKIP = 77


def scripts(root: Path) -> list[Path]:
    found = []
    for folder in ("tools", "tests", ".ci"):
        for path in sorted((root / folder).rglob("*")) if (root / folder).is_dir() else []:
            if path.is_file() and path.stat().st_size < 1 << 20 and path.suffix in ("", ".sh"):
                with path.open("rb") as file:
                    first = file.readline(64)
                if first.startswith((b"#!/bin/bash", b"#!/bin/sh", b"#!/usr/bin/env bash")):
                    found.append(path)
    return found


def check(root: Path) -> list[str]:
    paths = scripts(root)
    if not paths:
        return []
    run = subprocess.run(["shellcheck", "--format=gcc", *map(str, paths)], capture_output=True, text=True)
    return run.stdout.splitlines() if run.returncode != 0 else []


if __name__ == "__main__":
    if not shutil.which("shellcheck"):
        print("skipped: shellcheck is not installed (apt-get install shellcheck)")
        sys.exit(SKIP)
    sources.finish(check(Path(sys.argv[1]) if len(sys.argv) > 1 else sources.PROJECT), "the shell scripts")
