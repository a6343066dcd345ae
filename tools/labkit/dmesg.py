"""What in a kernel's console output means that the kernel itself is in trouble.

Errors that a test may provoke on purpose (DMA faults that the IOMMU reports, injected allocation failures, the out-of-memory
killer) are not splats: they are the kernel at work.
"""

import re
from collections.abc import Iterable
from dataclasses import dataclass

SPLATS = re.compile(
    "|".join(
        (
            r"\bWARNING: ",
            r"\bBUG: ",
            r"\bBUG [\w-]+ .*: ",  # a slab's own report: BUG kmalloc-64 (Not tainted): Poison overwritten
            r"kernel BUG at ",
            r"\bOops\b",
            r"Kernel panic",
            r"general protection fault",
            r"Internal error: ",
            r"Unable to handle kernel ",
            r"Kernel attempted to (read|write|execute) ",
            r"INFO: task .* blocked for more than ",
            r"rcu.*(detected|self-detected|expedited) .*stall",
            r"(soft lockup|hard LOCKUP)",
            r"INFO: possible .*(lock|recursive)",
            r"possible (circular|recursive) locking",
            r"inconsistent lock state",
            r"suspicious RCU usage",
            r"\b(KASAN|KCSAN|KFENCE|KMSAN|UBSAN): ",
            r"\brefcount_t: ",
            r"(list_add|list_del|slab|page) corruption",
            r"Bad page state",
            r"irq \d+: nobody cared",
            r"sysrq triggered crash",
        )
    )
)
LAST_LINE = re.compile(r"---\[ end (trace|Kernel panic)")
PREFIX = re.compile(r"^(<\d+>)?\[\s*\d+\.\d+\](\[\s*[TC]\d+\])?\s?")
EXCERPT_LINES_MAX = 60


@dataclass(frozen=True)
class Splat:
    line: str  # the line that gave it away, without its time stamp
    excerpt: str  # that line and what follows it, up to the end of the trace


def scan(console: str, allowed: Iterable[str] = ()) -> list[Splat]:
    """Every splat on the console, in order. A line that contains one of the `allowed` texts is not one."""
    allowed = tuple(allowed)
    lines = [line.rstrip("\r") for line in console.split("\n")]
    found: list[Splat] = []
    covered = -1  # the last line of the previous excerpt: one splat gives one report
    for at, line in enumerate(lines):
        if at <= covered or not SPLATS.search(line) or any(text in line for text in allowed):
            continue
        last = min(at + EXCERPT_LINES_MAX, len(lines)) - 1
        for here in range(at, last + 1):
            if LAST_LINE.search(lines[here]):
                last = here
                break
        covered = last
        found.append(Splat(PREFIX.sub("", line), "\n".join(lines[at : last + 1]).rstrip()))
    return found
