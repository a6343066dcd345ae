"""What a program needs beside itself to run in the guest: its shared libraries, its loader, or its script interpreter."""

import re
import shutil
import struct
import subprocess
from pathlib import Path

from .report import LabError

# e_machine of the ELF header
ELF_MACHINES = {62: "x86_64", 21: "ppc64le", 183: "arm64"}

_RESOLVED = re.compile(r"^\s*(?:(\S+) => )?(/.+?|not found)(?: \(0x[0-9a-f]+\))?\s*$")


def parse_ldd(text: str) -> tuple[list[Path], list[str]]:
    """(files to copy, names that ldd did not find). The kernel's own vdso has no file and is in neither."""
    files, missing = [], []
    for line in text.splitlines():
        match = _RESOLVED.match(line)
        if not match:
            continue
        name, path = match.groups()
        if path == "not found":
            missing.append(name)
        else:
            files.append(Path(path))
    return files, missing


def elf_architecture(path: Path) -> str | None:
    """The lab's name for an ELF file's architecture, "other" for one it has no name for, None for no ELF file at all."""
    with open(path, "rb") as file:
        head = file.read(20)
    if len(head) < 20 or head[:4] != b"\x7fELF":
        return None
    order = "<" if head[5] == 1 else ">"
    return ELF_MACHINES.get(struct.unpack_from(order + "H", head, 18)[0], "other")


def interpreter(path: Path) -> Path | None:
    """The program in a script's first line."""
    with open(path, "rb") as file:
        first = file.readline(256)
    if first[:2] != b"#!" or not first[2:].split():
        return None
    return Path(first[2:].split()[0].decode(errors="replace"))


def companions(path: Path, architecture: str, host: str, cross_root: Path | None) -> list[tuple[Path, Path]]:
    """(guest path, host file) of everything that `path` needs to run, for one ELF file or script.

    On the host's own architecture the dynamic loader says what it would load. For another one only the toolchain's library
    directory `cross_root` is searched, and the files land in the guest's /lib.
    """
    found = elf_architecture(path)
    if found is None:
        script = interpreter(path)
        if script is None:
            return []
        if not script.exists():
            raise LabError(f"{path} wants {script}, which is not on this host")
        return [(script, script), *companions(script, architecture, host, cross_root)]
    if found != architecture:
        raise LabError(f"{path} is a program for {found}, and the guest is {architecture}")
    needed, wanted_loader = _dynamic(path)
    if wanted_loader is None and not needed:
        return []  # static
    if architecture == host:
        return [(file, file) for file in _ask_loader(path)]
    return _search(path, needed, wanted_loader, cross_root)


def loader(path: Path) -> str:
    """The dynamic loader that a program asks for."""
    found = _dynamic(path)[1]
    if not found:
        raise LabError(f"{path} asks for no dynamic loader")
    return found


def _ask_loader(path: Path) -> list[Path]:
    run = subprocess.run(["ldd", str(path)], capture_output=True, text=True)
    files, missing = parse_ldd(run.stdout)
    if missing:
        raise LabError(f"{path} needs {', '.join(missing)}, which this host's dynamic loader does not find")
    if run.returncode != 0 and "not a dynamic executable" not in run.stdout + run.stderr:
        raise LabError(f"ldd {path} failed: {run.stderr.strip()}")
    return files


def _search(path: Path, needed: list[str], wanted_loader: str | None, root: Path | None) -> list[tuple[Path, Path]]:
    if root is None or not root.is_dir():
        raise LabError(f"{path} is dynamically linked and there is no cross library directory: link it with -static")
    # The toolchain's own libraries first; then where the program was linked, and Debian's multiarch directory.
    directories = [root, *_run_path(path), Path("/usr/lib") / root.parent.name]

    def locate(name: str) -> Path | None:
        return next((directory / name for directory in directories if (directory / name).exists()), None)

    result: dict[Path, Path] = {}
    if wanted_loader:
        result[Path(wanted_loader)] = root / Path(wanted_loader).name
    queue = list(needed)
    while queue:
        name = queue.pop()
        guest = Path("/lib") / name
        if guest in result or (wanted_loader and name == Path(wanted_loader).name):
            continue
        found = locate(name)
        if found is None:
            raise LabError(f"{path} needs {name}, which is in none of {', '.join(map(str, directories))}: link it with -static")
        result[guest] = found
        queue += _dynamic(found)[0]
    return list(result.items())


def _run_path(path: Path) -> list[Path]:
    text = subprocess.run(["readelf", "-W", "-d", str(path)], capture_output=True, text=True).stdout
    found = re.search(r"\((?:RUNPATH|RPATH)\)\s+Library (?:runpath|rpath): \[(.*?)\]", text)
    return [Path(entry) for entry in found.group(1).split(":") if entry.startswith("/")] if found else []


def _dynamic(path: Path) -> tuple[list[str], str | None]:
    """(needed library names, path of the loader) of an ELF file, as readelf tells it."""
    if not shutil.which("readelf"):
        raise LabError("readelf is missing: apt-get install binutils")
    text = subprocess.run(["readelf", "-W", "-l", "-d", str(path)], capture_output=True, text=True).stdout
    needed = re.findall(r"\(NEEDED\)\s+Shared library: \[(.+?)\]", text)
    interpreter = re.search(r"\[Requesting program interpreter: (.+?)\]", text)
    return needed, interpreter.group(1) if interpreter else None
