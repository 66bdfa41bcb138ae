"""Bins as full as best-fit decreasing makes them, and rows that hold every token once."""

from __future__ import annotations

import time
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sft.packing import best_fit_decreasing, pack_rows, wrap


def naive_rooms(lengths: list[int], capacity: int) -> list[int]:
    """Best-fit decreasing as it is defined, one item at a time: the room left in each bin."""
    rooms: list[int] = []
    for length in sorted(lengths, reverse=True):
        fitting = [room for room in rooms if room >= length]
        if fitting:
            rooms[rooms.index(min(fitting))] -= length
        else:
            rooms.append(capacity - length)
    return sorted(rooms)


@given(st.data(), st.integers(1, 60))
@settings(max_examples=400, deadline=None)
def test_bins_are_those_of_best_fit_decreasing(data, capacity):
    lengths = data.draw(st.lists(st.integers(1, capacity), max_size=60))
    bins = best_fit_decreasing(np.array(lengths, dtype=np.int64), capacity)
    assert sorted(i for b in bins for i in b.tolist()) == list(range(len(lengths)))
    assert all(len(b) for b in bins)
    assert sorted(capacity - sum(lengths[i] for i in b) for b in bins) == naive_rooms(lengths, capacity)


def test_bins_written_out():
    bins = best_fit_decreasing(np.array([4, 9, 1, 6, 5, 5]), 10)
    assert [b.tolist() for b in bins] == [[1, 2], [3, 0], [4, 5]]
    again = best_fit_decreasing(np.array([4, 9, 1, 6, 5, 5]), 10)
    assert [b.tolist() for b in again] == [b.tolist() for b in bins]


def test_no_items_no_bins_and_items_that_fit_no_bin():
    assert best_fit_decreasing(np.array([], dtype=np.int64), 8) == []
    for bad in (0, 9):
        with pytest.raises(ValueError, match=rf"lengths must lie in 1\.\.8, got .*{bad}"):
            best_fit_decreasing(np.array([3, bad]), 8)


def test_a_million_rows_take_seconds_and_fill_nearly_all():
    lengths = np.random.default_rng(0).lognormal(5.5, 0.8, 1_000_000).astype(np.int64).clip(8, 2048)
    started = time.perf_counter()
    bins = best_fit_decreasing(lengths, 2048)
    assert time.perf_counter() - started < 15
    assert lengths.sum() / (len(bins) * 2048) > 0.999


def documents(lengths: list[int]) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """Documents of distinct tokens, the first of each not trained."""
    starts = np.cumsum([100, *lengths])
    ids = [np.arange(start, start + n, dtype=np.int32) for start, n in zip(starts, lengths, strict=False)]
    labels = [one.copy() for one in ids]
    for one in labels:
        one[:1] = -100
    return ids, labels


def positions(lengths: np.ndarray) -> list[int]:
    return [p for n in lengths.tolist() for p in range(n)]


def test_packed_rows_written_out():
    ids, labels = documents([3, 2, 4])
    (row, other) = pack_rows(ids, labels, [np.array([2, 0]), np.array([1])])
    assert row["input_ids"].tolist() == [105, 106, 107, 108, 100, 101, 102]
    assert row["labels"].tolist() == [-100, 106, 107, 108, -100, 101, 102]
    assert row["position_ids"].tolist() == [0, 1, 2, 3, 0, 1, 2]
    assert row["seq_lengths"].tolist() == [4, 3]
    assert other["input_ids"].tolist() == [103, 104]
    assert {column.dtype for column in row.values()} == {np.dtype(np.int32)}


@given(st.lists(st.integers(1, 12), min_size=1, max_size=30))
@settings(max_examples=100, deadline=None)
def test_packing_loses_and_doubles_no_token(lengths):
    ids, labels = documents(lengths)
    rows = pack_rows(ids, labels, best_fit_decreasing(np.array(lengths), 12))
    tokens = Counter(t for row in rows for t in row["input_ids"].tolist())
    assert tokens == Counter(np.concatenate(ids).tolist())
    for row in rows:
        assert len(row["input_ids"]) <= 12
        assert row["position_ids"].tolist() == positions(row["seq_lengths"])
        assert row["labels"].tolist() == [
            -100 if p == 0 else t for p, t in zip(row["position_ids"], row["input_ids"], strict=True)
        ]


def test_wrapped_rows_written_out():
    ids, labels = documents([3, 4, 1])
    first, second = wrap(ids, labels, 5)
    assert first["input_ids"].tolist() == [100, 101, 102, 103, 104]
    assert first["labels"].tolist() == [-100, 101, 102, -100, 104]
    assert first["position_ids"].tolist() == [0, 1, 2, 0, 1]
    assert first["seq_lengths"].tolist() == [3, 2]
    # The second document goes on as one of its own: positions start again, and nothing predicts its first token.
    assert second["input_ids"].tolist() == [105, 106, 107]
    assert second["labels"].tolist() == [-100, 106, -100]
    assert second["position_ids"].tolist() == [0, 1, 0]
    assert second["seq_lengths"].tolist() == [2, 1]


@given(st.lists(st.integers(1, 30), min_size=1, max_size=20), st.integers(2, 12))
@settings(max_examples=150, deadline=None)
def test_wrapping_keeps_the_stream_and_every_seam_in_it(lengths, capacity):
    ids, labels = documents(lengths)
    kept = np.concatenate(labels)
    rows = wrap(ids, labels, capacity)
    assert np.concatenate([row["input_ids"] for row in rows]).tolist() == np.concatenate(ids).tolist()
    assert [len(row["input_ids"]) for row in rows[:-1]] == [capacity] * (len(rows) - 1)
    assert 1 <= len(rows[-1]["input_ids"]) <= capacity
    starts = {int(one[0]) for one in ids}
    for row in rows:
        assert row["seq_lengths"].min() >= 1
        assert row["position_ids"].tolist() == positions(row["seq_lengths"])
        begins = [t for t, p in zip(row["input_ids"].tolist(), row["position_ids"], strict=True) if p == 0]
        assert begins == [t for at, t in enumerate(row["input_ids"].tolist()) if at == 0 or t in starts]
        assert row["labels"].tolist() == [
            -100 if p == 0 else t for p, t in zip(row["position_ids"], row["input_ids"].tolist(), strict=True)
        ]
    assert np.concatenate(labels).tolist() == kept.tolist()  # the documents themselves are left alone
