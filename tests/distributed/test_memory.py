"""How much memory is held, was held at the peak, and may be used, as read from files of the kernel made here."""

from __future__ import annotations

import resource
from pathlib import Path

import pytest
import torch

from sft.distributed import memory
from sft.distributed.memory import cgroup_limits, held_bytes, memory_limit, peak_bytes, peak_memory_gb, reset_peak

CPU = torch.device("cpu")
PAGE = resource.getpagesize()
VIRTUAL, RESIDENT = 5000 * PAGE, 3000 * PAGE
AVAILABLE = 8_000_000 * 1024


def write_files(folder: Path, files: dict[str, str]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in files.items():
        (folder / name).write_text(text)


@pytest.fixture
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with a `/proc` and with control groups, of which none limits this process."""
    status = {"status": "VmPeak:\t99 kB\nVmHWM:\t  20000 kB\nVmRSS:\t12000 kB\n", "statm": "5000 3000 100 1 0 50 0\n"}
    write_files(tmp_path / "proc/self", {**status, "cgroup": "0::/job\n"})
    write_files(tmp_path / "proc", {"meminfo": "MemTotal:  9000000 kB\nMemAvailable:   8000000 kB\n"})
    limits = {"memory.max": "max\n", "memory.current": "900\n", "memory.stat": "inactive_file 0\n"}
    write_files(tmp_path / "groups/job", limits)
    monkeypatch.setattr(memory, "PROC", tmp_path / "proc")
    monkeypatch.setattr(memory, "CGROUPS", tmp_path / "groups")
    monkeypatch.setattr(resource, "getrlimit", lambda _: (resource.RLIM_INFINITY,) * 2)
    return tmp_path


@pytest.mark.usefixtures("machine")
def test_the_resident_memory_and_its_peak_are_the_kernels() -> None:
    assert held_bytes(CPU) == RESIDENT
    assert peak_bytes(CPU) == 20000 * 1024
    assert peak_memory_gb(CPU) == 20000 * 1024 / 2**30


def test_the_peak_is_reset_by_the_kernel(machine: Path) -> None:
    reset_peak(CPU)
    assert (machine / "proc/self/clear_refs").read_text() == "5"


def test_where_the_peak_cannot_be_reset_nothing_happens(machine: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "PROC", machine / "nowhere")
    reset_peak(CPU)
    assert not (machine / "nowhere").exists()


def test_this_machine_has_such_files() -> None:
    reset_peak(CPU)
    assert held_bytes(CPU) > 0
    assert peak_bytes(CPU) > 0
    assert memory_limit(CPU) > 0


@pytest.mark.usefixtures("machine")
def test_processes_share_what_is_available() -> None:
    assert memory_limit(CPU) == RESIDENT + AVAILABLE
    assert memory_limit(CPU, processes=4) == RESIDENT + AVAILABLE // 4


def test_the_narrowest_control_group_is_shared(machine: Path) -> None:
    write_files(machine / "groups/job", {"memory.max": "1000900\n"})
    assert memory_limit(CPU, processes=4) == RESIDENT + 250_000


@pytest.mark.usefixtures("machine")
def test_a_limit_of_the_address_space_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    limits = {resource.RLIMIT_AS: (VIRTUAL + 2**26, resource.RLIM_INFINITY)}
    monkeypatch.setattr(resource, "getrlimit", limits.__getitem__)
    assert memory_limit(CPU) == RESIDENT + 2**26
    limits[resource.RLIMIT_AS] = (VIRTUAL - 1, resource.RLIM_INFINITY)
    assert memory_limit(CPU) == RESIDENT


def test_a_control_group_and_all_above_it_bind(tmp_path: Path) -> None:
    """Version 2; page cache that can be dropped is not in use."""
    root = tmp_path / "groups"
    stat = {"memory.stat": "anon 5\ninactive_file 100\n"}
    write_files(root / "a/b", {"memory.max": "max\n", "memory.current": "700\n", **stat})
    write_files(root / "a", {"memory.max": "5000\n", "memory.current": "900\n", **stat})
    write_files(root, {"memory.max": "9000\n", "memory.current": "3000\n", **stat})
    (tmp_path / "cgroup").write_text("0::/a/b\n")
    assert cgroup_limits(root, tmp_path / "cgroup") == [(5000, 800), (9000, 2900)]


def test_the_older_version_of_control_groups_is_read(tmp_path: Path) -> None:
    root = tmp_path / "groups"
    stat = {"memory.stat": "inactive_file 7\ntotal_inactive_file 50\n"}
    unlimited = {"memory.limit_in_bytes": "9223372036854771712\n", "memory.usage_in_bytes": "900\n", **stat}
    write_files(root / "memory", unlimited)
    write_files(root / "memory/a", {**unlimited, "memory.limit_in_bytes": "4000\n"})
    (tmp_path / "cgroup").write_text("9:name=systemd:/\n4:cpu,memory:/a\n1:cpu:/b\n")
    assert cgroup_limits(root, tmp_path / "cgroup") == [(4000, 850)]


def test_without_control_groups_there_is_no_limit(tmp_path: Path) -> None:
    assert cgroup_limits(tmp_path, tmp_path / "cgroup") == []
