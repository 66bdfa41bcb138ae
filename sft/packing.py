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
    bins: list[list[int]] = []
    by_room: dict[int, list[int]] = {}  # room left -> bins with just that room
    rooms = 0  # bit r is set when by_room[r] is not empty, so that the tightest fit is one shift away
    at = 0
    while at < len(order):
        length = int(lengths[order[at]])
        end = at + int(np.searchsorted(-lengths[order[at:]], -length, side="right"))
        items = order[at:end].tolist()
        at = end
        while items:
            fitting = rooms >> length
            if fitting:
                room = length + (fitting & -fitting).bit_length() - 1
                open_bins = by_room[room]
            else:
                room = capacity
                open_bins = list(range(len(bins), len(bins) + -(-len(items) // (capacity // length))))
                bins.extend([] for _ in open_bins)
            take = min(len(items), len(open_bins))
            # Fill each bin as often as best fit would: while it stays the tightest one that the length fits into.
            for bin_number in open_bins[:take]:
                bins[bin_number].append(items.pop())
            rest, moved = open_bins[take:], open_bins[:take]
            rooms = _set(by_room, rooms, room, rest)
            rooms = _set(by_room, rooms, room - length, by_room.get(room - length, []) + moved)
    return [np.array(b, dtype=np.int64) for b in bins]


def _set(by_room: dict[int, list[int]], rooms: int, room: int, bins: list[int]) -> int:
    by_room[room] = bins
    return rooms | (1 << room) if bins and room else rooms & ~(1 << room)


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
