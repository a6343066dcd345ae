#!/usr/bin/env python3
"""Holds the rule that every atomic operation spells its memory order: the default, seq_cst, hides the reasoning.

Finds member calls without an order, operators on variables declared std::atomic in the same file or its header, and
std::memory_order_seq_cst without a comment on the same or preceding lines. usage: atomics.py [PROJECT]
"""

import re
import sys
from pathlib import Path

import sources

# Operations that must spell an order. Of a compare-exchange, the order of failure may be left to follow from the other.
OPERATIONS = {
    "load", "store", "exchange", "fetch_add", "fetch_sub", "fetch_or", "fetch_and", "fetch_xor", "test_and_set",
    "compare_exchange_weak", "compare_exchange_strong",
}  # fmt: skip
CALL = re.compile(r"(?:\.|->)\s*(" + "|".join(sorted(OPERATIONS)) + r")\s*\(")
DECLARED = re.compile(r"std::atomic(?:_ref)?\s*<[^;{}()]*?>\s*&?\s*(\w+)\s*[;{=,)\[]|std::atomic_flag\s+(\w+)")


def arguments(text: str, start: int) -> str | None:
    """The text between the parenthesis that opens before `start` and its partner."""
    depth = 1
    for at in range(start, len(text)):
        if text[at] == "(":
            depth += 1
        elif text[at] == ")":
            depth -= 1
            if depth == 0:
                return text[start:at]
    return None


def has_reason(lines: list[str], number: int) -> bool:
    """A comment on the line or right above it; or, since one reason can serve a whole handshake, one that names
    seq_cst a little higher up."""
    near = any("//" in line for line in lines[max(0, number - 4) : number])
    return near or any("//" in line and "seq_cst" in line.split("//", 1)[1] for line in lines[max(0, number - 16) : number])


def check_text(text: str, declared_elsewhere: set[str] = frozenset()) -> list[tuple[int, str]]:
    code = sources.without_comments_and_strings(text)
    lines = text.split("\n")
    findings = []
    names = set(declared_elsewhere)
    for match in DECLARED.finditer(code):
        names.add(match.group(1) or match.group(2))
    for match in CALL.finditer(code):
        inside = arguments(code, match.end())
        receiver = re.search(r"(\w+)\s*(?:\[[^\]]*\])?\s*$", code[: match.start()])
        orders = len(re.findall(r"memory_order|\border\w*\b|\bsuccess\b|\bfailure\b", inside or ""))
        # `load` and `store` are good names for other things: those count only on what is known to be atomic, or where
        # the shape is an atomic's (no argument for load, one for store).
        known = receiver is not None and receiver.group(1) in names
        operation = match.group(1)
        if operation in ("load", "store", "exchange") and not known and not (operation == "load" and inside is not None and not inside.strip()):
            continue
        if orders == 0:
            number = code.count("\n", 0, match.start()) + 1
            findings.append((number, f"{operation}() without a memory order"))
    for name in sorted(names):
        pattern = rf"(?:\+\+|--)\s*{name}\b(?!\s*(?:\.|->|\[))|\b{name}\s*(?:\+\+|--|[-+|&^]=)"
        for match in re.finditer(pattern, code):
            findings.append((code.count("\n", 0, match.start()) + 1, f"operator on the atomic {name}: spell the operation and its order"))
    for match in re.finditer(r"memory_order(?:_|::)seq_cst", code):
        number = code.count("\n", 0, match.start()) + 1
        if not has_reason(lines, number):
            findings.append((number, "seq_cst without a comment that says why"))
    return sorted(findings)


def check(root: Path) -> list[str]:
    findings = []
    for path in sources.cpp_files(root):
        header = path.with_suffix(".hpp")
        names: set[str] = set()
        if path.suffix == ".cpp" and header.exists():
            for match in DECLARED.finditer(sources.without_comments_and_strings(header.read_text(errors="replace"))):
                names.add(match.group(1) or match.group(2))
        for number, what in check_text(path.read_text(errors="replace"), names):
            findings.append(f"{path.relative_to(root)}:{number}: {what}")
    return findings


if __name__ == "__main__":
    sources.finish(check(Path(sys.argv[1]) if len(sys.argv) > 1 else sources.PROJECT), "atomic operations")
