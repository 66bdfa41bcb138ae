"""Orders the sequences by the seed and the epoch alone, so every rank and every restart gets the same order."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from torch.utils.data import Sampler

_GROUP_STEPS = 50  # steps that are sorted by length together: enough to pad little, few enough to stay random


class EpochSampler(Sampler[int]):
    """Yields each epoch's permutation of the sequences, then the fillers.

    Args:
        length: number of sequences.
        fillers: number of fillers (`sft.data.loading.collator.EvenRows`).
        strategy: `random`, `sequential`, or `group_by_length`.
        lengths: tokens of each sequence, for `group_by_length`.
        group_rows: sequences of one optimizer step over all ranks, for `group_by_length`.
    """

    def __init__(
        self,
        length: int,
        fillers: int,
        seed: int,
        strategy: str = "random",
        lengths: np.ndarray | None = None,
        group_rows: int = 1,
    ) -> None:
        self._length, self._fillers, self._seed = length, fillers, seed
        self._strategy, self._lengths, self._group_rows = strategy, lengths, group_rows
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Sets the epoch, counted from 0, of the next iteration."""
        self.epoch = epoch

    def __len__(self) -> int:
        return self._length + self._fillers

    def __iter__(self) -> Iterator[int]:
        yield from self.order().tolist()
        yield from range(self._length, self._length + self._fillers)

    def order(self) -> np.ndarray:
        """Returns this epoch's order of the sequences, (length,)."""
        if self._strategy == "sequential":
            return np.arange(self._length)
        rng = np.random.default_rng([self._seed, self.epoch])
        order = rng.permutation(self._length)
        if self._strategy != "group_by_length" or self._lengths is None:
            return order
        size = self._group_rows * _GROUP_STEPS
        groups = [order[at : at + size] for at in range(0, self._length, size)]
        ordered = np.concatenate([g[np.argsort(-self._lengths[g], kind="stable")] for g in groups])
        # Full steps are shuffled again, so that the long sequences of a group do not all come first.
        whole = len(ordered) // self._group_rows * self._group_rows
        steps = rng.permutation(ordered[:whole].reshape(-1, self._group_rows))
        return np.concatenate([steps.reshape(-1), ordered[whole:]])
