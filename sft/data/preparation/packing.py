"""Packs several documents into one sequence of `max_seq_length` tokens, so that no step computes padding.

    input_ids     a a a | b b | c c c c
    labels        . a a | . b | . c c c      each document's first token is masked: nothing predicts it
    seq_lengths   3       2     4            stored with the sequence: position_ids restart with each document

`best_fit_decreasing` takes the lengths of the whole data set at once. Johnson's best-fit decreasing needs at most
11/9 of the optimal number of bins plus a constant (D. S. Johnson, "Near-optimal bin packing algorithms", 1973); on
real lengths it fills nearly all of each sequence. `AutoPacking` decides whether `packing: auto` uses it.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

_MIN_STEPS = 50  # optimizer steps that an epoch must keep: with fewer, the learning rate's schedule has hardly a shape


@dataclass(frozen=True, slots=True)
class PackedLayout:
    """Which documents each sequence holds, and in which order.

    Attributes:
        lengths: (M,) tokens of each document, in the order of the layout.
        counts: (sequences,) documents of each sequence.
        order: (M,) indices of the documents; None where they keep their order.
    """

    lengths: np.ndarray
    counts: np.ndarray
    order: np.ndarray | None = None

    @property
    def sequence_lengths(self) -> np.ndarray:
        """Tokens of each sequence: (sequences,)."""
        return np.add.reduceat(self.lengths, np.cumsum(self.counts) - self.counts) if len(self.counts) else self.counts


def pack(lengths: np.ndarray, packing: str | None, capacity: int, order: np.ndarray | None = None) -> PackedLayout:
    """Arranges documents in sequences of at most `capacity` tokens.

    Args:
        lengths: (N,) tokens of each document.
        packing: `bfd`, `wrapped`, or None for one document per sequence.
        order: (M,) the documents to use, each as often as it is named; None uses each once.
    """
    used = lengths if order is None else lengths[order]
    if packing == "wrapped":
        return _wrap(used, capacity, order)
    if packing is None:
        return PackedLayout(used, np.ones(len(used), dtype=np.int64), order)
    bins = best_fit_decreasing(used, capacity)
    counts = np.array([len(b) for b in bins], dtype=np.int64)
    places = np.concatenate(bins) if bins else np.zeros(0, dtype=np.int64)
    return PackedLayout(used[places], counts, places if order is None else order[places])


def _wrap(lengths: np.ndarray, capacity: int, order: np.ndarray | None) -> PackedLayout:
    """Cuts the concatenation of all documents every `capacity` tokens: for pretraining text.

    The rest of a document that is cut is a document of its own in the next sequence, where its first token is masked.
    The last, shorter sequence is kept.
    """
    ends = np.cumsum(lengths)
    total = int(ends[-1]) if len(ends) else 0
    cuts = np.union1d(ends, np.arange(capacity, total, capacity))
    pieces = np.diff(cuts, prepend=0)
    counts = np.bincount((cuts - pieces) // capacity) if total else np.zeros(0, dtype=np.int64)
    return PackedLayout(pieces, counts, order)


def best_fit_decreasing(lengths: np.ndarray, capacity: int) -> list[np.ndarray]:
    """Puts items into as few bins as best-fit decreasing does.

    Bins with the same free size are interchangeable, so all items of one length are placed together: the work depends
    on the number of distinct lengths and free sizes, not on the number of items.

    Args:
        lengths: (N,) tokens of each item, each in 1..capacity.
        capacity: tokens that a bin holds.

    Returns:
        For each bin the indices of its items; each index is in exactly one bin. Deterministic.

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
    bins_by_free: dict[int, list[int]] = {}  # free tokens -> bins with exactly that many
    free_sizes = 0  # bit n is set when n is in bins_by_free, so that the tightest fit is one shift away
    at = 0
    while at < len(order):
        length = -int(descending[at])
        end = at + int(np.searchsorted(descending[at:], -length, side="right"))
        items = order[at:end].tolist()
        at = end
        while items:
            fitting = free_sizes >> length
            if fitting:
                free = length + (fitting & -fitting).bit_length() - 1
                open_bins = bins_by_free.pop(free)
                free_sizes &= ~(1 << free)
            else:
                free = capacity
                open_bins = list(range(len(bins), len(bins) + -(-len(items) // (capacity // length))))
                bins.extend([] for _ in open_bins)
            # A bin that got an item is the tightest one for the next: each is filled before the next one is opened.
            per_bin = free // length
            filled = min(len(open_bins), len(items) // per_bin)
            for number, bin_number in enumerate(open_bins[:filled]):
                bins[bin_number] += items[number * per_bin : (number + 1) * per_bin]
            items, partial = items[filled * per_bin :], open_bins[filled : filled + 1]
            free_sizes |= _add(bins_by_free, free - per_bin * length, open_bins[:filled])
            if items and partial:
                bins[partial[0]] += items
                free_sizes |= _add(bins_by_free, free - len(items) * length, partial)
                items, filled = [], filled + 1
            free_sizes |= _add(bins_by_free, free, open_bins[filled:])
    return [np.array(b, dtype=np.int64) for b in bins]


def _add(bins_by_free: dict[int, list[int]], free: int, bins: list[int]) -> int:
    """Adds bins with `free` tokens left; returns the bit to set for them."""
    if not bins or not free:
        return 0
    bins_by_free.setdefault(free, []).extend(bins)
    return 1 << free


@dataclass(frozen=True, slots=True)
class AutoPacking:
    """Decides `packing: auto`.

    A packed sample is trained exactly as it is alone, but a step takes more samples. So packing is for data that is
    much shorter than `max_seq_length` and has steps to spare.

    Attributes:
        obstacle: why this model cannot train packed samples without a cost; None where it can.
        sequences_per_step: sequences of an optimizer step over all processes.
    """

    obstacle: str | None = None
    sequences_per_step: int = 1

    def choose(self, lengths: np.ndarray, capacity: int) -> tuple[str | None, str]:
        """Returns `bfd` or None, and the reason in words, for samples of these `lengths`: (N,) tokens."""
        samples, tokens = len(lengths), int(lengths.sum())
        sequences = max(1, -(-tokens // capacity))
        each = f"{samples / sequences:.0f}"
        if self.obstacle:
            return None, f"off: {self.obstacle}"
        if samples < 2 * sequences:
            return None, f"off: fewer than two samples would share a sequence of {capacity:,} tokens"
        if sequences < _MIN_STEPS * self.sequences_per_step:
            steps = max(1, sequences // self.sequences_per_step)
            sizes = f"{each} samples per sequence and {self.sequences_per_step} sequences per step"
            return None, f"off: {sizes} would leave {steps} steps per epoch"
        return "bfd", f"bfd: {samples:,} samples, about {each} in each sequence of {capacity:,} tokens"


NEVER = AutoPacking("the model is not known")
