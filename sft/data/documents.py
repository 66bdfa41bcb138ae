"""Token sequences one behind the other in flat arrays: a million documents without a Python object for each.

input_ids  a a a b b c c c c
labels     . a a . b . c c c
lengths    3     2   4
"""

from __future__ import annotations

import mmap
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

IGNORE_INDEX = -100  # the label of a token that is not trained, by PyTorch's and Hugging Face's convention


@dataclass(frozen=True, slots=True)
class Documents:
    """N token sequences.

    Attributes:
        input_ids: (tokens,) int32.
        labels: (tokens,) int32, aligned: `labels[t]` is `input_ids[t]`, or -100 where it is not trained.
        lengths: (N,) int64, tokens of each.
        rows: (N,) int64, the row of the source that each was made of.
    """

    input_ids: np.ndarray
    labels: np.ndarray
    lengths: np.ndarray
    rows: np.ndarray

    @classmethod
    def empty(cls) -> Documents:
        """No documents."""
        return cls(np.zeros(0, np.int32), np.zeros(0, np.int32), np.zeros(0, np.int64), np.zeros(0, np.int64))

    @classmethod
    def join(cls, parts: Sequence[Documents]) -> Documents:
        """The documents of all parts, in order."""
        if len(parts) == 1:
            return parts[0]
        parts = [cls.empty(), *parts]
        return cls(
            np.concatenate([p.input_ids for p in parts]),
            np.concatenate([p.labels for p in parts]),
            np.concatenate([p.lengths for p in parts]),
            np.concatenate([p.rows for p in parts]),
        )

    def __len__(self) -> int:
        return len(self.lengths)

    @property
    def starts(self) -> np.ndarray:
        """Where each document begins: (N,) int64."""
        return np.cumsum(self.lengths) - self.lengths

    def __iter__(self) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Views of each document's input_ids and labels, both (T,)."""
        for start, length in zip(self.starts.tolist(), self.lengths.tolist(), strict=True):
            yield self.input_ids[start : start + length], self.labels[start : start + length]

    def take(self, order: np.ndarray, starts: np.ndarray | None = None) -> Documents:
        """The documents that `order` (M,) names, in that order; each as often as it is named.

        Args:
            starts: `self.starts`, for a caller that takes from the same documents many times.
        """
        starts = self.starts if starts is None else starts
        lengths = self.lengths[order]
        # Token t of the result comes from t places behind the start of its own document.
        shifts = starts[order] - (np.cumsum(lengths) - lengths)
        sources = np.arange(lengths.sum()) + np.repeat(shifts, lengths)
        return Documents(self.input_ids[sources], self.labels[sources], lengths, self.rows[order])

    def leave_to_disk(self) -> None:
        """Gives back the memory of what was read, where the tokens are mapped from disk."""
        for array in (self.input_ids, self.labels):
            if isinstance(array, np.memmap):
                array._mmap.madvise(mmap.MADV_DONTNEED)  # type: ignore[attr-defined]

    def trained(self) -> np.ndarray:
        """Trained tokens of each document: (N,) int64."""
        running = np.concatenate([[0], np.cumsum(self.labels != IGNORE_INDEX)])
        return running[self.starts + self.lengths] - running[self.starts]


class DocumentStore:
    """Documents on disk while they are being made, so that memory does not grow with the data.

    Args:
        folder: where its files go; the caller removes them with the folder.
    """

    _NAMES = ("input_ids", "labels", "lengths", "rows")

    def __init__(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._paths = {name: folder / f"{name}.bin" for name in self._NAMES}
        self._files = {name: path.open("wb") for name, path in self._paths.items()}
        self.count = 0

    def add(self, documents: Documents) -> None:
        """Writes `documents` behind those that are there."""
        for name in self._NAMES:
            self._files[name].write(np.ascontiguousarray(getattr(documents, name)).data)
        self.count += len(documents)

    def read(self) -> Documents:
        """All of them, mapped from disk; nothing can be added any more."""
        for file in self._files.values():
            file.close()
        return Documents(
            _mapped(self._paths["input_ids"], np.int32),
            _mapped(self._paths["labels"], np.int32),
            np.fromfile(self._paths["lengths"], dtype=np.int64),
            np.fromfile(self._paths["rows"], dtype=np.int64),
        )


def _mapped(path: Path, dtype: type) -> np.ndarray:
    if path.stat().st_size == 0:  # an empty file cannot be mapped
        return np.zeros(0, dtype=dtype)
    return np.memmap(path, dtype=dtype, mode="r")
