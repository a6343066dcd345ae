#!/usr/bin/env python3
"""Shows that every lint can fail, and that it lets pass what it should."""

import json
import shutil
import sys
import tempfile
import unittest
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))
sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "tools/testkit"))
sys.dont_write_bytecode = True

import atomics  # noqa: E402
import docs  # noqa: E402
import folders  # noqa: E402
import format as format_lint  # noqa: E402
import headers  # noqa: E402
import ladder  # noqa: E402
import packages  # noqa: E402
import sources  # noqa: E402
import summary  # noqa: E402


class WithTree(unittest.TestCase):
    """A project of its own in a temporary folder."""

    def setUp(self):
        self.root = Path(tempfile.mkdtemp(prefix="iovane-lint-"))
        self.addCleanup(shutil.rmtree, self.root)

    def put(self, path: str, text: str) -> Path:
        file = self.root / path
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)
        return file


class Ladder(WithTree):
    def findings(self, path: str, *includes: str) -> list[str]:
        self.put(path, "".join(f'#include "{header}"\n' for header in includes))
        return ladder.check(self.root)

    def test_refuses_upward_and_sideways(self):
        for path, header in (
            ("core/base/a.hpp", "iova/b.hpp"),
            ("core/base/a.hpp", "iovane/engine.hpp"),
            ("iova/a.hpp", "pinning/b.hpp"),
            ("iova/a.cpp", "engine/b.hpp"),
            ("pinning/a.cpp", "backends/b.hpp"),
            ("backends/model/a.hpp", "iova/b.hpp"),
            ("backends/a.hpp", "iovane/queue.hpp"),
            ("core/engine/a.cpp", "viommu/b.hpp"),
            ("core/engine/a.cpp", "cli/table.hpp"),
            ("core/viommu/a.cpp", "trace/reference.hpp"),
            ("core/include/iovane/a.hpp", "base/range.hpp"),
            ("core/include/iovane/a.hpp", "engine/core.hpp"),
            ("iova/a.hpp", "../pinning/b.hpp"),
            ("iova/a.hpp", "b.hpp"),
        ):
            with self.subTest(path=path, header=header):
                self.assertEqual(len(self.findings(path, header)), 1)
                (self.root / path).unlink()

    def test_refuses_angle_brackets_around_our_own_too(self):
        self.put("iova/a.hpp", "#  include <pinning/b.hpp>\n")
        self.assertEqual(len(ladder.check(self.root)), 1)

    def test_allows_downward(self):
        self.assertEqual(self.findings("core/base/a.hpp", "base/b.hpp", "iovane/types.hpp", "iovane/result.hpp"), [])
        self.assertEqual(self.findings("backends/model/a.hpp", "base/b.hpp", "backends/backend.hpp", "iovane/types.hpp"), [])
        self.assertEqual(self.findings("core/engine/a.cpp", "iova/b.hpp", "pinning/c.hpp", "iovane/queue.hpp"), [])
        self.assertEqual(self.findings("tests/unit/a.cpp", "viommu/b.hpp", "cli/c.hpp", "helper.hpp"), [])
        self.put("iova/c.cpp", "#include <vector>\n#include <linux/vfio.h>\n#include <fmt/core.h>\n")
        self.assertEqual(ladder.check(self.root), [])


class Folders(WithTree):
    def test_refuses_a_new_folder_and_file(self):
        for folder in ("core", "tools", "docs", ".git", "build"):
            (self.root / folder).mkdir()
        self.put("CMakeLists.txt", "")
        self.assertEqual(folders.check(self.root), [])
        (self.root / "src").mkdir()
        self.put("notes.txt", "")
        self.assertEqual(len(folders.check(self.root)), 2)


