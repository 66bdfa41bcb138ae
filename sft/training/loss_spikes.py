"""Detects loss spikes and reports them with the rows of their step.

Each step's loss stays on the device until a log is due, when all are read at once. A loss is a spike if it is far above
the median of the losses before it, both in units of their deviation and as a share of the median. The median and the
median absolute deviation are hardly moved by the outliers that they are to find (Huber, Robust Statistics, 1981,
chapter 5).
"""

from __future__ import annotations

import math
import statistics
from collections import deque
from dataclasses import dataclass, replace

import torch

from sft.distributed.collectives import gather_objects, sum_over_ranks

_WINDOW = 64  # steps that a loss is compared with
_QUIET = 20  # first steps, which are never spikes: the loss falls fast and its deviation is not known
# A spike is more than this many deviations above the median, and more than this share of the median above it.
_DEVIATIONS, _SHARE = 10.0, 0.3
_NORMAL = 1.4826  # standard deviation of a normal distribution divided by its median absolute deviation


@dataclass(frozen=True, slots=True)
class Spike:
    """A loss far above those before it.

    Attributes:
        step: counted from 1.
        loss: of this step, in nats per token.
        median, deviation: of the losses before it; the deviation is scaled to a normal distribution's.
        rows: numbers of the step's training rows on all ranks; empty if the rows have none.
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
    """Watches the loss of each optimizer step. Its history is not saved: a resumed run starts with an empty window."""

    def __init__(self) -> None:
        self._before: deque[float] = deque(maxlen=_WINDOW)
        self._is_high = False
        self._unread: list[tuple[int, torch.Tensor, list[torch.Tensor]]] = []

    def note(self, step: int, sums: torch.Tensor, rows: list[torch.Tensor]) -> None:
        """Keeps one step's sums until `read`.

        Args:
            step: counted from 1.
            sums: (2,) summed loss and number of this rank's supervised tokens; it is copied.
            rows: numbers of the training rows of each micro-batch, -1 for rows without one.
        """
        self._unread.append((step, sums.double().clone(), rows))

    def read(self) -> list[Spike]:
        """Returns the spikes since the last call, with one transfer from the device; a collective."""
        unread, self._unread = self._unread, []
        if not unread:
            return []
        sums = sum_over_ranks(torch.stack([sums for _, sums, _ in unread]))  # (steps, 2)
        spikes = []
        for (step, _, rows), (loss, tokens) in zip(unread, sums.tolist(), strict=True):
            spike = self.observe(step, loss / tokens) if tokens else None
            if spike:
                numbers = sorted({int(row) for each in rows for row in each.tolist() if row >= 0})
                everywhere = gather_objects(numbers)  # all ranks see the same spikes
                spikes.append(replace(spike, rows=tuple(sorted(row for found in everywhere for row in found))))
        return spikes

    def observe(self, step: int, loss: float) -> Spike | None:
        """Adds one step's loss; returns a spike if it is high and the loss before it was not.

        A loss that stays high is reported once and no longer counts as high once it fills half the window.
        """
        if not math.isfinite(loss):
            return None
        before = list(self._before)
        self._before.append(loss)
        if len(before) < _QUIET:
            return None
        median = statistics.median(before)
        deviation = _NORMAL * statistics.median(abs(value - median) for value in before)
        was_high = self._is_high
        self._is_high = loss - median > max(_DEVIATIONS * deviation, _SHARE * median)
        return Spike(step, loss, median, deviation) if self._is_high and not was_high else None
