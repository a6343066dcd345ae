#!/usr/bin/env python3
"""The iovane command as its user sees it. usage: cli_test.py IOVANE"""

import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import unittest
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))
sys.dont_write_bytecode = True
from trace_writer import MAP, UNMAP, trace  # noqa: E402

DATA = Path(__file__).resolve().parents[1] / "data"
IOVANE = ""
OK, FAILED, USAGE, BAD_INPUT, UNVERIFIED, UNAVAILABLE = range(6)


class Command(unittest.TestCase):
    def setUp(self):
        self.folder = Path(tempfile.mkdtemp(prefix="iovane-cli-"))
        self.addCleanup(shutil.rmtree, self.folder)

    def put(self, name: str, content: bytes) -> str:
        path = self.folder / name
        path.write_bytes(content)
        return str(path)

    def iovane(self, *words: str, status: int = OK, **options) -> subprocess.CompletedProcess:
        run = subprocess.run([IOVANE, *words], capture_output=True, text=True, cwd=self.folder, stdin=subprocess.DEVNULL, **options)
        self.assertEqual(run.returncode, status, f"{words}\nstdout: {run.stdout}\nstderr: {run.stderr}")
        return run

    def refuses(self, status: int, words: tuple[str, ...], *parts: str, **options) -> None:
        """One clear message on standard error, nothing on standard output."""
        run = self.iovane(*words, status=status, **options)
        self.assertEqual(run.stdout, "")
        self.assertTrue(run.stderr.startswith("iovane: "), run.stderr)
        for part in parts:
            self.assertIn(part, run.stderr)


class Help(Command):
    def test_names_commands_and_exit_statuses(self):
        text = self.iovane("--help").stdout
        for part in ("probe", "replay", "top", "trace", "Exit status"):
            self.assertIn(part, text)
        for command in (("probe",), ("replay",), ("top",), ("trace", "import"), ("trace", "info")):
            self.iovane(*command, "--help")
        self.assertRegex(self.iovane("--version").stdout, r"^iovane \d+\.\d+\.\d+\n$")

    def test_wrong_usage_is_2_and_points_to_help(self):
        for words in ((), ("fly",), ("replay",), ("trace",), ("trace", "info"), ("replay", "x", "--baseline", "fast"), ("replay", "x", "--batch", "0")):
            with self.subTest(words=words):
                self.refuses(USAGE, words, "--help")


class Top(Command):
    MIXED = str(DATA / "traces" / "mixed.iovtrace")

    def test_shows_a_running_replay_and_then_nothing(self):
        replay = subprocess.Popen([IOVANE, "replay", self.MIXED, "--backend", "model", "--no-verify", "--batch", "1", "--rounds", "1000", "--stats"], stdout=subprocess.DEVNULL, stdin=subprocess.DEVNULL)
        try:
            mine = []
            for _ in range(200):
                looked = self.iovane("top", "--process", str(replay.pid), "--times", "1", "--interval", "0.05", "--json").stdout
                mine = json.loads(looked)["address_spaces"]
                if mine and mine[0]["maps"] > 1000 and mine[0]["batch_time"]["count"] > 10:
                    break
            self.assertEqual((mine[0]["name"], mine[0]["backend"], mine[0]["process"]), ("replay", "model", replay.pid))
            self.assertGreater(mine[0]["batch_time"]["p50_ns"], 0)
            table = self.iovane("top", "--process", str(replay.pid), "--times", "1", "--interval", "0.05").stdout
            self.assertIn("address space", table)
            page = next(Path("/dev/shm").glob(f"iovane.{replay.pid}.*"))
            self.assertTrue(mine[0]["running"])
            replay.kill()
            replay.wait()
            self.what_a_killed_process_left(replay.pid, page.read_bytes())
        finally:
            replay.kill()
            replay.wait()
            for left in Path("/dev/shm").glob(f"iovane.{replay.pid}.*"):  # it was killed
                left.unlink()
        self.assertIn("No statistics page", self.iovane("top", "--process", str(replay.pid), "--times", "1", "--interval", "0.01").stdout)

    def look(self, *words: str) -> str:
        return self.iovane("top", *words, "--times", "1", "--interval", "0.01", timeout=20).stdout

    def what_a_killed_process_left(self, process: int, page: bytes):
        ended = json.loads(self.look("--process", str(process), "--json"))["address_spaces"][0]
        self.assertFalse(ended["running"])
        self.assertIn(f"{process} (ended)", self.look("--process", str(process)))
        # Whatever the file says: one row, nothing that a terminal obeys, JSON that can be read.
        name = page.index(b"replay\0")
        hostile = page[:name] + b"\x1b[2J\xff\xc3\0" + page[name + 7 :]
        path = self.put("hostile", hostile)
        self.assertEqual(json.loads(self.look("--page", path, "--json"))["address_spaces"][0]["name"][:4], "?[2J")
        self.assertNotIn("\x1b", self.look("--page", path))
        noise = self.put("noise", page[: name + 64] + os.urandom(len(page) - name - 64))
        self.assertEqual(json.loads(self.look("--page", noise, "--json"))["address_spaces"][0]["name"], "replay")
        self.assertIn("replay", self.look("--page", noise))

    def test_what_is_no_page_is_refused(self):
        os.mkfifo(self.folder / "fifo")
        self.refuses(BAD_INPUT, ("top", "--page", str(self.folder / "fifo"), "--times", "1", "--interval", "0.01"), "not a file", timeout=20)
        self.refuses(BAD_INPUT, ("top", "--page", self.put("page", b"short"), "--times", "1", "--interval", "0.01"), "too short")
        self.refuses(BAD_INPUT, ("top", "--page", self.put("big", bytes(1 << 20)), "--times", "1", "--interval", "0.01"), "this version")
        self.refuses(BAD_INPUT, ("top", "--page", str(self.folder / "none"), "--times", "1", "--interval", "0.01"), "none")


