#!/usr/bin/env python3
"""Adds up what several ctest runs left as JUnit files: counts by label, what failed, what was skipped and why.

usage: summary.py DIRECTORY [FAILURE ...]

DIRECTORY holds NAME.xml (ctest --output-junit) and NAME.json (ctest --show-only=json-v1) of each run; a FAILURE is something that failed outside ctest, such as a build
The last line reads "N passed, N failed, N skipped". Exit status 1 when something failed or nothing passed.
"""

import json
import re
import sys
import xml.etree.ElementTree as ElementTree
from collections import Counter, defaultdict
from pathlib import Path

NO_REASON = "gives no reason"


# gtest prints "file:line: Skipped" and then the text, up to the next line of its own.
GTEST_SKIP = re.compile(r"^\S+:\d+: Skipped\n(.*?)(?=^\[|^\s*$|\Z)", re.MULTILINE | re.DOTALL)


def skip_reason(output: str) -> str:
    """What a skipped test says about it: GTEST_SKIP's text, or the line of a script that begins with 'skipped:'."""
    match = GTEST_SKIP.search(output)
    if not match:
        match = re.search(r"^(?:\S+: )?skipped:\s*(.+)$", output, re.MULTILINE | re.IGNORECASE)
    return " ".join(match.group(1).split()) if match and match.group(1).strip() else NO_REASON


def labels_by_name(listing: Path) -> dict[str, str]:
    """From `ctest --show-only=json-v1`: the JUnit files do not say."""
    if not listing.exists():
        return {}
    labels = {}
    for test in json.loads(listing.read_text()).get("tests", []):
        for item in test.get("properties", []):
            if item["name"] == "LABELS":
                labels[test["name"]] = ", ".join(item["value"])
    return labels


class Tally:
    def __init__(self) -> None:
        self.counts: dict[str, Counter] = defaultdict(Counter)
        self.failed: list[str] = []
        self.skipped: dict[str, list[str]] = defaultdict(list)
        self.skipped_inside: dict[str, Counter] = defaultdict(Counter)

    def total(self, kind: str) -> int:
        return sum(counter[kind] for counter in self.counts.values())

    def add(self, run: str, case: ElementTree.Element, labels: dict[str, str]) -> None:
        name = case.get("name") or "a test without a name"
        label = labels.get(name, "no label")
        output = "\n".join(element.text or "" for element in case.iter("system-out"))
        skipped = case.find("skipped")
        message = skipped.get("message") or "" if skipped is not None else ""
        # ctest also calls "not run" what it could not start, such as a program that was not built: that is a failure.
        if skipped is not None and (message.startswith("SKIP_") or case.get("status") == "disabled"):
            reason = "disabled" if case.get("status") == "disabled" else skip_reason(output)
            self.counts[label]["skipped"] += 1
            self.skipped[reason].append(f"{run}: {name}")
        elif skipped is not None:
            self.counts[label]["failed"] += 1
            self.failed.append(f"{run}: {name} ({message or 'not run'})")
        elif case.find("failure") is not None or case.get("status") == "fail":
            self.counts[label]["failed"] += 1
            self.failed.append(f"{run}: {name}")
        else:
            self.counts[label]["passed"] += 1
            # One ctest can be a whole gtest program, in the lab for instance: what it skipped inside counts as a part.
            for match in GTEST_SKIP.finditer(output):
                self.skipped_inside[f"{run}: {name}"][" ".join(match.group(1).split()) or NO_REASON] += 1


def summarize(directory: Path, other_failures: list[str]) -> tuple[str, int]:
    tally = Tally()
    for path in sorted(directory.glob("*.xml")):
        try:
            cases = list(ElementTree.parse(path).iter("testcase"))
        except ElementTree.ParseError as error:
            other_failures = [*other_failures, f"{path.stem}: its results cannot be read ({error})"]
            continue
        labels = labels_by_name(path.with_suffix(".json"))
        for case in cases:
            tally.add(path.stem, case, labels)
    lines = ["", f"{'label':<16}{'passed':>8}{'failed':>8}{'skipped':>8}", "-" * 40]
    for label, counter in sorted(tally.counts.items()):
        lines.append(f"{label:<16}{counter['passed']:>8}{counter['failed']:>8}{counter['skipped']:>8}")
    failed = [*other_failures, *tally.failed]
    if failed:
        lines += ["", "failed:", *(f"  {name}" for name in failed)]
    if tally.skipped:
        lines += ["", "skipped:"]
        for reason, names in sorted(tally.skipped.items(), key=lambda item: -len(item[1])):
            shown = ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
            lines.append(f"  {len(names)} because: {reason}")
            lines.append(f"      {shown}")
    for name, reasons in sorted(tally.skipped_inside.items()):
        lines += ["", f"skipped inside {name}, which passed:"]
        lines += [f"  {count} because: {reason}" for reason, count in reasons.most_common()]
    if tally.total("passed") + len(failed) == 0:
        lines += ["", "no test ran"]
    lines += ["", f"{tally.total('passed')} passed, {len(failed)} failed, {tally.total('skipped')} skipped"]
    return "\n".join(lines), 1 if failed or tally.total("passed") == 0 else 0


if __name__ == "__main__":
    if len(sys.argv) < 2:
        sys.exit(__doc__)
    text, status = summarize(Path(sys.argv[1]), sys.argv[2:])
    print(text)
    sys.exit(status)