class Atomics(unittest.TestCase):
    def test_refuses_default_orders(self):
        for text in (
            "std::atomic<int> a; int f() { return a.load(); }",
            "std::atomic<int> a; void f() { a.store(1); }",
            "std::atomic<int> a; void f() { a.fetch_add(1); }",
            "std::atomic<int> a; void f() { a++; }",
            "std::atomic<std::uint64_t> a{0}; void f() { ++a; }",
            "std::atomic<int> a; void f() { a += 2; }",
            "void f(T& t) { t.word.fetch_or(1); }",
            "void f(T& t) { return t.word.load(); }",
            "void f(T* t) { t->word.compare_exchange_weak(a, b); }",
            "std::atomic_flag b; void f() { b.test_and_set(); }",
            "std::atomic<int> a; int f() {\n\n\n\n return a.load(std::memory_order_seq_cst); }",
        ):
            with self.subTest(text=text):
                self.assertEqual(len(atomics.check_text(text)), 1)

    def test_allows_spelled_orders_and_other_peoples_names(self):
        for text in (
            "std::atomic<int> a; int f() { return a.load(std::memory_order_acquire); }",
            "void f(T& t) { t.a.compare_exchange_strong(x, y, std::memory_order_acq_rel, std::memory_order_relaxed); }",
            "std::atomic<int> a; void f() { a.store(g(1, (2)), std::memory_order_release); }",
            "void f() { file.load(path); trace.store(x); std::exchange(a, b); }",
            "// a.fetch_add(1)\n const char* s = \"a.load()\";",
            "std::atomic<int> a; int f() {\n // seq_cst: Dekker, store before load.\n return a.load(std::memory_order_seq_cst); }",
            "std::atomic<std::uint32_t> a{1'000};",
        ):
            with self.subTest(text=text):
                self.assertEqual(atomics.check_text(text), [])

    def test_knows_the_atomics_of_the_header(self):
        self.assertEqual(len(atomics.check_text("void f() { count_.store(1); }", {"count_"})), 1)


class Docs(WithTree):
    def setUp(self):
        super().setUp()
        self.put("core/base/real.hpp", "struct RealType { void real_call(); };")

    def findings(self, text: str) -> list[str]:
        self.put("docs/A.md", text)
        return docs.check(self.root)

    def test_refuses_what_is_gone(self):
        for span in ("IOVANE_GONE", "core/base/gone.hpp", "gone.hpp", "GoneType", "gone_call()", "RealType::gone_call", "core/gone/*.hpp"):
            with self.subTest(span=span):
                self.assertEqual(len(self.findings(f"# T\nsee `{span}`\n")), 1)

    def test_allows_what_is_there_and_what_is_not_ours(self):
        for span in (
            "core/base/real.hpp", "real.hpp", "base/real.hpp", "core/base/*.hpp", "RealType", "RealType::real_call()",
            "iovane trace import", "IOMMU_IOAS_MAP", "--json", "/dev/iommu", "build/release", "std::vector", "4096", "map",
        ):  # fmt: skip
            with self.subTest(span=span):
                self.assertEqual(self.findings(f"# T\nsee `{span}`\n"), [])

    def test_wants_one_title(self):
        self.assertEqual(len(self.findings("no title\n")), 1)
        self.assertEqual(len(self.findings("# one\n# two\n")), 1)
        self.assertEqual(self.findings("# one\n```\n# not a title `GoneType`\n```\n"), [])


class Format(WithTree):
    def test_refuses_what_clang_format_would_change(self):
        if not shutil.which(format_lint.PROGRAM):
            self.skipTest(f"{format_lint.PROGRAM} is not installed")
        shutil.copy(sources.PROJECT / ".clang-format", self.root)
        file = self.put("core/a.cpp", "int  main( ){return 0 ;}\n")
        self.assertEqual(len(format_lint.check(self.root)), 1)
        file.write_text("int main() { return 0; }\n")
        self.assertEqual(format_lint.check(self.root), [])


class Headers(WithTree):
    def test_refuses_a_header_that_needs_another(self):
        compiler = shutil.which("g++") or shutil.which("c++")
        if not compiler:
            self.skipTest("no compiler in PATH")
        self.put("iova/a.cpp", "")
        header = self.put("iova/a.hpp", "inline std::size_t f() { return 1; }\n")
        command = f"{compiler} -I{self.root} -std=c++20 -o a.o -c {self.root}/iova/a.cpp"
        entries = [{"directory": "/", "command": command, "file": f"{self.root}/iova/a.cpp"}]
        database = self.put("build/compile_commands.json", json.dumps(entries))
        self.assertEqual(len(headers.check(database, self.root)), 1)
        header.write_text("#include <cstddef>\ninline std::size_t f() { return 1; }\n")
        self.assertEqual(headers.check(database, self.root), [])


class Packages(WithTree):
    def test_refuses_lines_without_reason_and_what_the_lab_misses(self):
        self.put("tools/packages.txt", "# comment\ncmake run configuration\n")
        self.assertEqual(packages.check(self.root), [])
        self.put("tools/packages.txt", "cmake run\nbc everything because\nbc run why\nbc run why\n")
        self.assertEqual(len(packages.check(self.root)), 3)
        self.put("tools/packages.txt", "cmake run configuration\n")
        lab = self.put("tools/lab", "#!/bin/sh\necho cmake bison\n")
        lab.chmod(0o755)
        self.assertEqual(len(packages.check(self.root)), 1)


