#!/usr/bin/env python3
"""The lab's parts that need no emulator. Run this file, or `python3 -m unittest` on it. No network, under a second."""

import io
import lzma
import os
import stat
import subprocess
import sys
import tempfile
import threading
import unittest
from contextlib import redirect_stderr
from pathlib import Path
from unittest import mock

PROJECT = Path(__file__).resolve().parents[2]
sys.dont_write_bytecode = True
sys.path.insert(0, str(PROJECT / "tools"))

from labkit import cache, cli, debian, dmesg, emulator, initramfs, kernel, libraries, machine  # noqa: E402
from labkit.report import LabError  # noqa: E402


class Scratch(unittest.TestCase):
    """A test with a directory of its own."""

    def setUp(self):
        directory = tempfile.TemporaryDirectory()
        self.addCleanup(directory.cleanup)
        self.directory = Path(directory.name)


class Newc(Scratch):
    def archive(self, fill) -> io.BytesIO:
        stream = io.BytesIO()
        writer = initramfs.Writer(stream)
        fill(writer)
        writer.finish()
        stream.seek(0)
        return stream

    def test_what_is_written_is_read_back(self):
        contents = {f"out/f{size}": os.urandom(size) for size in (0, 1, 2, 3, 4, 5, 4095, 4096, 70001)}

        def fill(writer):
            for name, content in contents.items():
                writer.data(name, content)

        found = {entry.name: data.read() for entry, data in initramfs.entries(self.archive(fill)) if stat.S_ISREG(entry.mode)}
        self.assertEqual(found, contents)

    def test_every_entry_starts_at_a_multiple_of_four(self):
        for length in range(1, 9):
            with self.subTest(length=length):
                data = self.archive(lambda w, n=length: (w.data("n" * n, b"x" * n), w.symlink("l" * n, "t" * n))).getvalue()
                at = 0
                while (at := data.find(b"070701", at)) >= 0:
                    self.assertEqual(at % 4, 0)
                    at += 6

    def test_parents_come_first_and_once(self):
        def fill(writer):
            writer.data("/a/b/c", b"1")
            writer.data("a/b/d", b"2")
            writer.data("a/b/c", b"ignored: the name is taken")

        names = [entry.name for entry, _ in initramfs.entries(self.archive(fill))]
        self.assertEqual(names, ["a", "a/b", "a/b/c", "a/b/d"])

    def test_a_host_file_keeps_only_its_executable_bit(self):
        source = self.directory / "tool"
        source.write_bytes(b"#!/bin/sh\n")
        source.chmod(0o4711)
        [entry] = [entry for entry, _ in initramfs.entries(self.archive(lambda w: w.file("tool", source)))]
        self.assertEqual(entry.mode, stat.S_IFREG | 0o755)

    def test_cpio_accepts_it(self):
        archive = self.archive(lambda w: (w.console(), w.data("d/file", b"hello"), w.symlink("d/link", "file")))
        try:
            run = subprocess.run(["cpio", "-it", "--quiet"], input=archive.getvalue(), capture_output=True)
        except FileNotFoundError:
            self.skipTest("no cpio on this host")
        self.assertEqual(run.stdout.split(), [b"dev", b"dev/console", b"d", b"d/file", b"d/link"])

    def test_extract_drops_the_prefix_and_makes_directories(self):
        stream = self.archive(lambda w: (w.data("out/deep/er/file", b"1"), w.data("proc/version", b"2"), w.directory("out/empty")))
        files = initramfs.extract(stream, self.directory, drop="out")
        self.assertEqual(sorted(files), [self.directory / "deep/er/file", self.directory / "proc/version"])
        self.assertTrue((self.directory / "empty").is_dir())

    def test_a_guest_cannot_write_outside(self):
        inside = self.directory / "inside"

        def fill(writer):
            writer.symlink("out/trap", str(self.directory))
            writer.names.clear()
            writer.data("out/../../escaped", b"x")
            writer.data("out/trap/escaped", b"x")

        initramfs.extract(self.archive(fill), inside, drop="out")
        self.assertFalse((self.directory / "escaped").exists())

    def test_a_cut_or_damaged_archive_is_refused(self):
        data = self.archive(lambda w: w.data("file", b"x" * 100)).getvalue()
        for bad in (data[:50], data[:150], b"garbage" * 40, data.replace(b"070701", b"070702", 1), b"070701" + b"zz" * 52):
            with self.subTest(bad=bad[:12]), self.assertRaises(LabError):
                initramfs.extract(io.BytesIO(bad), self.directory)


