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


# What a failed program said, where it said it: gtest's failed cases, Python's, and the lab's own words about the kernel and the clock.
SAYS = 6
MOST = 40
GTEST_FAILED = re.compile(r"^\[ RUN      \] (\S+)\n((?:(?!^\[ RUN      \]).*\n)*?)^\[  FAILED  \] ", re.MULTILINE)
GTEST_FAILURE = re.compile(r"^\S+:\d+: Failure\n.*", re.MULTILINE | re.DOTALL)
SPOKE = re.compile(r"^(?:lab: |FAIL: |ERROR: |.*(?:Sanitizer|Error|error): ).*$", re.MULTILINE)


def failure_details(output: str) -> list[str]:
    """The few lines of a failed test's output from which a reader knows what went wrong."""
    details = []
    for name, said in GTEST_FAILED.findall(output):
        failure = GTEST_FAILURE.search(said)
        lines = (failure.group(0) if failure else said).strip().splitlines()
        details += [name, *(f"    {line.rstrip()}" for line in lines[:SAYS])]
    if not details:
        details = [match.group(0).rstrip() for match in SPOKE.finditer(output)][-SAYS:]
    return details or [line.rstrip() for line in output.strip().splitlines()[-SAYS:]]


class Tally:
    def __init__(self) -> None:
        self.counts: dict[str, Counter] = defaultdict(Counter)
        self.failed: dict[str, list[str]] = {}
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
            self.failed[f"{run}: {name} ({message or 'not run'})"] = failure_details(output)
        elif case.find("failure") is not None or case.get("status") == "fail":
            self.counts[label]["failed"] += 1
            failure = case.find("failure")
            why = failure.get("message") if failure is not None else ""
            self.failed[f"{run}: {name}" + (f" ({why})" if why else "")] = failure_details(output)
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
    if tally.skipped:
        lines += ["", "skipped:"]
        for reason, names in sorted(tally.skipped.items(), key=lambda item: -len(item[1])):
            shown = ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
            lines.append(f"  {len(names)} because: {reason}")
            lines.append(f"      {shown}")
    for name, reasons in sorted(tally.skipped_inside.items()):
        lines += ["", f"skipped inside {name}, which passed:"]
        lines += [f"  {count} because: {reason}" for reason, count in reasons.most_common()]
    # Last, because an output that is too long loses its middle.
    failures = len(other_failures) + len(tally.failed)
    if failures:
        lines += ["", "failed:", *(f"  {name}" for name in other_failures)]
        for name, details in tally.failed.items():
            lines += [f"  {name}", *(f"      {detail}"[:200] for detail in details[:MOST])]
    if tally.total("passed") + failures == 0:
        lines += ["", "no test ran"]
    lines += ["", f"{tally.total('passed')} passed, {failures} failed, {tally.total('skipped')} skipped"]
    return "\n".join(lines), 1 if failures or tally.total("passed") == 0 else 0


if __name__ == "__main__":
    if len(sys.argv) < 2:
        sys.exit(__doc__)
    text, status = summarize(Path(sys.argv[1]), sys.argv[2:])
    print(text)
    sys.exit(status)
