"""Where a machine's kernel comes from, kept in the cache: built from Debian's sources, or taken from Debian's own package.

A built kernel is cached under the hash of what made it: configuration, source version, and the steps below. Once a kernel is
there it is used as it is, with no network at all; `refresh` asks Debian for a newer one first.
"""

import hashlib
import json
import lzma
import os
import re
import shutil
import subprocess
from dataclasses import asdict, dataclass
from pathlib import Path

from . import cache, debian
from .machine import BuiltKernel, Edit, Machine, PackagedKernel
from .report import LabError, Progress, say

RECIPE = 1  # to be raised when the steps of _build change what comes out
CONFIG_DIRECTORY = Path(__file__).parent / "config"

_COMPILED = re.compile(r"^\s+(CC|AS|HOSTCC|LD|AR)\b")


@dataclass(frozen=True)
class Kernel:
    image: Path
    version: str  # of the Debian package it came from
    modules: tuple[Path, ...] = ()  # in loading order


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
    if isinstance(machine.kernel, BuiltKernel):
        return _built(machine.kernel, extra_config, refresh)
    if extra_config:
        raise LabError(f"{machine.name} runs Debian's own kernel, which takes no configuration")
    return _packaged(machine.kernel, refresh)


# ---- built from source


def _built(recipe: BuiltKernel, extra_config: str, refresh: bool) -> Kernel:
    config = "".join((CONFIG_DIRECTORY / name).read_text() for name in recipe.configs) + extra_config
    wanted = sorted(set(wanted_lines(config)))
    package, version = _source_version(recipe, refresh)
    what = [RECIPE, recipe.make_architecture, recipe.cross, recipe.image, [asdict(edit) for edit in recipe.edits], package, version, wanted]
    digest = hashlib.sha256(json.dumps(what, sort_keys=True).encode()).hexdigest()[:12]
    directory = cache.entry(
        f"kernels/{recipe.make_architecture}-{version}-{digest}",
        lambda empty: _build(recipe, package, version, wanted, empty),
    )
    return Kernel(directory / Path(recipe.image).name, version)


def _source_version(recipe: BuiltKernel, refresh: bool) -> tuple[str, str]:
    """(package, version) of the newest source in the cache, so that a kernel stays the same until somebody asks for another."""
    kept = [path for path in (cache.root() / "sources").glob("*_*") if re.fullmatch(recipe.package, path.name.split("_")[0])]
    if kept and not refresh:
        package, version = max(kept, key=lambda path: path.stat().st_mtime).name.split("_", 1)
        return package, version
    debian.update(recipe.suite)
    package = debian.newest(recipe.package, recipe.suite)
    return package, debian.candidate(package, recipe.suite)


def _source(package: str, version: str, suite: debian.Suite) -> Path:
    def fetch(empty: Path) -> None:
        with Progress(f"kernel: fetching {package} {version} (150 MB)"):
            debian.download(f"{package}={version}", suite, empty).rename(empty / "source.deb")

    return cache.entry(f"sources/{package}_{version}", fetch) / "source.deb"


def _edit(tree: Path, edit: Edit) -> None:
    path = tree / edit.path
    text = path.read_text() if path.exists() else ""
    if text.count(edit.old) != 1:
        raise LabError(f"this kernel source does not have in {edit.path}, exactly once:\n{edit.old}the lab's edit does not apply")
    path.write_text(text.replace(edit.old, edit.new))


def _build(recipe: BuiltKernel, package: str, version: str, wanted: list[str], into: Path) -> None:
    deb = _source(package, version, recipe.suite)
    say(f"building Linux for {recipe.make_architecture} from {package} {version}: once, about 6 minutes on 2 cores")
    tree = into / "tree"
    tree.mkdir()
    debian.unpack(deb, into / "package")
    tarball = next((into / "package").glob("usr/src/*.tar.xz"), None)
    if not tarball:
        raise LabError(f"{deb} holds no usr/src/*.tar.xz")
    _step("unpacking", ["tar", "-xJf", str(tarball), "-C", str(tree), "--strip-components=1"], into)
    shutil.rmtree(into / "package")
    for edit in recipe.edits:
        _edit(tree, edit)

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


# ---- taken from Debian's package


def _packaged(recipe: PackagedKernel, refresh: bool) -> Kernel:
    kept = sorted((path for path in (cache.root() / "kernels").glob("*") if re.fullmatch(recipe.package, path.name)), key=lambda path: path.stat().st_mtime)
    if kept and not refresh:
        directory = kept[-1]
    else:
        debian.update(recipe.suite)
        directory = _first_to_be_had(debian.by_version(recipe.package, recipe.suite), recipe.suite)
    available = {path.name.split(".")[0].replace("-", "_"): path for path in (directory / "modules").iterdir()}
    return Kernel(directory / "vmlinux", directory.name, tuple(load_order(recipe.modules, available)))


def _first_to_be_had(packages: list[str], suite: debian.Suite) -> Path:
    """A mirror can list a package for days before it has it. The one that was the newest until then will do; the last is insisted on."""
    for package in packages[:-1]:
        try:
            return cache.entry(f"kernels/{package}", lambda empty, package=package: _take(package, suite, empty, attempts=1))
        except LabError as error:
            say(f"{str(error).splitlines()[0]} trying an older one")
    return cache.entry(f"kernels/{packages[-1]}", lambda empty: _take(packages[-1], suite, empty))


def _take(package: str, suite: debian.Suite, into: Path, attempts: int = debian.ATTEMPTS) -> None:
    with Progress(f"kernel: fetching {package}"):
        deb = debian.download(package, suite, into, attempts)
        debian.unpack(deb, into / "package")
    image = next((into / "package").glob("boot/vmlinu*-*"), None)
    if not image:
        raise LabError(f"{package} holds no boot/vmlinu*")
    image.rename(into / "vmlinux")
    (into / "modules").mkdir()
    for folder in ("drivers/vfio", "arch/powerpc/kvm", "virt/lib"):  # all that a guest of ours may load
        for path in (into / "package").glob(f"**/kernel/{folder}/**/*.ko*"):
            path.rename(into / "modules" / path.name)
    shutil.rmtree(into / "package")
    deb.unlink()


def module_dependencies(path: Path) -> list[str]:
    """What a module's own .modinfo says it depends on."""
    content = path.read_bytes()
    if path.suffix == ".xz":
        content = lzma.decompress(content)
    match = re.search(rb"\0depends=([\w,-]*)\0", content)
    return [name.replace("-", "_") for name in match[1].decode().split(",") if name] if match else []


def load_order(wanted: tuple[str, ...], available: dict[str, Path]) -> list[Path]:
    """The wanted modules, each after its dependencies. A dependency that no file provides is built into the kernel."""
    order: list[Path] = []

    def visit(name: str) -> None:
        path = available[name]
        if path in order:
            return
        for dependency in module_dependencies(path):
            if dependency in available:
                visit(dependency)
        order.append(path)

    for name in wanted:
        if name not in available:
            raise LabError(f"the kernel package has no module {name}")
        visit(name)
    return order
