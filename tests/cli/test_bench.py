#!/usr/bin/env python3
"""tools/bench: what it writes, what it refuses. usage: test_bench.py BUILD_FOLDER"""

import json
import shutil
import subprocess
import sys
import tempfile
import unittest
from pathlib import Path

PROJECT = Path(__file__).resolve().parents[2]
sys.dont_write_bytecode = True
sys.path.insert(0, str(PROJECT / "tools"))

from benchkit.figures import FIGURES  # noqa: E402

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

    def test_the_recorded_runs_have_every_row_of_the_figures(self) -> None:
        for source in (PROJECT / "docs/benchmarks").glob("*.json"):
            shutil.copy(source, self.out)
        drawn = bench("figures", str(self.out))
        if drawn.returncode != 0:
            self.assertIn("python3-matplotlib", drawn.stderr)
            return
        for figure in FIGURES:
            recorded = (PROJECT / "docs/benchmarks" / figure.source).read_text()
            for panel in figure.panels:
                for _, name in panel.bars:
                    self.assertIn(f'"{name}', recorded, f"{figure.name}: {panel.heading}")
            self.assertIn(figure.title.split(":")[0], (self.out / f"{figure.name}.svg").read_text())

    def test_figures_of_nothing_say_what_is_missing(self) -> None:
        done = bench("figures", str(self.out))
        self.assertEqual(done.returncode, 1)
        self.assertIn("iova_bench.json", done.stderr)
        self.assertEqual(list(self.out.iterdir()), [])

    def test_wrong_words_are_status_2(self) -> None:
        self.assertEqual(bench("run", "--repetitions", "0").returncode, 2)


if __name__ == "__main__":
    BUILD = sys.argv.pop(1)
    unittest.main()
