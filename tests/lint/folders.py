#!/usr/bin/env python3
"""Holds the top level: the folders of the design and the files that a repository needs, nothing else.

usage: folders.py [PROJECT]
"""

import sys
from pathlib import Path

import sources

FOLDERS = {"core", "iova", "pinning", "backends", "bench", "tests", "tools", "docs", ".ci"}
FILES = {"CMakeLists.txt", "CMakePresets.json", "README.md", "LICENSE", ".gitignore", ".clang-format", ".clang-tidy"}
# What builds and editors leave behind; .gitignore keeps it out of commits.
LEFT_BEHIND = {".git", "build", ".cache", "compile_commands.json"}


def check(root: Path) -> list[str]:
    findings = []
    for path in sorted(root.iterdir()):
        if path.name in LEFT_BEHIND:
            continue
        allowed = FOLDERS if path.is_dir() else FILES
        if path.name not in allowed:
            kind = "folder" if path.is_dir() else "file"
            findings.append(f"{path.name}: {kind} at the top level; expected only {', '.join(sorted(allowed))}")
    return findings


if __name__ == "__main__":
    sources.finish(check(Path(sys.argv[1]) if len(sys.argv) > 1 else sources.PROJECT), "the top level")
