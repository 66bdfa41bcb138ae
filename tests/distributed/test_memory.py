"""How much memory there is, is held, and was held at the most."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from sft.distributed.memory import _group_limits, held_bytes, memory_limit, peak_bytes, reset_peak
from tests.runs import ROOT

CPU = torch.device("cpu")
BLOCK = 64 * 2**20


def test_the_peak_begins_again_at_what_is_held() -> None:
    reset_peak(CPU)
    before = held_bytes(CPU)
    block = torch.ones(BLOCK, dtype=torch.uint8)
    assert held_bytes(CPU) - before == pytest.approx(BLOCK, rel=0.1)
    del block
    assert peak_bytes(CPU) - before == pytest.approx(BLOCK, rel=0.1)
    reset_peak(CPU)
    assert peak_bytes(CPU) - before < BLOCK / 4


def test_processes_share_what_the_machine_can_give() -> None:
    one, four = memory_limit(CPU), memory_limit(CPU, processes=4)
    held = held_bytes(CPU)
    assert held < four < one
    assert (one - held) / (four - held) == pytest.approx(4, rel=0.1)


def test_a_limit_of_the_address_space_counts() -> None:
    code = (
        "import resource, torch; from sft import memory; cpu = torch.device('cpu')\n"
        "resource.setrlimit(resource.RLIMIT_AS, (memory._address_space() + 2**26,) * 2)\n"
        "print(memory.memory_limit(cpu) - memory.held_bytes(cpu))"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert 0.8 * 2**26 < int(done.stdout) <= 2**26


def write_group(folder: Path, files: dict[str, str]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in files.items():
        (folder / name).write_text(text)


def test_a_control_group_and_all_above_it_bind(tmp_path: Path) -> None:
    """Version 2; page cache that can be dropped is not in use."""
    root = tmp_path / "groups"
    stat = {"memory.stat": "anon 5\ninactive_file 100\n"}
    write_group(root / "a/b", {"memory.max": "max\n", "memory.current": "700\n", **stat})
    write_group(root / "a", {"memory.max": "5000\n", "memory.current": "900\n", **stat})
    write_group(root, {"memory.max": "9000\n", "memory.current": "3000\n", **stat})
    (tmp_path / "cgroup").write_text("0::/a/b\n")
    assert _group_limits(root, tmp_path / "cgroup") == [(5000, 800), (9000, 2900)]


def test_the_older_version_of_control_groups_is_read(tmp_path: Path) -> None:
    root = tmp_path / "groups"
    stat = {"memory.stat": "inactive_file 7\ntotal_inactive_file 50\n"}
    unlimited = {"memory.limit_in_bytes": "9223372036854771712\n", "memory.usage_in_bytes": "900\n", **stat}
    write_group(root / "memory", unlimited)
    write_group(root / "memory/a", {**unlimited, "memory.limit_in_bytes": "4000\n"})
    (tmp_path / "cgroup").write_text("9:name=systemd:/\n4:cpu,memory:/a\n1:cpu:/b\n")
    assert _group_limits(root, tmp_path / "cgroup") == [(4000, 850)]


def test_without_control_groups_there_is_no_limit(tmp_path: Path) -> None:
    assert _group_limits(tmp_path, tmp_path / "cgroup") == []
