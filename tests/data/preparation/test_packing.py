"""Bins as full as best-fit decreasing makes them, and rows that hold every token once."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sft.data.preparation.packing import best_fit_decreasing, pack


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


def test_a_hundred_thousand_rows_fill_nearly_all():
    """The mix that trainers are compared by: log-normal lengths of mean 196 in rows of 2,048."""
    rng = np.random.default_rng(0)
    lengths = rng.lognormal(np.log(196) - 0.5 * 0.8**2, 0.8, 100_000).astype(np.int64).clip(8, 2048)
    bins = best_fit_decreasing(lengths, 2048)
    assert lengths.sum() / (len(bins) * 2048) > 0.998


def test_bins_become_a_layout_of_documents_in_rows():
    layout = pack(np.array([4, 9, 1, 6, 5, 5]), "bfd", 10)
    assert layout.order is not None
    assert layout.order.tolist() == [1, 2, 3, 0, 4, 5]
    assert layout.lengths.tolist() == [9, 1, 6, 4, 5, 5]
    assert layout.counts.tolist() == [2, 2, 2]
    assert layout.row_lengths.tolist() == [10, 10, 10]


def test_a_document_that_is_named_twice_stands_twice():
    layout = pack(np.array([4, 9, 1]), "bfd", 10, order=np.array([0, 2, 0]))
    assert layout.order is not None
    assert layout.order.tolist() == [0, 0, 2]
    assert layout.row_lengths.tolist() == [9]
    alone = pack(np.array([4, 9, 1]), None, 10, order=np.array([2, 2]))
    assert (alone.lengths.tolist(), alone.counts.tolist()) == ([1, 1], [1, 1])


@given(st.lists(st.integers(1, 12), min_size=1, max_size=30))
@settings(max_examples=200, deadline=None)
def test_packing_loses_and_doubles_no_document(lengths):
    layout = pack(np.array(lengths), "bfd", 12)
    assert layout.order is not None
    assert sorted(layout.order.tolist()) == list(range(len(lengths)))
    assert layout.lengths.tolist() == [lengths[i] for i in layout.order]
    assert layout.counts.sum() == len(lengths)
    assert layout.counts.min() >= 1
    assert layout.row_lengths.max() <= 12
    assert layout.row_lengths.sum() == sum(lengths)


def test_a_stream_is_cut_where_a_row_is_full():
    layout = pack(np.array([3, 4, 1]), "wrapped", 5)
    # The second document goes on in the second row as one of its own.
    assert (layout.lengths.tolist(), layout.counts.tolist(), layout.order) == ([3, 2, 2, 1], [2, 2], None)
    assert layout.row_lengths.tolist() == [5, 3]
    long = pack(np.array([11, 1]), "wrapped", 5)
    assert (long.lengths.tolist(), long.counts.tolist()) == ([5, 5, 1, 1], [1, 1, 2])


@given(st.lists(st.integers(1, 30), min_size=1, max_size=20), st.integers(2, 12))
@settings(max_examples=200, deadline=None)
def test_wrapping_keeps_the_stream_and_every_seam_in_it(lengths, capacity):
    layout = pack(np.array(lengths), "wrapped", capacity)
    full, last = divmod(sum(lengths), capacity)
    assert layout.row_lengths.tolist() == [capacity] * full + [last] * (last > 0)
    ends = set(np.cumsum(layout.lengths).tolist())
    assert ends == set(np.cumsum(lengths).tolist()) | set(range(capacity, sum(lengths), capacity))
    assert layout.counts.sum() == len(layout.lengths)
