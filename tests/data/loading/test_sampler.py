"""Each epoch's order depends on the seed and the epoch alone, and has every sequence once."""

from __future__ import annotations

import numpy as np
import pytest

from sft.data.loading.sampler import EpochSampler


def test_every_sequence_once_then_the_fillers() -> None:
    order = list(EpochSampler(10, 2, seed=1))
    assert sorted(order[:10]) == list(range(10))
    assert order[10:] == [10, 11]


def test_the_order_depends_on_the_seed_and_the_epoch() -> None:
    one, two = EpochSampler(100, 0, seed=1), EpochSampler(100, 0, seed=1)
    first = list(one)
    assert first == list(two)
    two.set_epoch(1)
    assert first != list(two)
    assert first != list(EpochSampler(100, 0, seed=2))


def test_sequential_keeps_the_order() -> None:
    assert list(EpochSampler(5, 1, seed=3, strategy="sequential")) == [0, 1, 2, 3, 4, 5]


@pytest.mark.parametrize("length", [1000, 1003])
def test_grouping_by_length_pads_less_and_loses_no_sequence(length: int) -> None:
    lengths = np.random.default_rng(0).integers(1, 500, length)
    grouped = EpochSampler(length, 0, 1, "group_by_length", lengths, group_rows=8)
    order = grouped.order()
    assert sorted(order.tolist()) == list(range(length))

    def padding(rows: np.ndarray) -> int:
        batches = [lengths[rows[at : at + 8]] for at in range(0, length, 8)]
        return sum(int((b.max() - b).sum()) for b in batches)

    assert padding(order) < 0.2 * padding(EpochSampler(length, 0, 1).order())
