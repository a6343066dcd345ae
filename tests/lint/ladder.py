#!/usr/bin/env python3
"""Holds the ladder: a folder includes only what stands below it.

    core/base <- iova, pinning, backends (siblings) <- core/engine <- core/viommu <- tools, bench, tests

Public headers (core/include/iovane) include only public headers. core/base, iova, pinning and backends may include of
them only iovane/types.hpp, iovane/result.hpp, iovane/fault_record.hpp and iovane/spapr_types.hpp, which are below
everything. usage: ladder.py [PROJECT]
"""

import re
import sys
from pathlib import Path

import sources

LEAF = {"iovane/types.hpp", "iovane/result.hpp", "iovane/fault_record.hpp", "iovane/spapr_types.hpp"}
# folder -> include prefixes it may use beside the leaf headers; None: all. The longest folder that fits counts.
RULES: dict[str, set[str] | None] = {
    "core/include/iovane": {"iovane"},
    "core/base": {"base"},
    "iova": {"base", "iova"},
    "pinning": {"base", "pinning"},
    "backends": {"base", "backends"},
    "core/engine": {"iovane", "base", "iova", "pinning", "backends", "engine"},
    "core/viommu": {"iovane", "base", "iova", "pinning", "backends", "engine", "viommu"},
    "tools": None,
    "bench": None,
    "tests": None,
}
LAYERS = {"iovane", "base", "iova", "pinning", "backends", "engine", "viommu"}
# Tools, benchmarks and tests are not there for the library; these are their include roots.
ABOVE = {"cli", "trace", "replay", "tools", "bench", "tests", "core"}
INCLUDE = re.compile(r'^[ \t]*#[ \t]*include[ \t]*(["<])([^">\n]+)[">]', re.MULTILINE)


def rule_of(relative: str) -> tuple[str, set[str] | None] | None:
    fitting = [folder for folder in RULES if relative.startswith(folder + "/")]
    return (max(fitting, key=len), RULES[max(fitting, key=len)]) if fitting else None


def check(root: Path) -> list[str]:
    findings = []
    for path in sources.cpp_files(root):
        relative = path.relative_to(root).as_posix()
        rule = rule_of(relative)
        if rule is None:
            findings.append(f"{relative}: in no folder of the ladder; move it into one of {', '.join(RULES)}")
            continue
        folder, allowed = rule
        text = path.read_text(errors="replace")
        for match in INCLUDE.finditer(text):
            quote, header = match.groups()
            where = f"{relative}:{text.count(chr(10), 0, match.start()) + 1}"
            if ".." in Path(header).parts:
                findings.append(f"{where}: {header}: name it from an include root, not by way of ..")
                continue
            layer = header.split("/")[0]
            ours = layer in LAYERS or (layer in ABOVE and "/" in header)
            if not ours:
                if quote == '"' and allowed is not None:
                    findings.append(f"{where}: {header}: begins with no layer; expected one of {', '.join(sorted(allowed))}")
                continue
            if allowed is None or layer in allowed or (folder != "core/include/iovane" and header in LEAF):
                continue
            findings.append(f"{where}: {header}: {folder} may include {', '.join(sorted(allowed))} and {', '.join(sorted(LEAF))}")
    return findings


if __name__ == "__main__":
    sources.finish(check(Path(sys.argv[1]) if len(sys.argv) > 1 else sources.PROJECT), "the ladder")
