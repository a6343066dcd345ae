"""The lab's cache: ${XDG_CACHE_HOME:-~/.cache}/iovane/lab. Everything in it can be made again.

A finished entry appears under its final name by one rename, so a reader never sees half of one. Who makes an entry holds
the lock of its name; a second maker waits and then finds the entry there. Locks die with their process.
"""

import contextlib
import fcntl
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

from .report import say


def root() -> Path:
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "iovane" / "lab"


@contextlib.contextmanager
def lock(name: str) -> Iterator[None]:
    directory = root() / "locks"
    directory.mkdir(parents=True, exist_ok=True)
    with open(directory / name, "w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            say(f"another lab is making {name}: waiting for it")
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


def entry(name: str, make: Callable[[Path], None]) -> Path:
    """The directory `name` of the cache. When it is not there, make(empty_directory) fills it first."""
    final = root() / name
    if final.is_dir():
        return final
    with lock(name.replace("/", "+")):
        if final.is_dir():
            return final
        final.parent.mkdir(parents=True, exist_ok=True)
        for leftover in final.parent.glob(f".{final.name}.*"):  # of a maker that was killed: this lock says it is gone
            shutil.rmtree(leftover, ignore_errors=True)
        work = Path(tempfile.mkdtemp(prefix=f".{final.name}.", dir=final.parent))
        try:
            work.chmod(0o755)
            make(work)
            work.rename(final)
        finally:
            shutil.rmtree(work, ignore_errors=True)
    return final
