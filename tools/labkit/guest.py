"""One run: gather the guest's files, start the emulator, follow the guest to its verdict.

The guest talks over one virtio-serial port in frames (see guest/init.c); the kernel's console goes to a file, which is searched
for splats at the end. Everything of a run lives in a temporary directory of its own, so runs do not meet.
"""

import hashlib
import os
import re
import shutil
import signal
import socket
import struct
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path

from . import cache, dmesg, emulator, initramfs, libraries
from .kernel import Kernel
from .machine import Machine, Wish, cross_root, host_architecture
from .report import LabError, say

EXIT_SPLAT = 70
EXIT_LAB = 71
EXIT_TIMEOUT = 124

INIT_SOURCE = Path(__file__).parent / "guest" / "init.c"
STOP_GRACE_S = 40  # from asking the guest to stop to ending the emulator
POWER_OFF_GRACE_S = 15  # from the verdict to the emulator's own end
FRAME_HEADER = struct.Struct("<cI")
FRAME_LENGTH_MAX = 64 * 1024
LIBRARY_DIRECTORIES = re.compile(r"^(/usr)?/lib(64|32)?(/[a-z0-9_]+-linux-gnu\w*)?$")


@dataclass
class Job:
    """What to run and what to give and take, as the command line said it."""

    program: Path
    arguments: list[str]
    wish: Wish
    timeout_s: float
    files: list[tuple[Path, str]] = field(default_factory=list)  # (host path, guest path)
    bring: list[str] = field(default_factory=list)
    out: Path | None = None
    environment: dict[str, str] = field(default_factory=dict)
    bind: list[str] = field(default_factory=list)
    devices: list[str] = field(default_factory=list)  # QEMU -device
    emulator_arguments: list[str] = field(default_factory=list)
    command_line: list[str] = field(default_factory=list)
    dma_entry_limit: int | None = None
    allowed: list[str] = field(default_factory=list)
    console: Path | None = None  # where to keep the kernel's console output


@dataclass
class Outcome:
    status: int  # the exit status of `lab run`
    remark: str  # what to tell the user; empty when the program ended by itself and the kernel is content
    console: str = ""


def run(job: Job, machine: Machine, kernel: Kernel) -> Outcome:
    emulator_words = emulator.command(machine)
    with tempfile.TemporaryDirectory(prefix="iovane-lab-") as name:
        directory = Path(name)
        _write_initramfs(directory / "initramfs", job, machine, kernel.modules)
        return _Session(job, machine, directory).follow(emulator_words, kernel.image)


# ---- what the guest is given


def init_program(machine: Machine) -> Path:
    """The guest's PID 1, compiled once for each text of its source and each compiler."""
    compiler = shutil.which(machine.compiler)
    if not compiler:
        raise LabError(f"{machine.compiler} is missing; tools/lab doctor says how to install it")
    digest = hashlib.sha256(INIT_SOURCE.read_bytes() + machine.compiler.encode()).hexdigest()[:12]

    def build(empty: Path) -> None:
        command = [compiler, "-std=gnu17", "-O2", "-static", "-o", str(empty / "init"), str(INIT_SOURCE)]
        made = subprocess.run(command, capture_output=True, text=True)
        if made.returncode != 0:
            raise LabError(f"compiling the guest's init failed:\n{made.stderr}")

    return cache.entry(f"init/{machine.architecture}-{digest}", build) / "init"


def _write_initramfs(path: Path, job: Job, machine: Machine, modules: tuple[Path, ...]) -> None:
    with open(path, "wb") as stream:
        archive = initramfs.Writer(stream)
        archive.console()
        archive.file("init", init_program(machine))
        library_directories: set[str] = set()
        for source, target in [(job.program, str(job.program)), *job.files]:
            _add(archive, source, target, machine, library_directories)
        for module in modules:
            archive.file(f"lab/modules/{module.name}", module)
        archive.data("lab/job", _job_records(job, modules, library_directories))
        archive.finish()


