"""Collectives over real gloo ranks, and what they return without a process group."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from sft.distributed.collectives import (
    barrier,
    current_rank,
    from_first_rank,
    gather_objects,
    is_distributed,
    max_over_ranks,
    sum_over_ranks,
)
from tests.ranks import spawn_ranks

RANKS = 3


def test_without_a_group_each_returns_its_argument() -> None:
    assert not dist.is_initialized()
    assert not is_distributed()
    assert current_rank() == 0
    barrier()
    tensor = torch.tensor([1, 2])
    total = sum_over_ranks(tensor)
    assert total.tolist() == [1, 2]
    assert total.data_ptr() != tensor.data_ptr()
    assert max_over_ranks([0.1, -2.0]) == [0.1, -2.0]
    assert from_first_rank(0.1) == 0.1
    assert gather_objects({"a": 1}) == [{"a": 1}]


def test_the_sum_belongs_to_no_graph() -> None:
    total = sum_over_ranks(torch.ones(2, requires_grad=True))
    assert not total.requires_grad


def _collect(rank: int, folder: Path) -> None:
    counts = torch.tensor([2**24 + 1, rank])
    sums = torch.tensor([2.0**24 + 1, 0.5], dtype=torch.float64, requires_grad=True)
    found = {
        "distributed": is_distributed(),
        "rank": current_rank(),
        "counts": sum_over_ranks(counts).tolist(),
        "sums": sum_over_ranks(sums).tolist(),
        "scalar": sum_over_ranks(torch.tensor(rank)).item(),
        "largest": max_over_ranks([float(rank), -float(rank), 0.1 * rank]),
        "first": from_first_rank(0.1 + rank),
        "objects": gather_objects({"rank": rank, "file": None if rank else "a.jsonl"}),
    }
    assert counts.tolist() == [2**24 + 1, rank], "the argument is changed"
    (folder / f"{rank}.entered").touch()
    barrier()
    found["entered"] = sorted(path.name for path in folder.glob("*.entered"))
    (folder / f"{rank}.json").write_text(json.dumps(found))


@pytest.mark.slow
def test_all_ranks_get_the_same(tmp_path: Path) -> None:
    spawn_ranks(_collect, tmp_path, RANKS)
    results = [json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(RANKS)]
    assert [result.pop("rank") for result in results] == [0, 1, 2]
    expected = {
        "distributed": True,
        "counts": [RANKS * (2**24 + 1), 3],
        "sums": [RANKS * (2.0**24 + 1), 1.5],
        "scalar": 3,
        "largest": [2.0, 0.0, 0.2],
        "first": 0.1,
        "objects": [{"rank": 0, "file": "a.jsonl"}, {"rank": 1, "file": None}, {"rank": 2, "file": None}],
        "entered": ["0.entered", "1.entered", "2.entered"],
    }
    assert results == [expected] * RANKS


def _collect_alone(_rank: int, folder: Path) -> None:
    assert dist.is_initialized()
    assert not is_distributed()
    assert (current_rank(), gather_objects(7), from_first_rank(0.5)) == (0, [7], 0.5)
    (folder / "done").touch()


@pytest.mark.slow
def test_a_group_of_one_is_not_distributed(tmp_path: Path) -> None:
    spawn_ranks(_collect_alone, tmp_path, 1)
    assert (tmp_path / "done").exists()
