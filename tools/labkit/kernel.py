"""Where a machine's kernel comes from: built once from Debian's sources, kept in the cache under the hash of what made it.

The hash covers the configuration, the source package's version and the steps below. A cached kernel is used as it is, with no
network at all; `refresh` asks Debian for a newer source first.
"""

import hashlib
import json
import os
import re
import shutil
import subprocess
from dataclasses import asdict, dataclass
from pathlib import Path

from . import cache, debian
from .machine import BuiltKernel, Machine
from .report import LabError, Progress, say

RECIPE = 1  # to be raised when the steps of _build change what comes out
CONFIG_DIRECTORY = Path(__file__).parent / "config"

_COMPILED = re.compile(r"^\s+(CC|AS|HOSTCC|LD|AR)\b")


@dataclass(frozen=True)
class Kernel:
    image: Path
    version: str  # of the Debian package it came from


def wanted_lines(config: str) -> list[str]:
    """The settings of a configuration file. Anything but CONFIG_X=value, a comment or an empty line is an error."""
    wanted = []
    for number, line in enumerate(config.splitlines(), 1):
        line = line.strip()
        if not line or line.startswith("#"):
            continue
        if not re.fullmatch(r"CONFIG_[A-Za-z0-9_]+=\S.*", line):
            raise LabError(f"kernel configuration, line {number}: {line!r} is not CONFIG_NAME=value")
        wanted.append(line)
    return wanted


def dropped(wanted: list[str], final: str) -> list[str]:
    """Which wanted settings the kernel's own configuration did not keep, with what it has instead."""
    have = dict(line.split("=", 1) for line in final.splitlines() if line.startswith("CONFIG_"))
    result = []
    for line in wanted:
        name, value = line.split("=", 1)
        if have.get(name) != value and not (value == "n" and name not in have):
            result.append(f"{line} (got {have.get(name, 'n')})")
    return result


def get(machine: Machine, extra_config: str = "", refresh: bool = False) -> Kernel:
    recipe = machine.kernel
    config = (CONFIG_DIRECTORY / recipe.config).read_text() + extra_config
    wanted = wanted_lines(config)
    version = _source_version(recipe, refresh)
    identity = json.dumps([RECIPE, asdict(recipe), version, sorted(wanted)], sort_keys=True)
    digest = hashlib.sha256(identity.encode()).hexdigest()[:12]
    directory = cache.entry(
        f"kernels/{machine.architecture}-{version}-{digest}",
        lambda empty: _build(recipe, version, wanted, empty),
    )
    return Kernel(directory / Path(recipe.image).name, version)


def _source_version(recipe: BuiltKernel, refresh: bool) -> str:
    """The newest source in the cache, so that a kernel stays the same until somebody asks for another."""
    kept = [path for path in (cache.root() / "sources").glob(f"{recipe.package}_*") if (path / "source.deb").exists()]
    if kept and not refresh:
        return max(kept, key=lambda path: path.stat().st_mtime).name.split("_", 1)[1]
    debian.update(recipe.suite)
    return debian.candidate(recipe.package, recipe.suite)


def _source(recipe: BuiltKernel, version: str) -> Path:
    def fetch(empty: Path) -> None:
        with Progress(f"kernel: fetching {recipe.package} {version} (150 MB)"):
            debian.download(f"{recipe.package}={version}", recipe.suite, empty).rename(empty / "source.deb")

    return cache.entry(f"sources/{recipe.package}_{version}", fetch) / "source.deb"


def _build(recipe: BuiltKernel, version: str, wanted: list[str], into: Path) -> None:
    deb = _source(recipe, version)
    say(f"building Linux for {recipe.make_architecture} from {recipe.package} {version}: once, about 6 minutes on 2 cores")
    tree = into / "tree"
    tree.mkdir()
    debian.unpack(deb, into / "package")
    tarball = next((into / "package").glob("usr/src/*.tar.xz"), None)
    if not tarball:
        raise LabError(f"{deb} holds no usr/src/*.tar.xz")
    _step("unpacking", ["tar", "-xJf", str(tarball), "-C", str(tree), "--strip-components=1"], into)
    shutil.rmtree(into / "package")

    make = ["make", f"-j{os.cpu_count()}", f"ARCH={recipe.make_architecture}", "KBUILD_BUILD_USER=lab", "KBUILD_BUILD_HOST=iovane"]
    if recipe.cross:
        make.append(f"CROSS_COMPILE={recipe.cross}")
    (into / "wanted.config").write_text("\n".join(wanted) + "\n")
    _step("configuring", [*make, f"KCONFIG_ALLCONFIG={into / 'wanted.config'}", "allnoconfig"], into, tree)
    final = (tree / ".config").read_text()
    lost = dropped(wanted, final)
    if lost:
        raise LabError("the kernel's configuration dropped what the lab wants (a dependency is off):\n  " + "\n  ".join(lost))
    _step("building", [*make, Path(recipe.image).name], into, tree)

    shutil.copy(tree / recipe.image, into)
    (into / "config").write_text(final)
    shutil.rmtree(tree)
    os.remove(into / "build.log")
    say(f"kernel ready: {(into / Path(recipe.image).name).stat().st_size >> 20} MiB")


def _step(what: str, command: list[str], directory: Path, cwd: Path | None = None) -> None:
    """One command of a build: output to build.log, a sign of life to the user, the log's end when it fails."""
    compiled = 0
    environment = {name: value for name, value in os.environ.items() if name not in ("ARCH", "CROSS_COMPILE", "MAKEFLAGS", "MFLAGS")}
    with open(directory / "build.log", "a+") as log, Progress(f"kernel: {what}") as progress:
        process = subprocess.Popen(command, cwd=cwd, env=environment, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace")
        try:
            for line in process.stdout:
                log.write(line)
                if _COMPILED.match(line):
                    compiled += 1
                    progress.text = f"{compiled} objects"
        except BaseException:
            process.kill()
            raise
        finally:
            status = process.wait()
        if status != 0:
            log.seek(0)
            tail = log.read()[-4000:]
            raise LabError(f"{what} the kernel failed ({' '.join(command)}):\n{tail}")
