"""Sudden rises of the loss, noted with the rows behind them.

Each step's loss stays on the device until a log is due, when all of them are read at once. One is a spike where it
stands out of the losses before it: far from their median (Huber, Robust Statistics, 1981, chapter 5: median and median
absolute deviation are not moved by what they are to find), both in units of their own scatter and as a share.
"""

from __future__ import annotations

import math
import statistics
from collections import deque
from dataclasses import dataclass

import torch

from sft.distributed.collectives import gather_objects, sum_over_ranks

_NORMAL = 1.4826  # the standard deviation of a normal distribution over its median absolute deviation


@dataclass(frozen=True, slots=True)
class Spike:
    """A loss that stands out.

    Attributes:
        step: counted from 1.
        loss: of this step, in nats a token.
        median, deviation: of the losses before it; the deviation is that of a normal distribution as wide.
        rows: numbers of the step's training rows on all ranks; empty where they have none.
    """

    step: int
    loss: float
    median: float
    deviation: float
    rows: tuple[int, ...] = ()

    def __str__(self) -> str:
        shown = ", ".join(map(str, self.rows[:16])) + (" and more" if len(self.rows) > 16 else "")
        rows = f"; its training rows: {shown}" if self.rows else ""
        return (
            f"step {self.step}: the loss is {self.loss:.4g}, far above the steps before it "
            f"(median {self.median:.4g}, deviation {self.deviation:.2g}){rows}"
        )


class LossSpikes:
    """Watches the loss of each optimizer step. It starts anew with each process: a resumed run watches its first steps.

    Args:
        window: steps that a loss is compared with.
        quiet: steps at the beginning that are never judged: the loss falls fast, and its scatter is not known.
        deviations: how many of them above the median a spike is.
        share: how much of the median it must be above it as well.
    """

    def __init__(self, window: int = 64, quiet: int = 20, deviations: float = 10.0, share: float = 0.3) -> None:
        self._before: deque[float] = deque(maxlen=window)
        self._quiet, self._deviations, self._share = quiet, deviations, share
        self._is_high = False
        self._unread: list[tuple[int, torch.Tensor, list[torch.Tensor]]] = []

    def note(self, step: int, sums: torch.Tensor, rows: list[torch.Tensor]) -> None:
        """Keeps one step's sums until they are read.

        Args:
            step: counted from 1.
            sums: (2,) the summed loss of this rank's trained tokens and their number; it is copied.
            rows: numbers of the training rows of each pass, -1 for rows that have none.
        """
        self._unread.append((step, sums.double().clone(), rows))

    def read(self) -> list[Spike]:
        """The spikes since the last call, in one transfer; every rank must call it, for they add up their sums."""
        unread, self._unread = self._unread, []
        if not unread:
            return []
        sums = sum_over_ranks(torch.stack([sums for _, sums, _ in unread]))  # (steps, 2)
        spikes = []
        for (step, _, rows), (loss, tokens) in zip(unread, sums.tolist(), strict=True):
            spike = self.observe(step, loss / tokens) if tokens else None
            if spike:
                numbers = sorted({int(row) for each in rows for row in each.tolist() if row >= 0})
                everywhere = gather_objects(numbers)  # all ranks see the same losses, and so they meet here
                found = tuple(sorted(row for numbers in everywhere for row in numbers))
                spikes.append(Spike(spike.step, spike.loss, spike.median, spike.deviation, found))
        return spikes

    def observe(self, step: int, loss: float) -> Spike | None:
        """One step's loss; a spike where it is the first of those that stand out.

        A loss that stays high is told once, and becomes the new normal when it fills half the window.
        """
        if not math.isfinite(loss):
            return None
        before = list(self._before)
        self._before.append(loss)
        if len(before) < self._quiet:
            return None
        median = statistics.median(before)
        deviation = _NORMAL * statistics.median(abs(value - median) for value in before)
        was_high = self._is_high
        self._is_high = loss - median > max(self._deviations * deviation, self._share * median)
        return Spike(step, loss, median, deviation) if self._is_high and not was_high else None
