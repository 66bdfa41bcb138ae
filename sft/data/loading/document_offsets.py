"""Offsets of the documents of a batch whose tokens are concatenated into one sequence."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate

import torch


@dataclass(frozen=True)
class DocumentOffsets:
    """Lengths and offsets of the documents in one flattened sequence.

        lengths     3       2    4
        tokens      a a a | b b | c c c c
        cu_seqlens  0       3     5       9

    The lengths stay on the host, so nothing reads them back from the device; the offsets move with the batch.

    Attributes:
        lengths: tokens of each document, all positive.
        cu_seqlens: (documents + 1,) int32, the start of each, and the end of the last.
    """

    lengths: tuple[int, ...]
    cu_seqlens: torch.Tensor

    @classmethod
    def of(cls, lengths: Sequence[int]) -> DocumentOffsets:
        """Computes the offsets of documents of these lengths, on the host."""
        return cls(tuple(lengths), torch.tensor([0, *accumulate(lengths)], dtype=torch.int32))

    @cached_property
    def max_length(self) -> int:
        """Tokens of the longest document."""
        return max(self.lengths)

    @property
    def tokens(self) -> int:
        """Tokens of the sequence."""
        return sum(self.lengths)

    @cached_property
    def offsets(self) -> torch.Tensor:
        """`cu_seqlens` in the host's memory, computed once per batch for all layers."""
        return self.cu_seqlens if self.cu_seqlens.device.type == "cpu" else DocumentOffsets.of(self.lengths).cu_seqlens

    def to(self, device: torch.device | str, non_blocking: bool = False) -> DocumentOffsets:
        """Moves the offsets to `device`; returns itself if they are there already.

        Accelerate calls it like that of a tensor. The Trainer calls `to` only of tensors, so
        `SFTTrainer._prepare_input` calls it for batches that do not come through accelerate.
        """
        moved = self.cu_seqlens.to(device, non_blocking=non_blocking)
        return self if moved is self.cu_seqlens else DocumentOffsets(self.lengths, moved)

    def pin_memory(self) -> DocumentOffsets:
        """Copies the offsets to page-locked memory; the DataLoader calls it."""
        return DocumentOffsets(self.lengths, self.cu_seqlens.pin_memory())
