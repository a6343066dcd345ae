"""How the lab speaks: remarks on stderr, one line each, and one exception for everything that can go wrong."""

import sys
import threading
import time


class LabError(Exception):
    """The lab itself failed. The text is for the user and names the next step where there is one."""


def say(text: str) -> None:
    print(f"lab: {text}", file=sys.stderr, flush=True)


class Progress:
    """A long job's sign of life: a line that rewrites itself on a terminal, a new line every 15 seconds elsewhere.

    Set `text` at any time; it is shown from a thread, so a job that says nothing still shows the time passing.
    """

    def __init__(self, what: str):
        self.what = what
        self.text = ""
        self.live = sys.stderr.isatty()

    def __enter__(self) -> "Progress":
        self.started = time.monotonic()
        self.done = threading.Event()
        self.thread = threading.Thread(target=self._show, daemon=True)
        self.thread.start()
        return self

    def __exit__(self, kind, *_) -> None:
        self.done.set()
        self.thread.join()
        self._line("failed" if kind else f"{self.text} done".strip())
        if self.live:
            print(file=sys.stderr, flush=True)

    def _show(self) -> None:
        while not self.done.wait(1.0 if self.live else 15.0):
            self._line(self.text)

    def _line(self, text: str) -> None:
        seconds = int(time.monotonic() - self.started)
        start, stop = ("\r\x1b[K", "") if self.live else ("", "\n")
        print(f"{start}lab: {self.what}: {text} ({seconds // 60}:{seconds % 60:02d})", end=stop, file=sys.stderr, flush=True)