class TraceFiles(Command):
    EVENTS = [(MAP, 0x100, 2, 5), (MAP, 0x200, 1, 9), (UNMAP, 0x100, 2, 0)]

    def test_a_trace_written_from_the_document_is_read(self):
        info = json.loads(self.iovane("trace", "info", "--json", self.put("a.iovtrace", trace(self.EVENTS))).stdout)[0]
        self.assertEqual((info["maps"], info["unmaps"], info["live_at_end"], info["distinct_granules"]), (2, 1, 1, 3))
        self.assertEqual((info["iova_first"], info["physical_last"], info["source"]), (0x100000, 0x9FFF, "hand.ftrace"))

    def test_bad_files_end_in_one_message_and_3(self):
        good = trace(self.EVENTS)
        flipped = bytearray(good)
        flipped[-3] ^= 1
        for name, content, parts in (
            ("truncated", good[:-5], ("truncated", "copy it again")),
            ("header-only", good[:20], ("truncated",)),
            ("corrupted", bytes(flipped), ("at byte", "checksum", "corrupted")),
            ("version", trace(self.EVENTS, version=2), ("version 2", "reads version 1")),
            ("longer", good + b"x", ("after the end",)),
            ("empty", b"", ("not a trace file",)),
            ("text", b"# tracer: nop\n", ("iovane trace import",)),
            ("overlap", trace([*self.EVENTS, (MAP, 0x200, 1, 1)]), ("event 4 of 4", "overlaps")),
            ("nothing", trace([*self.EVENTS, (UNMAP, 0x300, 1, 0)]), ("event 4 of 4", "nothing is mapped")),
            ("cut", trace([*self.EVENTS[:2], (UNMAP, 0x100, 1, 0)]), ("event 3 of 3", "cuts")),
        ):
            path = self.put(name, content)
            with self.subTest(name=name):
                self.refuses(BAD_INPUT, ("trace", "info", path), path, *parts)
                self.refuses(BAD_INPUT, ("replay", "--backend", "model", path), path, *parts)

    def test_missing_files_and_folders_are_3(self):
        self.refuses(BAD_INPUT, ("replay", "gone.iovtrace"), "gone.iovtrace", "no such file")
        self.refuses(BAD_INPUT, ("trace", "info", str(self.folder)), "folder")
        self.refuses(BAD_INPUT, ("trace", "import", "gone.ftrace"), "no such file")


