#!/usr/bin/env python3
"""Holds the documents to the code: what stands in backticks exists.

In every *.md: a path in backticks must exist (from the top, from the document's folder, or from an include root, with *
as a wild card), and a name that looks like one of ours (a call f(), a qualified a::b, a CamelCase type, an identifier
with an underscore) must occur in the sources. One `# Title` per document. Fenced and indented blocks are not looked at.
usage: docs.py [PROJECT]
"""

import re
import sys
from pathlib import Path

import sources

INCLUDE_ROOTS = ("", "core", "core/include", "tools", "tests")
TEXT_SUFFIXES = sources.CPP_SUFFIXES | {".py", ".txt", ".cmake", ".json", ".sh", ".config", ""}
CODE_SPAN = re.compile(r"(?<!`)`([^`\n]+)`(?!`)")
PATH = re.compile(r"^[\w.+*-]+(?:/[\w.+*-]+)+/?$|^[\w.+-]+\.(?:hpp|cpp|h|c|md|py|txt|json|cmake)$")
NAME = re.compile(r"^(?:::)?[A-Za-z_]\w*(?:(?:::|\.|->)~?[A-Za-z_]\w*)*(?:\(\))?$")
# Folders of a running Linux or of a build, not of this project.
FOREIGN_ROOTS = ("dev", "sys", "proc", "etc", "usr", "tmp", "build", "include/uapi", "drivers", "kernel")


def identifiers(root: Path) -> set[str]:
    known: set[str] = set()
    for folder in (*sources.CODE_FOLDERS, ".ci"):
        for path in sources.files(root / folder, TEXT_SUFFIXES) if (root / folder).is_dir() else []:
            if path.stat().st_size < 1 << 20:
                known.update(re.findall(r"[A-Za-z_]\w*", path.read_text(errors="ignore")))
    for path in root.iterdir():
        if path.is_file() and path.suffix != ".md":
            known.update(re.findall(r"[A-Za-z_]\w*", path.read_text(errors="ignore")))
    return known


def path_exists(root: Path, document: Path, text: str) -> bool:
    text = text.rstrip("/")
    if text.split("/")[0] in FOREIGN_ROOTS or any(text.startswith(prefix + "/") for prefix in FOREIGN_ROOTS):
        return True
    bases = [root / base for base in INCLUDE_ROOTS] + [document.parent]
    if "/" not in text:  # a bare file name may be anywhere
        return any(not sources.NOT_OURS.intersection(path.relative_to(root).parts) for path in root.rglob(text))
    return any(next(base.glob(text), None) is not None for base in bases if base.is_dir())


def ours(name: str) -> bool:
    """Whether a name can only be one of ours: plain words in backticks are commands, options and values, and names in
    capitals are the kernel's, unless they begin with IOVANE_."""
    if name.isupper() and not name.startswith("IOVANE_"):
        return False
    return name.endswith("()") or "::" in name or re.search(r"[a-z][A-Z]|_", name) is not None


def check(root: Path) -> list[str]:
    findings = []
    known = identifiers(root)
    for document in sources.files(root, {".md"}):
        relative = document.relative_to(root)
        fenced = False
        titles = 0
        for number, line in enumerate(document.read_text().split("\n"), 1):
            if line.lstrip().startswith("```"):
                fenced = not fenced
                continue
            if fenced or line.startswith("    "):
                continue
            titles += line.startswith("# ")
            for span in CODE_SPAN.findall(line):
                span = span.strip()
                if PATH.match(span) and not span.startswith("-"):
                    if not path_exists(root, document, span):
                        findings.append(f"{relative}:{number}: `{span}`: there is no such file")
                elif NAME.match(span) and ours(span):
                    parts = re.findall(r"[A-Za-z_]\w*", span)
                    missing = [part for part in parts if part not in known and part != "std"]
                    if missing and not span.startswith("std::"):
                        findings.append(f"{relative}:{number}: `{span}`: no {missing[0]} in the sources")
        if titles != 1:
            findings.append(f"{relative}: {titles} titles (# ...), expected one")
    return findings


if __name__ == "__main__":
    sources.finish(check(Path(sys.argv[1]) if len(sys.argv) > 1 else sources.PROJECT), "the documents")
