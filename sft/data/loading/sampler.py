"""The order of rows, as a pure function of the seed and the epoch: every rank and every restart finds the same."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from torch.utils.data import Sampler

_GROUP = 50  # batches whose rows are sorted by length together: enough to pad little, few enough to stay random


class EpochSampler(Sampler[int]):
    """Each epoch's permutation of the real rows, followed by the fillers.

    Args:
        length: real rows.
        fillers: rows behind them that train nothing (`sft.data.loading.collator.EvenRows`).
        seed: of the order.
        strategy: `random`, `sequential`, or `group_by_length`.
        lengths: tokens of each real row, for `group_by_length`.
        group_rows: rows of one optimizer step over all ranks, for `group_by_length`.
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
        """Chooses the epoch, counted from 0, whose order the next iteration gives."""
        self.epoch = epoch

    def __len__(self) -> int:
        return self._length + self._fillers

    def __iter__(self) -> Iterator[int]:
        yield from self.order().tolist()
        yield from range(self._length, self._length + self._fillers)

    def order(self) -> np.ndarray:
        """The real rows in this epoch's order, (length,)."""
        if self._strategy == "sequential":
            return np.arange(self._length)
        rng = np.random.default_rng([self._seed, self.epoch])
        order = rng.permutation(self._length)
        if self._strategy != "group_by_length" or self._lengths is None:
            return order
        size = self._group_rows * _GROUP
        groups = [order[at : at + size] for at in range(0, self._length, size)]
        ordered = np.concatenate([g[np.argsort(-self._lengths[g], kind="stable")] for g in groups])
        # Whole steps are shuffled again, so that a group's long rows do not all come first.
        whole = len(ordered) // self._group_rows * self._group_rows
        steps = rng.permutation(ordered[:whole].reshape(-1, self._group_rows))
        return np.concatenate([steps.reshape(-1), ordered[whole:]])