def _add(archive: initramfs.Writer, source: Path, target: str, machine: Machine, library_directories: set[str]) -> None:
    """A file with everything it needs to run, or a directory with everything below it."""
    if source.is_dir():
        archive.directory(target)
        for child in sorted(source.iterdir()):
            _add(archive, child, f"{target}/{child.name}", machine, library_directories)
        return
    if not source.is_file():
        raise LabError(f"{source} is neither a file nor a directory")
    archive.file(target, source)
    executable = os.access(source, os.X_OK)
    if not executable and libraries.elf_architecture(source) is None:
        return
    for guest, host in libraries.companions(source, machine.architecture, host_architecture(), cross_root(machine)):
        archive.file(str(guest), host)
        if not LIBRARY_DIRECTORIES.match(str(guest.parent)):
            library_directories.add(str(guest.parent))


def _job_records(job: Job, modules: tuple[Path, ...], library_directories: set[str]) -> bytes:
    environment = {
        "PATH": "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin",
        "HOME": "/root",
        "IOVANE_LAB": "1",
    }
    if library_directories:
        environment["LD_LIBRARY_PATH"] = ":".join(sorted(library_directories))
    environment |= job.environment
    records = [("arg", argument) for argument in (str(job.program), *job.arguments)]
    records += [("env", f"{name}={value}") for name, value in environment.items()]
    records += [("module", f"/lab/modules/{module.name}") for module in modules]
    records += [("bind", device) for device in job.bind]
    records += [("bring", path) for path in ("/out", *job.bring)]
    if job.dma_entry_limit is not None:
        records.append(("dma_entry_limit", str(job.dma_entry_limit)))
    return b"".join(os.fsencode(f"{key} {value}") + b"\0" for key, value in records)


# ---- following the guest


