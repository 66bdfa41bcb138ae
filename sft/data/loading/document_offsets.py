"""Where the documents of a batch stand when all its tokens are laid end to end in one row."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate

import torch


@dataclass(frozen=True)
class DocumentOffsets:
    """The documents of one flattened row.

        lengths     3       2    4
        tokens      a a a | b b | c c c c
        cu_seqlens  0       3     5       9

    The lengths stay on the host, so that nobody reads them back from the device; the offsets travel with the batch.

    Attributes:
        lengths: tokens of each document, all positive.
        cu_seqlens: (documents + 1,) int32, where each starts, and the end of the last.
    """

    lengths: tuple[int, ...]
    cu_seqlens: torch.Tensor

    @classmethod
    def of(cls, lengths: Sequence[int]) -> DocumentOffsets:
        """The boundaries of documents of these lengths, on the host."""
        return cls(tuple(lengths), torch.tensor([0, *accumulate(lengths)], dtype=torch.int32))

    @cached_property
    def max_length(self) -> int:
        """Tokens of the longest document."""
        return max(self.lengths)

    @property
    def tokens(self) -> int:
        """Tokens of the row."""
        return sum(self.lengths)

    @cached_property
    def offsets(self) -> torch.Tensor:
        """`cu_seqlens` in the host's memory, made once a batch for all layers."""
        return self.cu_seqlens if self.cu_seqlens.device.type == "cpu" else DocumentOffsets.of(self.lengths).cu_seqlens

    def to(self, device: torch.device | str, non_blocking: bool = False) -> DocumentOffsets:
        """The same with the offsets on `device`; itself where they are there already.

        Accelerate calls it as it calls a tensor's. The Trainer calls `to` of tensors alone, so that
        `row_order.RowOrder` does it for batches that do not come through accelerate.
        """
        moved = self.cu_seqlens.to(device, non_blocking=non_blocking)
        return self if moved is self.cu_seqlens else DocumentOffsets(self.lengths, moved)

    def pin_memory(self) -> DocumentOffsets:
        """The same with the offsets in page-locked memory; the DataLoader calls it."""
        return DocumentOffsets(self.lengths, self.cu_seqlens.pin_memory())
