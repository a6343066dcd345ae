#!/usr/bin/env python3
"""What an embedder gets: the installed package, found by CMake and by pkg-config, with the documents' own examples.

usage: test_package.py BUILD_FOLDER
"""

import re
import shlex
import subprocess
import sys
import tempfile
import unittest
from pathlib import Path

PROJECT = Path(__file__).resolve().parents[2]
BUILD = ""
CONSUMER = """cmake_minimum_required(VERSION 3.25)
project(embedder LANGUAGES CXX)
find_package(iovane 0.1 REQUIRED)
add_executable(engine_example engine_example.cpp)
target_link_libraries(engine_example PRIVATE iovane::engine)
add_executable(vmm_example vmm_example.cpp)
target_link_libraries(vmm_example PRIVATE iovane::viommu)
"""
SAYS = {"engine_example": r": IOVA 0x[0-9a-f]+, mapped\n", "vmm_example": "2 answers, status 0 and 0; devices reach the page\n"}


def run(*words: object, cwd: Path | None = None) -> str:
    done = subprocess.run([str(word) for word in words], cwd=cwd, capture_output=True, text=True, timeout=240)
    if done.returncode != 0:
        raise AssertionError(f"{words[0]} answered {done.returncode}:\n{done.stdout[-3000:]}{done.stderr[-3000:]}")
    return done.stdout


def example(document: str) -> str:
    """The document's program: its only C++ block with a main()."""
    blocks = [block for block in re.findall(r"```cpp\n(.*?)```", (PROJECT / document).read_text(), re.DOTALL)
              if "int main()" in block]
    assert len(blocks) == 1, f"{document} has {len(blocks)} programs"
    return blocks[0]


class Package(unittest.TestCase):
    @classmethod
    def setUpClass(cls) -> None:
        scratch = tempfile.TemporaryDirectory()
        cls.addClassCleanup(scratch.cleanup)
        cls.root = Path(scratch.name)
        run("cmake", "--install", BUILD, "--prefix", cls.root / "there")
        # Moved, so that nothing can depend on where it was installed.
        cls.prefix = (cls.root / "there").rename(cls.root / "installed")
        (cls.root / "engine_example.cpp").write_text(example("README.md"))
        (cls.root / "vmm_example.cpp").write_text(example("docs/VIOMMU.md"))

    def test_cmake_finds_it_and_the_examples_run(self) -> None:
        (self.root / "CMakeLists.txt").write_text(CONSUMER)
        run("cmake", "-S", self.root, "-B", self.root / "build", f"-DCMAKE_PREFIX_PATH={self.prefix}")
        run("cmake", "--build", self.root / "build")
        for program, text in SAYS.items():
            self.assertRegex(run(self.root / "build" / program), text)

    def test_pkg_config_finds_it_too(self) -> None:
        folder = next(self.prefix.rglob("iovane.pc")).parent
        flags = shlex.split(run("pkg-config", f"--with-path={folder}", "--cflags", "--libs", "iovane"))
        program = self.root / "by_pkg_config"
        run("c++", self.root / "engine_example.cpp", "-o", program, *flags)
        self.assertRegex(run(program), SAYS["engine_example"])

    def test_the_command_is_there_and_internals_are_not_among_the_public_headers(self) -> None:
        self.assertIn("iovane", run(self.prefix / "bin/iovane", "--version"))
        public = {path.parent.name for path in (self.prefix / "include").rglob("*.hpp")
                  if "iovane-viommu" not in path.parts}
        self.assertEqual(public, {"iovane"})


if __name__ == "__main__":
    BUILD = sys.argv.pop(1)
    unittest.main()
