"""What the lints share: the project's files, and C++ text without comments and strings."""

import re
import sys
from pathlib import Path

PROJECT = Path(__file__).resolve().parents[2]
CPP_SUFFIXES = {".hpp", ".cpp", ".h", ".c"}
CODE_FOLDERS = ("core", "iova", "pinning", "backends", "bench", "tools", "tests")
NOT_OURS = {"build", ".git", ".cache", "__pycache__"}


def files(root: Path, suffixes: set[str]) -> list[Path]:
    """Files below `root` with one of the suffixes, sorted, without build trees."""
    found = []
    for path in sorted(root.rglob("*")):
        parts = path.relative_to(root).parts
        if path.suffix in suffixes and path.is_file() and not NOT_OURS.intersection(parts):
            found.append(path)
    return found


def cpp_files(root: Path) -> list[Path]:
    return [path for folder in CODE_FOLDERS if (root / folder).is_dir() for path in files(root / folder, CPP_SUFFIXES)]


_TOKEN = re.compile(
    r'R"(?P<tag>[^()\\\s]{0,16})\(.*?\)(?P=tag)"'  # raw string
    r'|"(?:\\.|[^"\\\n])*"'                          # string
    r"|(?<![0-9a-fA-F])'(?:\\.|[^'\\\n])*'"          # character, not a digit separator
    r"|//[^\n]*|/\*.*?\*/",                          # comments
    re.DOTALL,
)


def without_comments_and_strings(text: str) -> str:
    """The same text with comments and literals blanked, line breaks kept: line numbers stay true."""
    return _TOKEN.sub(lambda match: re.sub(r"[^\n]", " ", match.group()), text)


def finish(findings: list[str], what: str) -> None:
    """Prints findings and leaves with the status that ctest understands."""
    for finding in findings:
        print(finding)
    print(f"{len(findings)} finding(s) of {what}")
    sys.exit(1 if findings else 0)
