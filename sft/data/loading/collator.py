"""Collates sequences into a batch: flattened into one sequence, or padded for models that need it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from datasets import Dataset

from sft.data.documents import IGNORE_INDEX
from sft.data.loading.document_offsets import DocumentOffsets

FILLER = "filler"
NUMBER = "number"  # index of a sequence in its data set
PACKED = "seq_lengths"  # column of packed sequences: tokens of each document


@dataclass(frozen=True)
class Collator:
    """Joins sequences of `input_ids` and `labels` into tensors.

    Flattened batches have no padding: all documents are concatenated, and attention gets their offsets.

        rows         a a a | b b        flattened    a a a b b      padded    a a a
                                        positions    0 1 2 0 1                b b .

    Padded unpacked sequences get an `attention_mask`. Padded packed ones (with `seq_lengths`) get none: a mask would
    disable the isolation of documents by position, so each padding token is a document of its own.

    Attributes:
        pad_token_id: fills short sequences; it is always masked and never attended to.
        flatten: concatenate all sequences; for a model whose attention isolates documents.
    """

    pad_token_id: int
    flatten: bool = False

    def __call__(self, rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
        """Returns the batch; B = 1 if it is flattened.

        Returns:
            `input_ids`, `labels` (B, T); `lengths` (sequences,), the tokens of each, 0 for a filler;
            `rows` (sequences,), the index of each in its data set, -1 if it has none;
            `trained_positions` (N,), the indices of the supervised tokens in the flattened labels. Flattened batches
            have `position_ids` (1, T) and `documents`, packed ones `position_ids` (B, T), others `attention_mask`
            (B, T).
        """
        batch = self._flat(rows) if self.flatten else self._padded(rows)
        batch["lengths"] = torch.tensor([0 if row.get(FILLER) else len(row["input_ids"]) for row in rows])
        batch["rows"] = torch.tensor([row.get(NUMBER, -1) for row in rows])
        batch["trained_positions"] = (batch["labels"].flatten() != IGNORE_INDEX).nonzero().squeeze(-1)
        return batch

    @staticmethod
    def _flat(rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
        lengths = np.concatenate([row.get(PACKED, [len(row["input_ids"])]) for row in rows]).astype(np.int64)
        joined = {
            name: np.concatenate([row[name] for row in rows]).astype(np.int64) for name in ("input_ids", "labels")
        }
        joined["labels"][np.cumsum(lengths) - lengths] = IGNORE_INDEX  # the token before is of another document
        joined["position_ids"] = position_ids(lengths)
        tensors = {name: torch.from_numpy(array[None]) for name, array in joined.items()}
        return {**tensors, "documents": DocumentOffsets.of(lengths.tolist())}

    def _padded(self, rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
        width = max(len(row["input_ids"]) for row in rows)
        batch = {
            "input_ids": self._stack([row["input_ids"] for row in rows], width, self.pad_token_id),
            "labels": self._stack([row["labels"] for row in rows], width, IGNORE_INDEX),
        }
        batch["labels"][:, 0] = IGNORE_INDEX  # nothing predicts a sequence's first token
        if PACKED in rows[0]:
            batch["position_ids"] = self._stack([position_ids(row[PACKED]) for row in rows], width, 0)
        else:
            masks = [np.ones(len(row["input_ids"]), dtype=np.int64) for row in rows]
            batch["attention_mask"] = self._stack(masks, width, 0)
        return batch

    @staticmethod
    def _stack(rows: list[np.ndarray], width: int, fill: int) -> torch.Tensor:
        stacked = np.full((len(rows), width), fill, dtype=np.int64)
        for target, row in zip(stacked, rows, strict=True):
            target[: len(row)] = row
        return torch.from_numpy(stacked)


class EvenRows(torch.utils.data.Dataset):
    """A data set made divisible by `multiple` with fillers of one masked token.

    Ranks must run the same number of equal batches. Loaders that repeat real sequences for that train and evaluate them
    twice; a filler counts as nothing.
    """

    def __init__(self, rows: Any, multiple: int) -> None:
        self.rows = rows
        self.fillers = -len(rows) % multiple

    def __len__(self) -> int:
        return len(self.rows) + self.fillers

    def __getitem__(self, index: int) -> dict[str, Any]:
        if index >= len(self):
            raise IndexError(index)  # ends iteration by index
        if index < len(self.rows):
            return {**self.rows[index], NUMBER: index}
        first = self.rows[0]
        filler: dict[str, Any] = {"input_ids": first["input_ids"][:1], "labels": np.array([IGNORE_INDEX]), FILLER: True}
        if PACKED in first:
            filler[PACKED] = np.ones(1, dtype=np.int32)
        return filler


def even_multiple(batch_size: int, world_size: int) -> int:
    """Returns what the number of sequences must be a multiple of: with one process the last batch may be smaller."""
    return batch_size * world_size if world_size > 1 else 1


def position_ids(seq_lengths: np.ndarray) -> np.ndarray:
    """Returns the position of each token in its document: (tokens,) int64."""
    starts = np.cumsum(seq_lengths) - seq_lengths
    return np.arange(seq_lengths.sum()) - np.repeat(starts, seq_lengths)


def row_lengths(rows: Dataset) -> np.ndarray:
    """Returns the tokens of each sequence, from the offsets alone: (N,)."""
    column = rows.data.column("input_ids")
    return np.concatenate([np.diff(chunk.offsets.to_numpy()) for chunk in column.chunks])