class Import(Command):
    def test_writes_a_file_beside_and_says_what_it_repaired(self):
        run = self.iovane("trace", "import", str(DATA / "ftrace/two-domains.ftrace"))
        self.assertIn("further address spaces", run.stdout)
        self.assertEqual([path.name for path in self.folder.iterdir()], ["two-domains.iovtrace"])
        self.iovane("trace", "info", "two-domains.iovtrace")

    def test_makes_the_same_file_every_time(self):
        source = str(DATA / "ftrace/mid-life.ftrace.zst")
        self.iovane("trace", "import", source, "-o", "a")
        self.iovane("trace", "import", source, "-o", "b")
        self.assertEqual((self.folder / "a").read_bytes(), (self.folder / "b").read_bytes())

    def test_a_line_that_cannot_be_believed_is_named_and_nothing_is_written(self):
        text = (DATA / "ftrace/two-domains.ftrace").read_bytes() + b"x [000] ..... 1.0: map: IOMMU: iova=zzz\n"
        path = self.put("bad.ftrace", text)
        self.refuses(BAD_INPUT, ("trace", "import", path), f"{path}:453: ", "--skip-malformed")
        self.assertFalse((self.folder / "bad.iovtrace").exists())
        self.assertIn("1  malformed lines left out", self.iovane("trace", "import", "--skip-malformed", path).stdout)

    def test_where_it_cannot_write_it_says_so(self):
        source = str(DATA / "ftrace/two-domains.ftrace")
        self.refuses(FAILED, ("trace", "import", source, "-o", "no/such/folder/x"), "check that the folder exists")