class Summary(WithTree):
    """The summary of tools/test: what it must never do is call a failure something else."""

    CASE = '<testcase name="{name}" status="{status}">{inside}<system-out>{output}</system-out></testcase>'

    def summarize(self, *cases: dict, failures: list[str] = []) -> tuple[str, int]:
        text = "".join(self.CASE.format(**{"inside": "", "output": "", **case}) for case in cases)
        self.put("dev.xml", f"<testsuite>{text}</testsuite>")
        tests = [{"name": case["name"], "properties": [{"name": "LABELS", "value": ["unit"]}]} for case in cases]
        self.put("dev.json", json.dumps({"tests": tests}))
        return summary.summarize(self.root, failures)

    def test_counts_by_label_and_ends_with_the_plain_line(self):
        text, status = self.summarize({"name": "a", "status": "run"}, {"name": "b", "status": "run"})
        self.assertEqual((text.split("\n")[-1], status), ("2 passed, 0 failed, 0 skipped", 0))
        self.assertIn("unit", text)

    def test_gives_the_reason_of_gtest_and_of_scripts(self):
        skipped = '<skipped message="SKIP_REGULAR_EXPRESSION_MATCHED"/>'
        gtest = "[ RUN      ] A.b\nx_test.cpp:12: Skipped\nno /dev/iommu here\n\n[  SKIPPED ] A.b (0 ms)\n"
        text, status = self.summarize(
            {"name": "a", "status": "run"},
            {"name": "b", "status": "notrun", "inside": skipped, "output": gtest},
            {"name": "c", "status": "notrun", "inside": '<skipped message="SKIP_RETURN_CODE=77"/>', "output": "skipped: no qemu"},
        )
        self.assertEqual((text.split("\n")[-1], status), ("1 passed, 0 failed, 2 skipped", 0))
        self.assertIn("because: no /dev/iommu here", text)
        self.assertIn("because: no qemu", text)

    def test_names_what_a_program_that_passed_skipped_inside(self):
        output = "[ RUN      ] A.b\n/x/y.cpp:7: Skipped\nno cdev\n\n[  SKIPPED ] A.b (0 ms)\n[  PASSED  ] 3 tests.\n"
        text, status = self.summarize({"name": "lab", "status": "run", "output": output})
        self.assertEqual((text.split("\n")[-1], status), ("1 passed, 0 failed, 0 skipped", 0))
        self.assertIn("1 because: no cdev", text)

    def test_calls_failed_what_failed_and_what_could_not_start(self):
        text, status = self.summarize(
            {"name": "a", "status": "fail", "inside": '<failure message=""/>'},
            {"name": "b", "status": "notrun", "inside": '<skipped message="Unable to find executable"/>'},
            {"name": "c", "status": "run"},
            failures=["build of tsan"],
        )
        self.assertEqual((text.split("\n")[-1], status), ("1 passed, 3 failed, 0 skipped", 1))

    def test_says_last_and_shortly_what_failed_inside(self):
        cases = "".join(f"[ RUN      ] A.b{i}\n[       OK ] A.b{i} (0 ms)\n" for i in range(50))
        output = (
            f"{cases}[ RUN      ] A.c/type1\nfine so far\n/x/y.cpp:7: Failure\nExpected: 1\n  Actual: 2\n\n"
            "[  FAILED  ] A.c/type1, where GetParam() = 1 (0 ms)\n[  FAILED  ] 1 test, listed below:\n"
        )
        text, _ = self.summarize(
            {"name": "lab", "status": "fail", "inside": '<failure message="Timeout"/>', "output": output},
            {"name": "script", "status": "fail", "output": "much\nlab: the kernel stopped answering\nmore\n"},
            {"name": "silent", "status": "fail", "output": "the last line\n"},
        )
        lines = [line.strip() for line in text.split("\n")]
        self.assertEqual(
            lines[lines.index("failed:") :],
            ["failed:", "dev: lab (Timeout)", "A.c/type1", "/x/y.cpp:7: Failure", "Expected: 1", "Actual: 2", "dev: script"]
            + ["lab: the kernel stopped answering", "dev: silent", "the last line", "", "0 passed, 3 failed, 0 skipped"],
        )

    def test_fails_when_nothing_ran_or_results_are_broken(self):
        self.assertEqual(summary.summarize(self.root, [])[1], 1)
        self.put("dev.xml", "<testsuite><testcase")
        self.assertEqual(summary.summarize(self.root, [])[1], 1)


if __name__ == "__main__":
    unittest.main()
