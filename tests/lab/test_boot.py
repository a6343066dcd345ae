#!/usr/bin/env python3
"""Boots the lab for real and checks every verdict it can give: `test_boot.py [ARCH [MACHINE]]`, x86_64 unless said.

Compiles lab_probe.cpp for the guest and runs it well-behaved and misbehaving. The kernel is made first when the cache has none.
Exit status 77 when this host lacks what the lab needs.
"""

import atexit
import filecmp
import shutil
import subprocess
import sys
import tempfile
import time
import unittest
from pathlib import Path

PROJECT = Path(__file__).resolve().parents[2]
sys.dont_write_bytecode = True
sys.path.insert(0, str(PROJECT / "tools"))

from labkit import host, machine  # noqa: E402

SKIP = 77
KIND: machine.Machine
PROBE: Path
CXX = {"x86_64": "g++", "ppc64le": "powerpc64le-linux-gnu-g++", "arm64": "aarch64-linux-gnu-g++"}


def lab(*words: str, **options) -> subprocess.CompletedProcess:
    command = [str(PROJECT / "tools/lab"), "run", "--arch", KIND.architecture, "--machine", KIND.name, *words]
    return subprocess.run(command, capture_output=True, text=True, stdin=subprocess.DEVNULL, **options)


class Boot(unittest.TestCase):
    def probe(self, *words: str, options: tuple[str, ...] = ()) -> subprocess.CompletedProcess:
        return lab(*options, "--", str(PROBE), *words)

    def assertStatus(self, run: subprocess.CompletedProcess, status: int) -> None:
        self.assertEqual(run.returncode, status, f"\nstdout: {run.stdout[-2000:]}\nstderr: {run.stderr[-4000:]}")

    def test_the_kernel_interfaces_are_there_and_the_device_answers(self):
        started = time.monotonic()
        run = self.probe()
        self.assertStatus(run, 0)
        self.assertIn("lab_probe: all held", run.stdout)
        self.assertEqual(run.stderr, "")
        print(f"\n{KIND.architecture}/{KIND.name}: {time.monotonic() - started:.1f} s for one run\n{run.stdout}", end="")

    def test_the_program_s_status_comes_back(self):
        self.assertStatus(self.probe("exit", "3"), 3)

    def test_a_signal_is_128_and_its_number(self):
        run = self.probe("abort")
        self.assertStatus(run, 134)
        self.assertIn("SIGABRT", run.stderr)

    def test_a_program_that_hangs_is_stopped(self):
        limit = "30" if KIND.name == "powernv9" else "12"
        run = self.probe("hang", options=("--timeout", limit))
        self.assertStatus(run, 124)
        self.assertIn(f"stopped after {limit} s", run.stderr)

    def test_a_kernel_in_trouble_wins_over_everything(self):
        run = self.probe("crash")
        self.assertStatus(run, 70)
        self.assertIn("sysrq triggered crash", run.stderr)

    def test_a_kernel_that_dies_before_the_program_is_a_splat(self):
        self.assertStatus(self.probe(options=("--append", "rdinit=/nowhere init=/nowhere")), 70)

    def test_an_emulator_that_refuses_is_the_lab_s_failure(self):
        run = self.probe(options=("--device", "no-such-device"))
        self.assertStatus(run, 71)
        self.assertIn("no-such-device", run.stderr)

    def test_a_device_to_bind_that_is_not_there_is_named(self):
        run = self.probe(options=("--bind", "dead:beef"))
        self.assertStatus(run, 71)
        self.assertIn("no PCI device dead:beef", run.stderr)

    def test_a_program_that_is_not_there(self):
        self.assertStatus(lab("--", "/nowhere/program"), 71)

    def test_both_outputs_come_whole_and_apart(self):
        run = self.probe("flood")
        self.assertStatus(run, 0)
        for text, name in ((run.stdout, "out"), (run.stderr, "err")):
            self.assertEqual(text, "".join(f"{name} {line:058d}\n" for line in range(16 * 1024)))

    def test_files_go_in_and_come_back(self):
        with tempfile.TemporaryDirectory() as name:
            given, returned = Path(name) / "given", Path(name) / "returned"
            given.write_bytes(bytes(range(256)) * 1000)
            run = self.probe("leave", options=("--out", str(returned), "--file", f"{given}:/given", "--bring", "/given", "--bring", "/proc/version"))
            self.assertStatus(run, 0)
            files = sorted(str(path.relative_to(returned)) for path in returned.rglob("*") if path.is_file())
            self.assertEqual(files, ["empty", "folder/large", "given", "proc/version"])
            self.assertEqual((returned / "folder/large").stat().st_size, 3000001)
            self.assertTrue((returned / "proc/version").read_text().startswith("Linux version"))
            self.assertTrue(filecmp.cmp(given, returned / "given", shallow=False))

    def test_two_labs_do_not_meet(self):
        command = [str(PROJECT / "tools/lab"), "run", "--arch", KIND.architecture, "--machine", KIND.name, "--", str(PROBE)]
        runs = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True, stdin=subprocess.DEVNULL) for _ in range(2)]
        for run in runs:
            output = run.communicate()[0]
            self.assertEqual(run.returncode, 0)
            self.assertIn("lab_probe: all held", output)


def compile_probe() -> Path:
    directory = tempfile.mkdtemp(prefix="lab-probe-")
    atexit.register(shutil.rmtree, directory, ignore_errors=True)
    program = Path(directory) / "lab_probe"
    subprocess.run([CXX[KIND.architecture], "-std=c++20", "-O1", "-Wall", "-Wextra", str(Path(__file__).parent / "lab_probe.cpp"), "-o", str(program)], check=True)
    return program


if __name__ == "__main__":
    wanted = [word for word in sys.argv[1:] if word in CXX or any(word == kind.name for kind in machine.MACHINES)]
    KIND = machine.find(wanted[0] if wanted else "x86_64", wanted[1] if len(wanted) > 1 else None)
    lacking = host.missing(KIND) + ([] if shutil.which(CXX[KIND.architecture]) else [CXX[KIND.architecture]])
    if lacking:
        print(f"skipped: this host lacks {', '.join(lacking)}")
        sys.exit(SKIP)
    PROBE = compile_probe()
    subprocess.run([str(PROJECT / "tools/lab"), "kernel", "--arch", KIND.architecture, "--machine", KIND.name], check=True, stdout=subprocess.DEVNULL)
    unittest.main(argv=[sys.argv[0], *(word for word in sys.argv[1:] if word not in wanted)])
