"""The benchmark programs of a build, and one run of one of them."""

import json
import subprocess
from pathlib import Path

from benchkit.report import BenchError


def programs(build: Path) -> dict[str, Path]:
    """By name: bench/CMakeLists.txt puts every program into one folder."""
    folder = build / "bench"
    found = {path.name: path for path in sorted(folder.glob("*")) if path.is_file() and path.stat().st_mode & 0o111}
    if not found:
        raise BenchError(f"no benchmark program in {folder}: build one first, ninja -C {build}")
    return found


def run(program: Path, out: Path, context: dict[str, str], repetitions: int, pattern: str,
        min_time: float | None) -> None:
    """Writes `out` whole or not at all. The host's name says nothing about it and is left out."""
    scratch = out.with_suffix(".part")
    command = [str(program), f"--benchmark_out={scratch}", "--benchmark_out_format=json",
               f"--benchmark_repetitions={repetitions}", "--benchmark_enable_random_interleaving=true"]
    if repetitions > 1:
        command.append("--benchmark_report_aggregates_only=true")
    if min_time is not None:
        command.append(f"--benchmark_min_time={min_time}")
    if pattern:
        command.append(f"--benchmark_filter={pattern}")
    # A comma would end the value, see --benchmark_context.
    command.append("--benchmark_context=" + ",".join(f"{k}={v.replace(',', ';')}" for k, v in context.items()))
    try:
        status = subprocess.run(command, stdin=subprocess.DEVNULL).returncode
        if status != 0:
            raise BenchError(f"{program.name} ended with status {status}; nothing was written")
        result = json.loads(scratch.read_text())
        if not result.get("benchmarks"):
            raise BenchError(f"{program.name} has no benchmark that matches {pattern!r}")
        for key in ("host_name", "library_build_type"):  # the latter is that of Debian's library, not ours
            result["context"].pop(key, None)
        result["context"]["executable"] = program.name
        out.write_text(json.dumps(result, indent=1) + "\n")
    finally:
        scratch.unlink(missing_ok=True)
