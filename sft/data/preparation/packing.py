"""Several documents in one row of `max_seq_length` tokens, so that no step computes padding.

    input_ids     a a a | b b | c c c c
    labels        . a a | . b | . c c c      each document's first token is not trained: nothing predicts it
    seq_lengths   3       2     4            handed on with the row: position_ids restart with each document

`best_fit_decreasing` takes the lengths of the whole data set at once. Johnson's best-fit decreasing needs at most
11/9 of the optimal number of rows plus a constant (D. S. Johnson, "Near-optimal bin packing algorithms", 1973); on
real lengths it fills nearly all of each row.
"""

from __future__ import annotations

from dataclasses import dataclass

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


@dataclass(frozen=True, slots=True)
class PackedLayout:
    """How documents stand in rows.

    Attributes:
        lengths: (M,) tokens of each document, in the order in which they stand; the documents themselves are taken by
            `order`, or stand as they are where `order` is None.
        counts: (rows,) documents of each row.
        order: (M,) indices of documents.
    """

    lengths: np.ndarray
    counts: np.ndarray
    order: np.ndarray | None = None

    @property
    def row_lengths(self) -> np.ndarray:
        """Tokens of each row: (rows,)."""
        return np.add.reduceat(self.lengths, np.cumsum(self.counts) - self.counts) if len(self.counts) else self.counts


def pack(lengths: np.ndarray, packing: str | None, capacity: int, order: np.ndarray | None = None) -> PackedLayout:
    """Arranges documents in rows of at most `capacity` tokens.

    Args:
        lengths: (N,) tokens of each document.
        packing: `bfd`, `wrapped`, or None for one document a row.
        order: (M,) the documents to use, each as often as it stands there; None uses each once.
    """
    used = lengths if order is None else lengths[order]
    if packing == "wrapped":
        return _wrapped(used, capacity, order)
    if packing is None:
        return PackedLayout(used, np.ones(len(used), dtype=np.int64), order)
    bins = best_fit_decreasing(used, capacity)
    counts = np.array([len(b) for b in bins], dtype=np.int64)
    places = np.concatenate(bins) if bins else np.zeros(0, dtype=np.int64)
    return PackedLayout(used[places], counts, places if order is None else order[places])


def _wrapped(lengths: np.ndarray, capacity: int, order: np.ndarray | None) -> PackedLayout:
    """One stream of all documents, cut every `capacity` tokens: for pretraining text.

    A document that is cut goes on in the next row as a document of its own, its first token there untrained. The
    stream's last, shorter row is kept.
    """
    ends = np.cumsum(lengths)
    total = int(ends[-1]) if len(ends) else 0
    cuts = np.union1d(ends, np.arange(capacity, total, capacity))
    pieces = np.diff(cuts, prepend=0)
    counts = np.bincount((cuts - pieces) // capacity) if total else np.zeros(0, dtype=np.int64)
    return PackedLayout(pieces, counts, order)


_STEPS = 50  # optimizer steps that an epoch keeps: with fewer, the learning rate's schedule has hardly a shape


@dataclass(frozen=True, slots=True)
class AutoPacking:
    """What it goes by, besides the lengths.

    Samples that are packed are trained exactly as they are alone, but a step takes more of them. Packing is therefore
    for data that is short of `max_seq_length` and that has steps to spare.

    Attributes:
        obstacle: why samples of this model cannot share a row at no cost; None where they can.
        rows_a_step: rows of an optimizer step over all processes.
    """

    obstacle: str | None = None
    rows_a_step: int = 1

    def choose(self, lengths: np.ndarray, capacity: int) -> tuple[str | None, str]:
        """`bfd` or None, and in words why.

        Args:
            lengths: (N,) tokens of each sample.
            capacity: tokens of a row.
        """
        tokens = int(lengths.sum())
        rows = max(1, -(-tokens // capacity))
        if self.obstacle:
            return None, f"off: {self.obstacle}"
        if len(lengths) < 2 * rows:
            return None, f"off: fewer than two samples would share a row of {capacity:,} tokens"
        if rows < _STEPS * self.rows_a_step:
            each, step = f"{len(lengths) / rows:.0f} samples a row", f"{self.rows_a_step} rows a step"
            return None, f"off: {each} and {step} would leave {max(1, rows // self.rows_a_step)} steps of an epoch"
        return "bfd", f"bfd: {len(lengths):,} samples, some {len(lengths) / rows:.0f} in a row of {capacity:,} tokens"


NEVER = AutoPacking("nothing is known of the model")
