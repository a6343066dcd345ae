"""Fetches packages from Debian without installing them and without root, for any suite and architecture.

apt does the work, signatures included, with its state kept in the lab's cache. The mirror is the one that this host's own
apt uses; ${IOVANE_LAB_MIRROR} names another.
"""

import os
import re
import shutil
import subprocess
import time
from dataclasses import dataclass
from pathlib import Path

from . import cache
from .report import LabError, say

KEYRING = Path("/usr/share/keyrings/debian-archive-keyring.gpg")
ATTEMPTS = 5  # a mirror in the middle of a sync refuses for a minute or two
PAUSE_S = 20


@dataclass(frozen=True)
class Suite:
    """One place to look for a package: a suite's main component, for one architecture in Debian's naming."""

    name: str
    architecture: str

    @property
    def security(self) -> bool:
        return self.name.endswith("-security")


def mirror(security: bool) -> str:
    given = os.environ.get("IOVANE_LAB_MIRROR")
    if given:
        return given.rstrip("/") + ("-security" if security else "")
    text = _run(["apt-get", "indextargets", "--format", "$(ORIGIN)|$(CODENAME)|$(REPO_URI)"]).stdout
    found = [line.split("|")[2].rstrip("/") for line in text.splitlines() if line.startswith("Debian|")]
    main = [uri for uri in found if not uri.endswith("-security")]
    if security:
        main = [uri for uri in found if uri.endswith("-security")] or [uri + "-security" for uri in main]
    if not main:
        raise LabError("this host's apt knows no Debian mirror: set IOVANE_LAB_MIRROR to the address of one")
    return main[0]


def apt_options(suite: Suite) -> list[str]:
    """apt's options for a private state that knows only `suite`; makes that state's directories."""
    home = cache.root() / "apt" / f"{suite.name}-{suite.architecture}"
    for part in ("lists/partial", "archives/partial", "parts"):
        (home / part).mkdir(parents=True, exist_ok=True)
    (home / "status").touch()
    signed = f" signed-by={KEYRING}" if KEYRING.exists() else ""
    sources = f"deb [arch={suite.architecture}{signed}] {mirror(suite.security)} {suite.name} main\n"
    (home / "sources.list").write_text(sources)
    settings = {
        "Dir::State": home,
        "Dir::State::Lists": home / "lists",
        "Dir::State::status": home / "status",
        "Dir::Cache": home,
        "Dir::Cache::archives": home / "archives",
        "Dir::Etc::sourcelist": home / "sources.list",
        "Dir::Etc::sourceparts": home / "parts",
        "Dir::Etc::preferencesparts": home / "parts",
        "APT::Architecture": suite.architecture,
        "APT::Architectures": suite.architecture,
        "APT::Sandbox::User": "",
        "Acquire::Languages": "none",
        "Acquire::Retries": 3,
    }
    return [f"-o{key}={value}" for key, value in settings.items()]


def update(suite: Suite) -> None:
    say(f"reading Debian's package list of {suite.name}, {suite.architecture}")
    with cache.lock(f"apt+{suite.name}-{suite.architecture}"):
        _insist(["apt-get", "-q", *apt_options(suite), "update"])


def newest(pattern: str, suite: Suite) -> str:
    """The package of the highest version whose whole name matches `pattern`."""
    return by_version(pattern, suite)[0]


def by_version(pattern: str, suite: Suite) -> list[str]:
    """The packages whose whole name matches `pattern`, the highest version first. For a kernel, the name carries its version."""
    text = _run(["apt-cache", *apt_options(suite), "pkgnames"]).stdout
    names = [name for name in text.split() if re.fullmatch(pattern, name)]
    if not names:
        raise LabError(f"Debian {suite.name} ({suite.architecture}) has no package {pattern}")
    return sorted(names, key=lambda name: [int(number) for number in re.findall(r"\d+", name)], reverse=True)


def candidate(package: str, suite: Suite) -> str:
    """The version that `download` would fetch."""
    text = _run(["apt-cache", *apt_options(suite), "show", "--no-all-versions", package]).stdout
    match = re.search(r"^Version: (\S+)$", text, re.MULTILINE)
    if not match:
        raise LabError(f"Debian {suite.name} ({suite.architecture}) has no package {package}")
    return match.group(1)


def download(package: str, suite: Suite, into: Path, attempts: int = ATTEMPTS) -> Path:
    """Fetches the package's .deb into a directory that is empty before."""
    _insist(["apt-get", "-q", *apt_options(suite), "download", package], cwd=into, attempts=attempts)
    found = list(into.glob("*.deb"))
    if len(found) != 1:
        raise LabError(f"apt-get download {package} left {len(found)} files instead of one")
    return found[0]


def download_closure(packages: list[str], suite: Suite, into: Path) -> list[Path]:
    """Fetches the packages and everything they depend on, as for a host that has nothing yet."""
    archives = [f"-oDir::Cache::archives={into}", "-oDebug::NoLocking=1"]
    (into / "partial").mkdir()
    _insist(["apt-get", "-q", "-y", "--no-install-recommends", "--download-only", *apt_options(suite), *archives, "install", *packages])
    return sorted(into.glob("*.deb"))


def unpack(deb: Path, into: Path) -> None:
    _check(_run(["dpkg-deb", "-x", str(deb), str(into)]), f"unpacking {deb.name}")


def _run(command: list[str], cwd: Path | None = None) -> subprocess.CompletedProcess:
    if not shutil.which(command[0]):
        raise LabError(f"{command[0]} is missing: the lab fetches its kernels with Debian's apt and dpkg")
    environment = {**os.environ, "LC_ALL": "C", "DEBIAN_FRONTEND": "noninteractive"}
    return subprocess.run(command, cwd=cwd, env=environment, stdin=subprocess.DEVNULL, capture_output=True, text=True)


def _check(run: subprocess.CompletedProcess, what: str) -> None:
    if run.returncode != 0:
        raise LabError(f"{what} failed:\n{(run.stdout + run.stderr).strip()[-2000:]}")


def _insist(command: list[str], cwd: Path | None = None, attempts: int = ATTEMPTS) -> None:
    for attempt in range(1, attempts + 1):
        run = _run(command, cwd)
        if run.returncode == 0:
            return
        if attempt < attempts:
            say(f"{' '.join(part for part in command if not part.startswith('-'))} failed, next try in {PAUSE_S} s")
            time.sleep(PAUSE_S)
    _check(run, " ".join(part for part in command if not part.startswith("-")))
