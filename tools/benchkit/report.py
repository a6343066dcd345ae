"""How tools/bench speaks: remarks on stderr, and one exception for what can go wrong."""

import sys


class BenchError(Exception):
    """The text is for the user, and names the next step where there is one."""


def say(text: str) -> None:
    print(f"bench: {text}", file=sys.stderr, flush=True)