class Replay(Command):
    MIXED = str(DATA / "traces/mixed.iovtrace")

    def test_every_model_verifies_a_real_trace(self):
        for backend in ("model", "model:type1", "model:type1-v1", "model:compat", "model:compat-v1"):
            with self.subTest(backend=backend):
                run = self.iovane("replay", self.MIXED, "--backend", backend, "--events", "20000", "--json")
                report = json.loads(run.stdout)
                self.assertEqual((report["backend"], report["format"]), (backend, 1))
                (only,) = report["runs"]
                self.assertTrue(only["verified"])
                self.assertEqual(only["events"], 20000)
                self.assertGreater(only["checks"]["index_entries"], 0)
                self.assertGreater(only["checks"]["dead_reads"], 0)
                self.assertGreaterEqual(only["kernel_calls"], only["kernel_calls_least"])

    def test_baselines_stand_beside_the_engine(self):
        words = ("replay", "--backend", "model", "--events", "5000", "--baseline")
        runs = json.loads(self.iovane(*words, "leaf,event", "--baseline", "engine", "--json", self.MIXED).stdout)["runs"]
        self.assertEqual([run["target"] for run in runs], ["leaf", "event", "engine"])
        leaf, event, engine = runs
        self.assertEqual(leaf["kernel_calls"], leaf["leaf_entries"])
        self.assertEqual(event["kernel_calls"], 5000)
        self.assertLess(engine["kernel_calls"], 5000)
        text = self.iovane(*words, "event,engine", self.MIXED).stdout
        for part in ("why:", "time/event loop", "calls/event", "verified", "no mapping, pin or descriptor was left"):
            self.assertIn(part, text)

    def test_front_ends_carry_a_guests_driver_to_the_host(self):
        words = ("replay", "--events", "2000", "--baseline", "engine", "--front-end", "virtio-iommu,vtd,papr", "--json", self.MIXED)
        for backend in ("model", "model:type1"):
            with self.subTest(backend=backend):
                runs = json.loads(self.iovane(*words, "--backend", backend).stdout)["runs"]
                self.assertEqual([run["target"] for run in runs], ["engine", "virtio-iommu", "vtd", "papr"])
                for run in runs:
                    self.assertTrue(run["verified"])
                    self.assertEqual(run["events"], 2000)
                    self.assertGreater(run["checks"]["live_reads"], 0)
                self.assertLess(runs[1]["kernel_calls"], 2000)  # requests of one notification share calls
        self.refuses(USAGE, ("replay", self.MIXED, "--front-end", "smmu"), "--help")

    def test_rounds_are_one_line_each_in_the_report(self):
        words = ("replay", "--backend", "model", "--events", "2000", "--rounds", "3", "--baseline", "event,engine", "--json", self.MIXED)
        self.assertEqual([run["target"] for run in json.loads(self.iovane(*words).stdout)["runs"]], ["event", "engine"])

    def test_a_comparison_puts_interfaces_side_by_side(self):
        command = ("replay", self.MIXED, "--compare", "--backend", "model,model:type1,auto", "--events", "1000")
        rows = json.loads(self.iovane(*command, "--json").stdout)["comparison"]
        times = {(row["backend"], row["target"]): row for row in rows}
        self.assertEqual(len(times), 2 * 4 + 2)  # auto is compared by the engine alone, and nothing here shares pins
        for backend in ("model", "model:type1"):
            event = times[backend, "event"]["ns_per_event"]
            self.assertAlmostEqual(times[backend, "engine"]["over_event"], times[backend, "engine"]["ns_per_event"] / event)
            self.assertAlmostEqual(times[backend, "event"]["leaf_over"], times[backend, "leaf"]["ns_per_event"] / event)
            self.assertEqual(times[backend, "engine"]["calls_per_event"], times[backend, "engine"]["calls_least"])
        best = min(times[backend, "engine"]["ns_per_event"] for backend in ("model", "model:type1"))
        self.assertAlmostEqual(times["auto", "engine"]["over_best"], times["auto", "engine"]["ns_per_event"] / best)
        text = self.iovane(*command).stdout
        for part in ("time/event loop", "leaf loop/time", "time/best interface", "auto: "):
            self.assertIn(part, text)

    def test_without_verification_it_claims_none(self):
        run = self.iovane("replay", self.MIXED, "--backend", "model", "--events", "1000", "--no-verify", "--json")
        self.assertFalse(json.loads(run.stdout)["runs"][0]["verified"])

    def test_unknown_backend_missing_device_and_unsupported_baseline(self):
        self.refuses(USAGE, ("replay", self.MIXED, "--backend", "vapour"), "there is no backend 'vapour'", "model:type1")
        self.refuses(UNAVAILABLE, ("replay", self.MIXED, "--backend", "model", "--device", "0000:99:00.0"), "0000:99:00.0", "iovane probe")
        self.refuses(UNAVAILABLE, ("replay", self.MIXED, "--backend", "model:type1", "--baseline", "event-copy"), "need iommufd")

    def test_too_little_memory_names_what_is_needed(self):
        command = ("replay", self.MIXED, "--backend", "model", "--no-verify", "--events", "2000")
        refused = self.iovane(*command, "--memory", "1", status=USAGE)
        need = re.search(r"--memory (\d+)", refused.stderr)
        self.assertIsNotNone(need, refused.stderr)
        self.iovane(*command, "--memory", need[1])

    def test_a_kernel_interface_that_is_not_there_is_5(self):
        if os.path.exists("/dev/iommu"):
            self.skipTest("this host has /dev/iommu")
        self.refuses(UNAVAILABLE, ("replay", self.MIXED, "--backend", "iommufd"), "/dev/iommu")


class Probe(Command):
    def test_says_what_auto_picks_and_why_in_both_forms(self):
        text = self.iovane("probe", "--no-attach").stdout
        for part in ("auto picks:", "why:", "memlock", "iommufd", "type1"):
            self.assertIn(part, text)
        report = json.loads(self.iovane("probe", "--no-attach", "--json").stdout)
        self.assertTrue(report["why"])
        self.assertEqual(report["format"], 1)

    def test_shows_a_host_with_everything(self):
        report = json.loads(self.iovane("probe", "--model", "--json").stdout)
        self.assertEqual(report["choice"], "iommufd")
        unusable = {interface["interface"]: interface["reason"] for interface in report["interfaces"] if not interface["usable"]}
        self.assertEqual({name for name in unusable if not name.startswith("spapr")}, {"stage1"}, "an x86 host has no sPAPR")
        self.assertIn("first stage", unusable["stage1"], "this one's IOMMU does not nest")
        self.assertIn("feature", self.iovane("probe", "--model").stdout)


if __name__ == "__main__":
    IOVANE = str(Path(sys.argv.pop(1)).resolve())
    unittest.main()