class _Session:
    """One emulator from start to end."""

    def __init__(self, job: Job, machine: Machine, directory: Path):
        self.job = job
        self.machine = machine
        self.directory = directory
        self.verdict = ""
        self.timed_out = False
        self.archive = open(directory / "returned", "w+b")  # noqa: SIM115 - closed with the session
        self.connection: socket.socket | None = None

    def follow(self, emulator_words: list[str], image: Path) -> Outcome:
        with socket.socket(socket.AF_UNIX) as listener, self.archive:
            listener.bind(str(self.directory / "port"))
            listener.listen(1)
            self.deadline = time.monotonic() + self.job.timeout_s
            with open(self.directory / "emulator.log", "wb") as log:
                self.process = subprocess.Popen(self._command(emulator_words, image), stdin=subprocess.DEVNULL, stdout=log, stderr=log)
            try:
                self._accept(listener)
                self._read_frames()
                self._await_power_off()
            finally:
                if self.connection:
                    self.connection.close()
                self.process.kill()
                self.process.wait()
            returned = self._unpack()
        return self._judge(returned)

    def _command(self, emulator_words: list[str], image: Path) -> list[str]:
        wish = self.job.wish
        words = [self.machine.command_line(wish), "panic=-1", "rcupdate.rcu_cpu_stall_timeout=60", *self.job.command_line]
        command = [*emulator_words, *self.machine.arguments(wish)]
        command += ["-display", "none", "-monitor", "none", "-no-reboot", "-no-user-config"]
        command += ["-chardev", f"file,id=console,path={self.directory / 'console'}", "-serial", "chardev:console"]
        command += ["-chardev", f"socket,id=lab,path={self.directory / 'port'}"]
        bus = f",bus={self.machine.port_bus}" if self.machine.port_bus else ""
        command += ["-device", f"virtio-serial-pci,id=lab{bus}", "-device", "virtserialport,bus=lab.0,chardev=lab,name=iovane.lab"]
        for device in self.job.devices:
            command += ["-device", device]
        command += ["-kernel", str(image), "-initrd", str(self.directory / "initramfs"), "-append", " ".join(words)]
        command += self.job.emulator_arguments
        if "-icount" in command:  # counted instructions need all virtual CPUs on one thread
            command = [word.replace("thread=multi", "thread=single") for word in command]
        # The emulator must not outlive this process, however that ends.
        return ["setpriv", "--pdeathsig", "KILL", "--", *command]

    def _accept(self, listener: socket.socket) -> None:
        listener.settimeout(0.1)
        while not self.connection:
            try:
                self.connection, _ = listener.accept()
            except TimeoutError:
                if self.process.poll() is not None or time.monotonic() > self.deadline:
                    raise LabError(f"the emulator did not start:\n{self._emulator_log()}") from None

    def _read_frames(self) -> None:
        """Until the verdict, the emulator's end, or the end of patience."""
        buffer = bytearray()
        patience = self.deadline
        while True:
            left = patience - time.monotonic()
            if left <= 0 and self.timed_out:
                return
            if left <= 0:
                self.timed_out = True
                patience = time.monotonic() + STOP_GRACE_S
                self._send(b"K")
                continue
            self.connection.settimeout(left)
            try:
                block = self.connection.recv(1 << 20)
            except TimeoutError:
                continue
            except ConnectionError:
                return
            if not block:
                return
            buffer += block
            while len(buffer) >= FRAME_HEADER.size:
                kind, length = FRAME_HEADER.unpack_from(buffer)
                if length > FRAME_LENGTH_MAX:
                    raise LabError("the guest's channel carries something that is not a frame")
                if len(buffer) < FRAME_HEADER.size + length:
                    break
                payload = bytes(buffer[FRAME_HEADER.size : FRAME_HEADER.size + length])
                del buffer[: FRAME_HEADER.size + length]
                self._take(kind, payload)
                if self.verdict:
                    self._send(b"B")
                    return

    def _take(self, kind: bytes, payload: bytes) -> None:
        if kind in b"oe":
            stream = (sys.stdout if kind == b"o" else sys.stderr).buffer
            stream.write(payload)
            stream.flush()
        elif kind == b"l":
            say(payload.decode(errors="replace"))
        elif kind == b"a":
            self.archive.write(payload)
        elif kind == b"x":
            self.verdict = payload.decode(errors="replace")
        else:
            raise LabError(f"the guest sent a frame of unknown kind {kind!r}")

    def _send(self, byte: bytes) -> None:
        try:
            self.connection.settimeout(1)
            self.connection.send(byte)
        except OSError:
            pass  # the emulator is gone, which the next read tells

    def _await_power_off(self) -> None:
        try:
            self.process.wait(POWER_OFF_GRACE_S if self.verdict or not self.timed_out else 0.5)
        except subprocess.TimeoutExpired:
            pass

    def _unpack(self) -> list[Path]:
        if not self.archive.tell():
            return []
        self.archive.seek(0)
        into = self.job.out or self.directory / "out"
        try:
            files = initramfs.extract(self.archive, into, drop="out")
        except LabError:
            if self.verdict:
                raise
            return []  # cut short with the guest
        if files and not self.job.out:
            say(f"{len(files)} files in /out were dropped; --out DIRECTORY brings them here")
        return files

    def _emulator_log(self) -> str:
        return (self.directory / "emulator.log").read_text(errors="replace").strip()[-2000:]

    def _judge(self, returned: list[Path]) -> Outcome:
        path = self.directory / "console"
        console = path.read_text(errors="replace") if path.exists() else ""
        if self.job.console:
            self.job.console.write_text(console)
        splats = dmesg.scan(console, (*self.machine.known_warnings, *self.job.allowed))
        if splats:
            shown = "\n\n".join(splat.excerpt for splat in splats[:3])
            ended = f"; {self._ending()[1]}" if self._ending()[1] else ""
            return Outcome(EXIT_SPLAT, f"the kernel is in trouble: {splats[0].line} ({len(splats)} in all{ended})\n{shown}", console)
        status, remark = self._ending()
        return Outcome(status, remark, console)

    def _ending(self) -> tuple[int, str]:
        """The exit status and a remark, from the verdict alone."""
        word, _, detail = self.verdict.partition(" ")
        if word == "exit":
            return int(detail), ""
        if word == "signal":
            return 128 + int(detail), f"the program was ended by signal {detail} ({_signal_name(int(detail))})"
        if self.timed_out:
            states = {"stopped": "", "stuck": "; it would not die, so the kernel holds it", "": "; the guest did not answer any more"}
            return EXIT_TIMEOUT, f"the program was stopped after {self.job.timeout_s:g} s{states.get(word, '')}"
        if word == "failed":
            return EXIT_LAB, f"the guest could not start the program: {detail}"
        log = self._emulator_log()
        return EXIT_LAB, "the guest ended without a verdict" + (f"; the emulator said:\n{log}" if log else "")


def _signal_name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return "unknown"
