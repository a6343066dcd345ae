#!/usr/bin/env python3
"""tools/bench: what it writes, what it refuses. usage: test_bench.py BUILD_FOLDER"""

import json
import subprocess
import sys
import tempfile
import unittest
from pathlib import Path

PROJECT = Path(__file__).resolve().parents[2]
BUILD = ""


def bench(*words: str) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, "-B", str(PROJECT / "tools/bench"), "--build", BUILD, *words],
                          capture_output=True, text=True)


class Bench(unittest.TestCase):
    def setUp(self) -> None:
        scratch = tempfile.TemporaryDirectory()
        self.addCleanup(scratch.cleanup)
        self.out = Path(scratch.name)

    def run_one(self, pattern: str) -> subprocess.CompletedProcess:
        return bench("run", "mapping_index_bench", "--as-built", "--repetitions", "1", "--filter", pattern, "--out",
                     str(self.out))

    def test_a_result_says_what_it_ran_on(self) -> None:
        done = self.run_one("^lookup/dense/Nothing/100$")
        self.assertEqual(done.returncode, 0, done.stderr)
        result = json.loads((self.out / "mapping_index_bench.json").read_text())
        self.assertEqual([entry["name"] for entry in result["benchmarks"]], ["lookup/dense/Nothing/100"])
        for key in ("cpu", "kernel", "compiler", "build_type", "flags", "commit"):
            self.assertTrue(result["context"][key], key)
        self.assertNotIn("host_name", result["context"])
        drawn = bench("chart", str(self.out / "mapping_index_bench.json"))
        if drawn.returncode != 0:
            self.assertIn("python3-matplotlib", drawn.stderr)
        else:
            self.assertIn("lookup/dense/Nothing/100", (self.out / "mapping_index_bench.svg").read_text())

    def test_what_matches_nothing_leaves_nothing(self) -> None:
        done = self.run_one("no such benchmark")
        self.assertEqual(done.returncode, 1)
        self.assertEqual(list(self.out.iterdir()), [])

    def test_an_unknown_program_is_named_with_those_there_are(self) -> None:
        done = bench("run", "nonsense_bench", "--as-built", "--out", str(self.out))
        self.assertEqual(done.returncode, 1)
        self.assertIn("nonsense_bench", done.stderr)
        self.assertIn("engine_bench", done.stderr)

    def test_wrong_words_are_status_2(self) -> None:
        self.assertEqual(bench("run", "--repetitions", "0").returncode, 2)


if __name__ == "__main__":
    BUILD = sys.argv.pop(1)
    unittest.main()
