"""Runs one measurement in a new process, and records its result, its time and the memory of its process tree."""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import re
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import psutil

ROOT = Path(__file__).resolve().parents[1]
_MIB = 1024 * 1024
_STARTED = "BENCHMARK_STARTED"  # environment variable with the start time of a worker
_EVERY = 0.2  # seconds between two samples of the memory


def peak_of_this_process() -> float:
    """Returns the peak memory of this process in MiB.

    On Linux `ru_maxrss` is inherited from the parent process; `VmHWM` is not.
    """
    try:
        status = Path("/proc/self/status").read_text()
    except OSError:  # not Linux
        import resource

        most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return most / (_MIB if sys.platform == "darwin" else 1024)
    return int(re.search(r"VmHWM:\s+(\d+)", status)[1]) / 1024  # type: ignore[index]


def age_of_this_process() -> float:
    """Returns the seconds since `run_worker` started this process, with the interpreter's start and all imports."""
    return time.monotonic() - float(os.environ[_STARTED])  # one clock for all processes of a machine


def run_worker(module: str, name: str, arguments: dict[str, Any], scratch_root: Path) -> dict[str, Any]:
    """Runs `python -m module name` with `arguments` in its own process, with its own caches.

    Args:
        scratch_root: where the worker's folder for caches and results is created; it is removed at the end.

    Returns:
        The worker's report, with `wall_s` (its start to its end) and `peak_mib`: the larger of the kernel's peak of the
        process and the largest sampled sum over the process tree (PSS: shared pages are divided among the processes);
        `private_mib` is the part of that sum that is not backed by files.

    Raises:
        RuntimeError: the worker failed; the message has the end of its output.
    """
    with tempfile.TemporaryDirectory(prefix="bench_", dir=scratch_root) as scratch:
        result = Path(scratch) / "result.json"
        environment = {k: v for k, v in os.environ.items() if k not in ("TOKENIZERS_PARALLELISM", "RAYON_NUM_THREADS")}
        environment |= {"HF_HUB_OFFLINE": "1", "HF_HOME": f"{scratch}/hf", "HF_DATASETS_CACHE": f"{scratch}/datasets"}
        command = [sys.executable, "-m", module, name, json.dumps(arguments), str(result), scratch]
        started = time.monotonic()
        environment[_STARTED] = str(started)
        with open(f"{scratch}/output.txt", "w+") as output:
            process = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=output, stderr=output)
            tree = _TreeMemory(process.pid)
            code = process.wait()
            wall = time.monotonic() - started
            seen, private = tree.stop()
            output.seek(0)
            if code or not result.exists():
                raise RuntimeError(f"{name} ended with exit code {code}:\n{output.read()[-3000:]}")
        report = json.loads(result.read_text())
    peak = max(seen, report["own_peak_mib"])
    return {**report, "wall_s": wall, "peak_mib": peak, "private_mib": private}


def run_as_worker(workers: Mapping[str, Callable[[dict[str, Any]], dict[str, Any]]]) -> None:
    """Runs the worker that `run_worker` named on the command line, and writes its report."""
    name, given, result, scratch = sys.argv[1:]
    arguments = {**json.loads(given), "scratch": scratch}
    if arguments.get("device") == "cpu":
        os.environ["CUDA_VISIBLE_DEVICES"] = ""  # read when torch is imported, which has not happened yet
    report = workers[name](arguments)
    report["own_peak_mib"] = max(peak_of_this_process(), report.pop("child_peak_mib", 0.0))
    Path(result).write_text(json.dumps(report))


class _TreeMemory:
    """Samples the memory of a process and its children, in a thread."""

    def __init__(self, pid: int) -> None:
        self._process = psutil.Process(pid)
        self._most = self._most_private = 0.0
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()

    def stop(self) -> tuple[float, float]:
        """Stops, and returns the largest sums in MiB: all memory, and the part that is not backed by files."""
        self._done.set()
        self._thread.join()
        return self._most, self._most_private

    def _watch(self) -> None:
        while not self._done.wait(_EVERY):
            try:
                tree = [self._process, *self._process.children(recursive=True)]
            except psutil.Error:
                continue
            sums = [_shares(process.pid) for process in tree]
            self._most = max(self._most, sum(all_of_it for all_of_it, _ in sums))
            self._most_private = max(self._most_private, sum(private for _, private in sums))


def _shares(pid: int) -> tuple[float, float]:
    """Returns the PSS of a process in MiB, and the part of it that is not backed by files; 0 where it is unknown."""
    try:
        text = Path(f"/proc/{pid}/smaps_rollup").read_text()
    except OSError:  # the process has just ended, or this is not Linux
        return 0.0, 0.0
    found = {key: int(kib) / 1024 for key, kib in re.findall(r"^(Pss|Pss_Anon):\s+(\d+)", text, re.MULTILINE)}
    return found.get("Pss", 0.0), found.get("Pss_Anon", 0.0)


def median(reports: list[dict[str, Any]], key: str) -> float:
    """Returns the median of one figure over the rounds."""
    return statistics.median(report[key] for report in reports)


def speed(reports: list[dict[str, Any]]) -> float:
    """Returns the median tokens per second."""
    return statistics.median(report["tokens"] / report["seconds"] for report in reports)


def speed_and_range(reports: list[dict[str, Any]]) -> tuple[str, str]:
    """Returns the median tokens per second, and the slowest and the fastest, as text."""
    speeds = sorted(speed([report]) for report in reports)
    return f"{speed(reports):,.0f}", f"{speeds[0]:,.0f}–{speeds[-1]:,.0f}"


def added_memory(reports: list[dict[str, Any]]) -> float:
    """Returns the median MiB that the work added to the peak: without libraries and tokenizer."""
    return statistics.median(report["peak_mib"] - report["ready_mib"] for report in reports)


def machine(packages: Sequence[str]) -> dict[str, Any]:
    """Returns what the figures depend on: processor, cores, memory, and the versions of installed packages."""
    try:
        named = re.search(r"model name\s*:\s*(.+)", Path("/proc/cpuinfo").read_text())
    except OSError:
        named = None
    versions = {"python": platform.python_version()}
    for package in packages:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return {
        "cpu": named[1].strip() if named else platform.processor() or platform.machine(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "memory_gib": round(psutil.virtual_memory().total / 1024**3, 1),
        "system": f"{platform.system()} {platform.machine()}",
        "versions": versions,
    }


def describe_machine(facts: dict[str, Any]) -> str:
    """Formats `machine`'s facts in one line."""
    versions = ", ".join(f"{name} {version}" for name, version in facts["versions"].items())
    return f"{facts['cpu']}, {facts['cores']} cores, {facts['memory_gib']} GiB, {facts['system']}; {versions}."