class Configuration(unittest.TestCase):
    def test_comments_and_empty_lines_do_not_count(self):
        self.assertEqual(kernel.wanted_lines("# a\n\nCONFIG_A=y\n  CONFIG_B=12 \n"), ["CONFIG_A=y", "CONFIG_B=12"])

    def test_anything_else_is_an_error_that_names_the_line(self):
        for bad in ("CONFIG_A", "A=y", "# CONFIG_B is not set\nnonsense"):
            with self.subTest(bad=bad), self.assertRaisesRegex(LabError, "line [12]"):
                kernel.wanted_lines(bad)

    def test_a_dropped_setting_is_named_with_what_is_there_instead(self):
        final = "CONFIG_A=y\n# CONFIG_B is not set\nCONFIG_C=m\nCONFIG_D=\"x\"\n"
        wanted = ["CONFIG_A=y", "CONFIG_B=y", "CONFIG_C=y", 'CONFIG_D="x"', "CONFIG_E=n"]
        self.assertEqual(kernel.dropped(wanted, final), ["CONFIG_B=y (got n)", "CONFIG_C=y (got m)"])

    def test_the_lab_s_own_files_are_well_formed_and_say_nothing_twice(self):
        for kind in machine.MACHINES:
            if isinstance(kind.kernel, machine.BuiltKernel):
                lines = kernel.wanted_lines("".join((kernel.CONFIG_DIRECTORY / name).read_text() for name in kind.kernel.configs))
                self.assertEqual(len(lines), len(set(lines)), kind.name)


class Modules(Scratch):
    def module(self, name: str, depends: str) -> Path:
        path = self.directory / f"{name}.ko.xz"
        path.write_bytes(lzma.compress(b"\x7fELF..license=GPL\0depends=" + depends.encode() + b"\0name=x\0"))
        return path

    def test_dependencies_load_first_and_once(self):
        available = {
            "vfio": self.module("vfio", ""),
            "core": self.module("core", "vfio,built-in"),
            "pci": self.module("pci", "core,vfio"),
            "tce": self.module("tce", "vfio"),
        }
        order = kernel.load_order(("tce", "pci"), available)
        self.assertEqual([path.name.split(".")[0] for path in order], ["vfio", "tce", "core", "pci"])

    def test_a_missing_module_is_named(self):
        with self.assertRaisesRegex(LabError, "kvm_hv"):
            kernel.load_order(("kvm_hv",), {})


class Packages(Scratch):
    """A mirror that lists kernels and does not have all of them."""

    LISTED = ["linux-9.9", "linux-10.1", "linux-10.2", "linux-10.2-64k"]

    def take(self, *had: str) -> Path:
        self.asked: list[tuple[str, int]] = []

        def take(package: str, suite: debian.Suite, into: Path, attempts: int = debian.ATTEMPTS) -> None:
            self.asked.append((package, attempts))
            if package not in had:
                raise LabError(f"{package}: 404")
            (into / "vmlinux").touch()

        listing = subprocess.CompletedProcess([], 0, "\n".join(self.LISTED), "")
        suite = debian.Suite("some", "ppc64el")
        with mock.patch.dict(os.environ, {"XDG_CACHE_HOME": str(self.directory), "IOVANE_LAB_MIRROR": "http://none"}), mock.patch.object(debian, "_run", return_value=listing), mock.patch.object(kernel, "_take", take), redirect_stderr(io.StringIO()):
            return kernel._first_to_be_had(debian.by_version(r"linux-[0-9.]+", suite), suite)

    def test_the_newest_is_taken(self):
        self.assertEqual(self.take(*self.LISTED).name, "linux-10.2")
        self.assertEqual(self.asked, [("linux-10.2", 1)])

    def test_one_that_is_listed_and_not_there_gives_way_to_an_older_one(self):
        self.assertEqual(self.take("linux-9.9").name, "linux-9.9")
        self.assertEqual(self.asked, [("linux-10.2", 1), ("linux-10.1", 1), ("linux-9.9", debian.ATTEMPTS)])

    def test_none_at_all_is_an_error(self):
        with self.assertRaises(LabError):
            self.take()


