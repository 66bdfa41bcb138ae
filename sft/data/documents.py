"""Token sequences concatenated in flat arrays: a million documents without a Python object for each.

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

IGNORE_INDEX = -100  # the label of a masked token, by PyTorch's and Hugging Face's convention
_NAMES = ("input_ids", "labels", "lengths", "rows")  # the arrays of `Documents`


@dataclass(frozen=True, slots=True)
class Documents:
    """N token sequences.

    Attributes:
        input_ids: (tokens,) int32.
        labels: (tokens,) int32, aligned: `labels[t]` is `input_ids[t]`, or -100 where it is masked.
        lengths: (N,) int64, tokens of each document.
        rows: (N,) int64, index of the source row that each was made from.
    """

    input_ids: np.ndarray
    labels: np.ndarray
    lengths: np.ndarray
    rows: np.ndarray

    @classmethod
    def empty(cls) -> Documents:
        """Returns zero documents."""
        return cls(np.zeros(0, np.int32), np.zeros(0, np.int32), np.zeros(0, np.int64), np.zeros(0, np.int64))

    @classmethod
    def join(cls, parts: Sequence[Documents]) -> Documents:
        """Concatenates the documents of all parts, in order."""
        if len(parts) == 1:
            return parts[0]
        return cls(*(np.concatenate([getattr(p, name) for p in [cls.empty(), *parts]]) for name in _NAMES))

    def __len__(self) -> int:
        return len(self.lengths)

    @property
    def starts(self) -> np.ndarray:
        """Offset of each document's first token: (N,) int64."""
        return np.cumsum(self.lengths) - self.lengths

    def __iter__(self) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Yields views of each document's input_ids and labels, both (T,)."""
        for start, length in zip(self.starts.tolist(), self.lengths.tolist(), strict=True):
            yield self.input_ids[start : start + length], self.labels[start : start + length]

    def take(self, order: np.ndarray, starts: np.ndarray | None = None) -> Documents:
        """Returns the documents at the indices `order` (M,), in that order; an index may repeat.

        Args:
            starts: `self.starts`, to compute it once for many calls.
        """
        starts = self.starts if starts is None else starts
        lengths = self.lengths[order]
        # Token t of the result is token t + shift of the source, with one shift for each document.
        shifts = starts[order] - (np.cumsum(lengths) - lengths)
        sources = np.arange(lengths.sum()) + np.repeat(shifts, lengths)
        return Documents(self.input_ids[sources], self.labels[sources], lengths, self.rows[order])

    def release_pages(self) -> None:
        """Releases the memory of the pages that were read, if the tokens are mapped from disk."""
        for array in (self.input_ids, self.labels):
            if isinstance(array, np.memmap):
                array._mmap.madvise(mmap.MADV_DONTNEED)  # type: ignore[attr-defined]

    def count_supervised(self) -> np.ndarray:
        """Counts the supervised tokens of each document: (N,) int64."""
        running = np.concatenate([[0], np.cumsum(self.labels != IGNORE_INDEX)])
        return running[self.starts + self.lengths] - running[self.starts]


class DocumentStore:
    """Writes documents to disk as they are made; memory does not grow with the data.

    Args:
        folder: holds the files; the caller deletes it.
    """

    def __init__(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._paths = {name: folder / f"{name}.bin" for name in _NAMES}
        self._files = {name: path.open("wb") for name, path in self._paths.items()}
        self.count = 0

    def add(self, documents: Documents) -> None:
        """Appends `documents`."""
        for name, file in self._files.items():
            file.write(np.ascontiguousarray(getattr(documents, name)).data)
        self.count += len(documents)

    def read(self) -> Documents:
        """Closes the store and returns all documents, the tokens mapped from disk."""
        for file in self._files.values():
            file.close()
        return Documents(
            _map_file(self._paths["input_ids"], np.int32),
            _map_file(self._paths["labels"], np.int32),
            np.fromfile(self._paths["lengths"], dtype=np.int64),
            np.fromfile(self._paths["rows"], dtype=np.int64),
        )


def _map_file(path: Path, dtype: type) -> np.ndarray:
    if path.stat().st_size == 0:  # an empty file cannot be mapped
        return np.zeros(0, dtype=dtype)
    return np.memmap(path, dtype=dtype, mode="r")
