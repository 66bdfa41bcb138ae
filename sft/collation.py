"""From samples to one batch: padded on the right to its longest row, and no further."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from datasets import Dataset

from sft.documents import IGNORE_INDEX

FILLER = "filler"
PACKED = "seq_lengths"  # the column of packed rows: tokens of each document


@dataclass(frozen=True)
class Collator:
    """Joins rows of `input_ids` and `labels` into tensors.

    Unpacked rows get an `attention_mask`. Packed rows (those with `seq_lengths`) get none: a mask would switch off the
    isolation of documents by position, so each padding token stands as a document of its own.

    Attributes:
        pad_token_id: what fills short rows; it is never trained and never attended to.
        pad_to_multiple_of: row length is rounded up to this, 1 for exact; tensor cores like 8.
        flatten: packed rows are joined to one row of B·T tokens, without padding.
    """

    pad_token_id: int
    pad_to_multiple_of: int = 1
    flatten: bool = False

    def __call__(self, rows: Sequence[dict[str, Any]]) -> dict[str, torch.Tensor]:
        """The batch: `input_ids`, `labels` (B, T), `attention_mask` or `position_ids` (B, T), `lengths` (B,).

        `lengths` counts the real tokens of each row; a filler row counts none. Packed rows hand on their boundaries
        as well: `seq_lengths` (B, documents), filled up with zeros.
        """
        is_packed = PACKED in rows[0]
        if is_packed:
            rows = [{**row, "position_ids": positions(row[PACKED])} for row in rows]
        lengths = [len(row["input_ids"]) for row in rows]
        real = [0 if row.get(FILLER) else n for row, n in zip(rows, lengths, strict=True)]
        if self.flatten and is_packed:
            names = ("input_ids", "labels", "position_ids", PACKED)
            joined = {name: np.concatenate([row[name] for row in rows]).astype(np.int64)[None] for name in names}
            return {**{n: torch.from_numpy(a) for n, a in joined.items()}, "lengths": torch.tensor(real)}
        width = -(-max(lengths) // self.pad_to_multiple_of) * self.pad_to_multiple_of
        batch = {
            "input_ids": self._stack([row["input_ids"] for row in rows], width, self.pad_token_id),
            "labels": self._stack([row["labels"] for row in rows], width, IGNORE_INDEX),
        }
        if is_packed:
            batch["position_ids"] = self._stack([row["position_ids"] for row in rows], width, 0)
            batch[PACKED] = self._stack([row[PACKED] for row in rows], max(len(row[PACKED]) for row in rows), 0)
        else:
            batch["attention_mask"] = self._stack([np.ones(n, dtype=np.int64) for n in lengths], width, 0)
        batch["lengths"] = torch.tensor(real)
        return batch

    @staticmethod
    def _stack(rows: list[np.ndarray], width: int, fill: int) -> torch.Tensor:
        stacked = np.full((len(rows), width), fill, dtype=np.int64)
        for target, row in zip(stacked, rows, strict=True):
            target[: len(row)] = row
        return torch.from_numpy(stacked)


class EvenRows(torch.utils.data.Dataset):
    """A data set made divisible by `multiple` with fillers of one untrained token.

    Ranks must run the same number of equal batches. Loaders that repeat real rows for that train and measure them
    twice; a filler weighs nothing.
    """

    def __init__(self, rows: Any, multiple: int) -> None:
        self.rows = rows
        self.fillers = -len(rows) % multiple

    def __len__(self) -> int:
        return len(self.rows) + self.fillers

    def __getitem__(self, index: int) -> dict[str, Any]:
        if index >= len(self):
            raise IndexError(index)  # ends an iteration by index
        if index < len(self.rows):
            return self.rows[index]
        first = self.rows[0]
        filler: dict[str, Any] = {"input_ids": first["input_ids"][:1], "labels": np.array([IGNORE_INDEX]), FILLER: True}
        if PACKED in first:
            filler[PACKED] = np.ones(1, dtype=np.int32)
        return filler


def positions(seq_lengths: np.ndarray) -> np.ndarray:
    """The position of each token in its document: (tokens,) int64."""
    starts = np.cumsum(seq_lengths) - seq_lengths
    return np.arange(seq_lengths.sum()) - np.repeat(starts, seq_lengths)


def row_lengths(rows: Dataset) -> np.ndarray:
    """Tokens of each row, without reading them: (N,)."""
    column = rows.data.column("input_ids")
    return np.concatenate([np.diff(chunk.offsets.to_numpy()) for chunk in column.chunks])
