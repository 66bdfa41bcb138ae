"""Several documents in one row of `max_seq_length` tokens, so that no step computes padding.

    input_ids     a a a | b b | c c c c
    labels        . a a | . b | . c c c      each document's first token is not trained: nothing predicts it
    position_ids  0 1 2 | 0 1 | 0 1 2 3      restart with each document; attention isolates documents by them

`best_fit_decreasing` takes the lengths of the whole data set at once. Johnson's best-fit decreasing needs at most
11/9 of the optimal number of rows plus a constant (D. S. Johnson, "Near-optimal bin packing algorithms", 1973); on
real lengths it fills nearly all of each row.
"""

from __future__ import annotations

import numpy as np


def best_fit_decreasing(lengths: np.ndarray, capacity: int) -> list[np.ndarray]:
    """Puts items into as few bins as best-fit decreasing does.

    Bins with the same room left are alike, so all items of one length move together: the work depends on the number
    of distinct lengths and of rooms, not on the number of items.

    Args:
        lengths: (N,) tokens of each item, each in 1..capacity.
        capacity: tokens a bin holds.

    Returns:
        For each bin the indices of its items; each index stands in exactly one bin. Deterministic.

    Raises:
        ValueError: an item is longer than `capacity` or has no length.
    """
    if len(lengths) == 0:
        return []
    if lengths.min() < 1 or lengths.max() > capacity:
        raise ValueError(f"lengths must lie in 1..{capacity}, got {lengths.min()}..{lengths.max()}")
    order = np.argsort(-lengths, kind="stable")
    descending = -lengths[order]
    bins: list[list[int]] = []
    by_room: dict[int, list[int]] = {}  # room left -> bins with just that room
    rooms = 0  # bit r is set when r is in by_room, so that the tightest fit is one shift away
    at = 0
    while at < len(order):
        length = -int(descending[at])
        end = at + int(np.searchsorted(descending[at:], -length, side="right"))
        items = order[at:end].tolist()
        at = end
        while items:
            fitting = rooms >> length
            if fitting:
                room = length + (fitting & -fitting).bit_length() - 1
                open_bins = by_room.pop(room)
                rooms &= ~(1 << room)
            else:
                room = capacity
                open_bins = list(range(len(bins), len(bins) + -(-len(items) // (capacity // length))))
                bins.extend([] for _ in open_bins)
            # A bin that has got an item is the tightest one for the next: each is filled before another is begun.
            each = room // length
            filled = min(len(open_bins), len(items) // each)
            for number, bin_number in enumerate(open_bins[:filled]):
                bins[bin_number] += items[number * each : (number + 1) * each]
            items, begun = items[filled * each :], open_bins[filled : filled + 1]
            rooms |= _add(by_room, room - each * length, open_bins[:filled])
            if items and begun:
                bins[begun[0]] += items
                rooms |= _add(by_room, room - len(items) * length, begun)
                items, filled = [], filled + 1
            rooms |= _add(by_room, room, open_bins[filled:])
    return [np.array(b, dtype=np.int64) for b in bins]


def _add(by_room: dict[int, list[int]], room: int, bins: list[int]) -> int:
    """Notes bins with `room` left; returns the bit to set for them."""
    if not bins or not room:
        return 0
    by_room.setdefault(room, []).extend(bins)
    return 1 << room


def pack_rows(
    input_ids: list[np.ndarray], labels: list[np.ndarray], bins: list[np.ndarray]
) -> list[dict[str, np.ndarray]]:
    """Joins the documents of each bin.

    Returns:
        For each bin `input_ids`, `labels`, `position_ids` (T,) and `seq_lengths` (documents,), T at most the capacity.
    """
    rows = []
    for members in bins:
        lengths = np.array([len(input_ids[i]) for i in members], dtype=np.int32)
        rows.append(
            {
                "input_ids": np.concatenate([input_ids[i] for i in members]),
                "labels": np.concatenate([labels[i] for i in members]),
                "position_ids": np.concatenate([np.arange(n, dtype=np.int32) for n in lengths]),
                "seq_lengths": lengths,
            }
        )
    return rows


def wrap(input_ids: list[np.ndarray], labels: list[np.ndarray], capacity: int) -> list[dict[str, np.ndarray]]:
    """Joins all documents into one stream and cuts it every `capacity` tokens: for pretraining text.

    A document that is cut goes on in the next row as a document of its own, its first token there untrained. The
    stream's last, shorter row is kept.
    """
    stream_ids, stream_labels = np.concatenate(input_ids), np.concatenate(labels)
    ends = np.cumsum([len(ids) for ids in input_ids])
    rows = []
    for start in range(0, len(stream_ids), capacity):
        stop = min(start + capacity, len(stream_ids))
        inner = ends[np.searchsorted(ends, start, side="right") : np.searchsorted(ends, stop, side="left")]
        lengths = np.diff([start, *inner, stop]).astype(np.int32)
        row_labels = stream_labels[start:stop].copy()
        row_labels[:1] = -100
        rows.append(
            {
                "input_ids": stream_ids[start:stop],
                "labels": row_labels,
                "position_ids": np.concatenate([np.arange(n, dtype=np.int32) for n in lengths]),
                "seq_lengths": lengths,
            }
        )
    return rows
