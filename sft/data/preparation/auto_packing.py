"""What `packing: auto` decides, once the length of every sample is known."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

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
