"""The newc cpio format, written and read: the guest's root goes in as one, and the files it leaves come back as one.

Linux's own early user space format: a 110 byte header of hexadecimal fields, the name, the data, each padded to 4 bytes.
A file is at most 4 GiB - 1, because its size has eight digits.
"""

import os
import shutil
import stat
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import BinaryIO

from .report import LabError

MAGIC = b"070701"
HEADER_LENGTH = 110
TRAILER = "TRAILER!!!"
NAME_LENGTH_MAX = 4096


class Writer:
    """Writes one archive. Parent directories are added as needed; a name that is there already is left alone."""

    def __init__(self, stream: BinaryIO):
        self.stream = stream
        self.names: set[str] = set()
        self.length = 0

    def directory(self, name: str, mode: int = 0o755) -> None:
        if self._claim(name):
            self._entry(name, stat.S_IFDIR | mode, 0)

    def symlink(self, name: str, target: str) -> None:
        if self._claim(name):
            data = os.fsencode(target)
            self._entry(name, stat.S_IFLNK | 0o777, len(data))
            self._write(data)
            self._pad()

    def data(self, name: str, content: bytes, mode: int = 0o644) -> None:
        if self._claim(name):
            self._entry(name, stat.S_IFREG | mode, len(content))
            self._write(content)
            self._pad()

    def console(self) -> None:
        """/dev/console, which the kernel opens for PID 1 before anything is mounted."""
        if self._claim("dev/console"):
            self._entry("dev/console", stat.S_IFCHR | 0o600, 0, device=(5, 1))

    def file(self, name: str, source: Path) -> None:
        """A copy of a host file (symbolic links followed), readable, and executable if it is so on the host."""
        if not self._claim(name):
            return
        with open(source, "rb") as file:
            status = os.fstat(file.fileno())
            mode = 0o755 if status.st_mode & 0o111 else 0o644
            self._entry(name, stat.S_IFREG | mode, status.st_size)
            before = self.length
            shutil.copyfileobj(_Counted(file, self), self.stream, 1 << 20)
            if self.length - before != status.st_size:
                raise LabError(f"{source} changed its size while it was being read")
        self._pad()

    def finish(self) -> None:
        self._entry(TRAILER, 0, 0)

    def _claim(self, name: str) -> bool:
        name = name.strip("/")
        if not name or name in self.names:
            return False
        parent = str(PurePosixPath(name).parent)
        if parent != ".":
            self.directory(parent)
        self.names.add(name)
        return True

    def _entry(self, name: str, mode: int, size: int, device: tuple[int, int] = (0, 0)) -> None:
        if size > 0xFFFFFFFF:
            raise LabError(f"{name} is larger than 4 GiB, which the initramfs format cannot hold")
        encoded = os.fsencode(name.strip("/")) + b"\0"
        inode = len(self.names)
        links = 2 if stat.S_ISDIR(mode) else 1
        fields = (inode, mode, 0, 0, links, 0, size, 0, 0, *device, len(encoded), 0)
        self._write(MAGIC + b"".join(b"%08X" % field for field in fields) + encoded)
        self._pad()

    def _write(self, content: bytes) -> None:
        self.stream.write(content)
        self.length += len(content)

    def _pad(self) -> None:
        self._write(bytes(-self.length % 4))


class _Counted:
    """Counts what passes through it into the writer's length."""

    def __init__(self, file: BinaryIO, writer: Writer):
        self.file = file
        self.writer = writer

    def read(self, size: int) -> bytes:
        block = self.file.read(size)
        self.writer.length += len(block)
        return block


@dataclass(frozen=True)
class Entry:
    name: str
    mode: int
    size: int


def entries(stream: BinaryIO) -> Iterator[tuple[Entry, BinaryIO]]:
    """Each entry with a stream on its data, which is good until the next one is asked for. Ends at the trailer."""
    while True:
        header = _exactly(stream, HEADER_LENGTH)
        if header[:6] != MAGIC:
            raise LabError("not a newc archive")
        try:
            fields = [int(header[at : at + 8], 16) for at in range(6, HEADER_LENGTH, 8)]
        except ValueError:
            raise LabError("a damaged header in a newc archive") from None
        mode, size, name_length = fields[1], fields[6], fields[11]
        if not 1 < name_length <= NAME_LENGTH_MAX:
            raise LabError("an impossible name length in a newc archive")
        name = os.fsdecode(_exactly(stream, name_length)[:-1])
        _exactly(stream, -(HEADER_LENGTH + name_length) % 4)
        if name == TRAILER:
            return
        part = _Part(stream, size)
        yield Entry(name, mode, size), part
        part.skip()
        _exactly(stream, -size % 4)


def extract(stream: BinaryIO, into: Path, drop: str = "") -> list[Path]:
    """Unpacks files and directories below `into`; a leading path `drop` is taken off. Returns the files.

    The archive comes from a guest, so a name cannot lead outside `into`, and links and devices are not made at all.
    """
    files = []
    for entry, data in entries(stream):
        parts = PurePosixPath("/" + entry.name).parts[1:]
        if drop and parts[:1] == (drop,):
            parts = parts[1:]
        if not parts or ".." in parts:
            continue
        path = into.joinpath(*parts)
        if stat.S_ISDIR(entry.mode):
            path.mkdir(parents=True, exist_ok=True)
        elif stat.S_ISREG(entry.mode):
            path.parent.mkdir(parents=True, exist_ok=True)
            with open(path, "wb") as file:
                shutil.copyfileobj(data, file, 1 << 20)
            if entry.mode & 0o111:
                path.chmod(0o755)
            files.append(path)
    return files


class _Part:
    """The next `left` bytes of a stream, as a stream."""

    def __init__(self, stream: BinaryIO, left: int):
        self.stream = stream
        self.left = left

    def read(self, size: int = -1) -> bytes:
        wanted = self.left if size < 0 else min(size, self.left)
        block = self.stream.read(wanted)
        if wanted and not block:
            raise LabError("a newc archive stops in the middle of a file")
        self.left -= len(block)
        return block

    def skip(self) -> None:
        while self.left:
            self.read(1 << 20)


def _exactly(stream: BinaryIO, size: int) -> bytes:
    block = stream.read(size)
    if len(block) != size:
        raise LabError("a newc archive stops too early")
    return block