class KernelLog(unittest.TestCase):
    SPLATS = (
        "WARNING: CPU: 1 PID: 42 at drivers/iommu/iommufd/pages.c:100 batch_unpin+0x1/0x2",
        "BUG: kernel NULL pointer dereference, address: 0000000000000008",
        "BUG: KASAN: slab-use-after-free in iopt_unmap_iova_range+0x1/0x2",
        "BUG kmalloc-64 (Not tainted): Poison overwritten",
        "kernel BUG at mm/slub.c:562!",
        "Oops: 0002 [#1] SMP",
        "Oops: general protection fault, probably for non-canonical address 0xdead000000000100: 0000 [#1] SMP",
        "Kernel panic - not syncing: sysrq triggered crash",
        "rcu: INFO: rcu_sched self-detected stall on CPU",
        "rcu: INFO: rcu_preempt detected stalls on CPUs/tasks:",
        "INFO: task lab_probe:50 blocked for more than 120 seconds.",
        "watchdog: BUG: soft lockup - CPU#0 stuck for 26s! [lab_probe:50]",
        "WARNING: possible circular locking dependency detected",
        "WARNING: suspicious RCU usage",
        "list_del corruption. prev->next should be ffff, but was 0",
        "refcount_t: underflow; use-after-free.",
        "Unable to handle kernel paging request at virtual address dead000000000110",
        "Internal error: Oops: 0000000096000004 [#1] SMP",
        "Kernel attempted to read user page (10) - exploit attempt? (uid: 0)",
        "UBSAN: shift-out-of-bounds in drivers/vfio/vfio_iommu_type1.c:10:5",
        "irq 16: nobody cared (try booting with the \"irqpoll\" option)",
    )
    CONTENT = (
        "Linux version 6.12.0 (lab@iovane) (gcc) #1 SMP",
        "DMAR: [DMA Write NO_PASID] Request device [00:03.0] fault addr 0x1000 [fault reason 0x05] PTE Write access is not set",
        "FAULT_INJECTION: forcing a failure.",
        "Out of memory: Killed process 60 (lab_probe) total-vm:1kB",
        "sysrq: Show Blocked State",
        "rcu: Hierarchical RCU implementation.",
        "rcu: RCU restricting CPUs from NR_CPUS=64 to nr_cpu_ids=2.",
        "Spectre V2 : Mitigation: Retpolines",
        "Call Trace:",
        "debug: BUG_ON_DATA_CORRUPTION is on",
        "arm-smmu-v3 9050000.smmuv3: event: F_TRANSLATION client: 0000:00:01.0 sid: 0x8 ssid: 0x0 iova: 0x10000 ipa: 0x0",
        "EEH: Frozen PHB#0-PE#1 detected",
    )

    def test_every_kind_of_splat_is_seen(self):
        for line in self.SPLATS:
            for prefix in ("", "[    1.234567] ", "[   12.345678][  T123] "):
                with self.subTest(line=prefix + line):
                    found = dmesg.scan(f"[    0.0] Linux version\r\n{prefix}{line}\r\n")
                    self.assertEqual([splat.line for splat in found], [line])

    def test_a_kernel_at_work_is_no_splat(self):
        for line in self.CONTENT:
            with self.subTest(line=line):
                self.assertEqual(dmesg.scan(f"[    1.234567] {line}\n"), [])

    def test_one_trace_is_one_splat_and_the_next_is_another(self):
        trace = "[1.0] WARNING: CPU: 0 at a.c:1\n[1.0] Call Trace:\n[1.0] BUG: inside\n[1.0] ---[ end trace 0000000000000000 ]---\n"
        found = dmesg.scan(trace + "[2.0] quiet\n" + trace)
        self.assertEqual(len(found), 2)
        self.assertTrue(found[0].excerpt.endswith("---[ end trace 0000000000000000 ]---"))

    def test_an_allowed_text_hides_that_line_only(self):
        log = "[1.0] WARNING: known and harmless\n[1.1] WARNING: other\n"
        self.assertEqual([splat.line for splat in dmesg.scan(log, ["WARNING: known and harmless"])], ["WARNING: other"])

    def test_an_excerpt_is_bounded(self):
        [splat] = dmesg.scan("BUG: x\n" + "noise\n" * 1000)
        self.assertLessEqual(len(splat.excerpt.splitlines()), dmesg.EXCERPT_LINES_MAX)


