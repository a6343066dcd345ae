#!/usr/bin/env python3
"""Holds the rule that every header compiles by itself, so that include order never matters.

Compiles each header alone with the flags that the build uses for a neighbour of it, several at a time. Through the
build's compiler cache, so that unchanged headers cost nothing the next time; sanitizers are left out, they cost most.
usage: headers.py COMPILE_COMMANDS [PROJECT]     (COMPILE_COMMANDS: compile_commands.json of a configured build)
"""

import concurrent.futures
import json
import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import sources

DROPPED_WITH_VALUE = {"-o", "-MF", "-MT", "-MQ", "-c"}
DROPPED = {"-MD", "-MMD", "-Werror", "-g", "-O2", "-O3", "-DNDEBUG"}


def commands_by_folder(database: Path) -> dict[Path, list[str]]:
    """For each folder that has a compiled source: one of its commands, without input, output and dependency files."""
    found: dict[Path, list[str]] = {}
    for entry in json.loads(database.read_text()):
        words = shlex.split(entry["command"])
        kept, skip = [], False
        for word in words:
            if skip:
                skip = False
            elif word in DROPPED_WITH_VALUE:
                skip = True
            elif word not in DROPPED and word != entry["file"] and not word.startswith("-fsanitize"):
                kept.append(word)
        found.setdefault(Path(entry["file"]).parent, kept)
    return found


def command_for(header: Path, root: Path, commands: dict[Path, list[str]]) -> list[str] | None:
    """That of the nearest folder upwards, or of anything below such a folder; at the top, of anything."""
    folder = header.parent
    while True:
        if folder in commands:
            return commands[folder]
        below = [path for path in commands if folder in path.parents]
        if below:
            # The layer with the most include roots can compile what the others can.
            return max((commands[path] for path in below), key=len)
        if folder == root:
            return None
        folder = folder.parent


def compile_alone(header: Path, relative: str, command: list[str], scratch: Path) -> str:
    # Through a source that only includes it: a header as main file warns about #pragma once.
    source = scratch / (relative.replace("/", "+") + ".cpp")
    text = f'#include "{header}"\n'
    if not source.exists() or source.read_text() != text:
        source.write_text(text)
    object_file = source.with_suffix(".o")
    run = subprocess.run([*command, "-DIOVANE_YIELD_POINTS=1", "-c", str(source), "-o", str(object_file)], capture_output=True, text=True, cwd=scratch)
    object_file.unlink(missing_ok=True)
    return "" if run.returncode == 0 else run.stderr or "the compiler says nothing"


def check(database: Path, root: Path) -> list[str]:
    # CMake leaves its launcher out of the database. Checkouts share results: paths count relative to the root.
    cache = ["env", f"CCACHE_BASEDIR={root}", "CCACHE_NOHASHDIR=1", "ccache"] if shutil.which("ccache") else []
    commands = {folder: cache + words for folder, words in commands_by_folder(database).items()}
    headers = [path for path in sources.cpp_files(root) if path.suffix == ".hpp"]
    findings = []
    scratch = database.parent / "header_checks"
    scratch.mkdir(exist_ok=True)
    with concurrent.futures.ThreadPoolExecutor(os.cpu_count() or 1) as pool:
        work = {}
        for header in headers:
            command = command_for(header, root, commands)
            if command is None:
                findings.append(f"{header.relative_to(root)}: no compiled source anywhere to take flags from")
            else:
                work[header] = pool.submit(compile_alone, header, header.relative_to(root).as_posix(), command, scratch)
        for header, result in work.items():
            if result.result():
                errors = [line for line in result.result().split("\n") if ": error:" in line or ": fatal error:" in line]
                findings.append(f"{header.relative_to(root)}: does not compile by itself: {(errors or ['?'])[0]}")
    return sorted(findings)


if __name__ == "__main__":
    if len(sys.argv) < 2:
        sys.exit(__doc__)
    sources.finish(check(Path(sys.argv[1]).resolve(), Path(sys.argv[2]).resolve() if len(sys.argv) > 2 else sources.PROJECT), "headers")