class Libraries(Scratch):
    def test_ldd_output(self):
        text = (
            "\tlinux-vdso.so.1 (0x00007ffe2d9f2000)\n"
            "\tlibstdc++.so.6 => /lib/x86_64-linux-gnu/libstdc++.so.6 (0x00007f3c9ee00000)\n"
            "\tlibiovane.so.0 => not found\n"
            "\t/opt/with space/libx.so (0x00007f3c9ee00000)\n"
            "\tlibc.so.6 => /lib/x86_64-linux-gnu/libc.so.6 (0x00007f3c9ec1f000)\n"
            "\t/lib64/ld-linux-x86-64.so.2 (0x00007f3c9f0e6000)\n"
        )
        files, missing = libraries.parse_ldd(text)
        wanted = ["/lib/x86_64-linux-gnu/libstdc++.so.6", "/opt/with space/libx.so", "/lib/x86_64-linux-gnu/libc.so.6", "/lib64/ld-linux-x86-64.so.2"]
        self.assertEqual([str(path) for path in files], wanted)
        self.assertEqual(missing, ["libiovane.so.0"])

    def test_a_static_program_says_so(self):
        self.assertEqual(libraries.parse_ldd("\tstatically linked\n"), ([], []))
        self.assertEqual(libraries.parse_ldd("\tnot a dynamic executable\n"), ([], []))

    def test_the_architecture_is_in_the_header(self):
        for number, order, name in ((62, "little", "x86_64"), (21, "little", "ppc64le"), (183, "little", "arm64"), (22, "big", "other")):
            path = self.directory / name
            path.write_bytes(b"\x7fELF\x02" + (b"\x01" if order == "little" else b"\x02") + bytes(12) + number.to_bytes(2, order))
            self.assertEqual(libraries.elf_architecture(path), name)
        path.write_bytes(b"#!/bin/sh\n")
        self.assertIsNone(libraries.elf_architecture(path))

    def test_a_script_brings_its_interpreter(self):
        script = self.directory / "script"
        script.write_text("#! /bin/sh -e\n")
        self.assertEqual(libraries.interpreter(script), Path("/bin/sh"))

    def test_a_program_for_another_architecture_is_refused(self):
        path = self.directory / "program"
        path.write_bytes(b"\x7fELF\x02\x01" + bytes(12) + (183).to_bytes(2, "little"))
        with self.assertRaisesRegex(LabError, "arm64.*x86_64"):
            libraries.companions(path, "x86_64", "x86_64", None)


class Cache(Scratch):
    def setUp(self):
        super().setUp()
        patch = mock.patch.dict(os.environ, XDG_CACHE_HOME=str(self.directory))
        patch.start()
        self.addCleanup(patch.stop)

    def test_an_entry_is_made_once_by_whoever_comes_first(self):
        made = []

        def make(empty: Path) -> None:
            made.append(empty)
            (empty / "file").write_text("x")

        with redirect_stderr(io.StringIO()):
            threads = [threading.Thread(target=cache.entry, args=("kernels/k", make)) for _ in range(4)]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
        self.assertEqual(len(made), 1)
        self.assertEqual((cache.root() / "kernels/k/file").read_text(), "x")

    def test_a_failed_maker_leaves_nothing(self):
        def make(empty: Path) -> None:
            (empty / "half").write_text("x")
            raise LabError("no")

        with self.assertRaises(LabError):
            cache.entry("kernels/k", make)
        self.assertEqual(list((cache.root() / "kernels").iterdir()), [])

    def test_what_a_killed_maker_left_is_removed(self):
        leftover = cache.root() / "kernels/.k.abc"
        leftover.mkdir(parents=True)
        cache.entry("kernels/k", lambda empty: None)
        self.assertFalse(leftover.exists())


class Command(Scratch):
    def test_a_bare_name_is_looked_up_in_the_release_build_first(self):
        program = self.directory / "build/release/tools/sh"
        program.parent.mkdir(parents=True)
        program.write_text("")
        program.chmod(0o755)
        self.assertEqual(cli.find_program("sh", self.directory), program)
        self.assertNotEqual(cli.find_program("sh", self.directory / "elsewhere"), program)

    def test_two_of_one_name_are_not_guessed_between(self):
        for folder in ("a", "b"):
            program = self.directory / "build/release" / folder / "tool"
            program.parent.mkdir(parents=True)
            program.write_text("")
            program.chmod(0o755)
        with self.assertRaisesRegex(LabError, "more than once"):
            cli.find_program("tool", self.directory)

    def test_wrong_arguments_end_with_the_lab_s_own_status(self):
        for words in (["run", "--nonsense"], ["run", "--memory", "4", "--", "x"], ["run", "--cpus", "3", "--numa", "2", "--", "sh"], ["run", "--counted", "--numa", "2", "--", "sh"], ["run", "--", "./none"]):
            with self.subTest(words=words), redirect_stderr(io.StringIO()):
                try:
                    status = cli.main(words)
                except SystemExit as exit:
                    status = exit.code
                self.assertEqual(status, 71)

    def test_emulator_versions(self):
        self.assertEqual(emulator.parse_version("QEMU emulator version 7.2.22 (Debian 1:7.2+dfsg-7)"), (7, 2, 22))
        self.assertEqual(emulator.parse_version("nothing"), ())
        self.assertLess((7, 2, 22), (9, 1))

    def test_nodes_get_equal_shares_of_whole_sockets(self):
        words = " ".join(machine._numa(machine.Wish(cpus=4, nodes=2, memory_mib=2048, edu=0, iommu="none")))
        self.assertIn("sockets=2,cores=2", words)
        self.assertIn("nodeid=0,memdev=node0,cpus=0-1", words)
        self.assertIn("nodeid=1,memdev=node1,cpus=2-3", words)


if __name__ == "__main__":
    unittest.main()
