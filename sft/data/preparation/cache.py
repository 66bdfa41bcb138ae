"""Keeps prepared data on disk: reused while nothing that matters has changed, made once by the first process.

The ranks of one node (or of several nodes on a shared disk) all use the same key. The first to take the lock prepares;
the others wait for the lock, not in a collective, so no process group times out however long it takes.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
from filelock import FileLock

from sft.data.documents import IGNORE_INDEX, Documents
from sft.data.preparation.packing import PackedLayout

if TYPE_CHECKING:
    from datasets import Dataset

_COLUMNS = ("input_ids", "labels", "seq_lengths")
_PART_TOKENS = 1 << 19  # of one record batch, which is what memory holds at a time
_PART_ROWS = 4096


def cache_root(cache_dir: str | None) -> Path:
    """Returns the folder of prepared data: `cache_dir`, else $SFT_CACHE, else under the user's cache folder."""
    fallback = Path(os.environ.get("XDG_CACHE_HOME", "~/.cache")) / "sft_pipeline"
    return Path(cache_dir or os.environ.get("SFT_CACHE") or fallback).expanduser()


def cache_key(parts: dict[str, Any], code: list[Path]) -> str:
    """Hashes everything that decides the result: `parts` (JSON-able) and the source files `code`."""
    digest = hashlib.blake2b(json.dumps(parts, sort_keys=True, default=str).encode(), digest_size=16)
    for file in sorted(code):
        digest.update(file.read_bytes())
    return digest.hexdigest()


def make_once(folder: Path, make: Callable[[Path], None]) -> bool:
    """Calls `make` to fill `folder`, unless it exists; completely or not at all.

    Returns:
        Whether it existed.
    """
    if folder.is_dir():
        return True
    folder.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{folder}.lock"):
        if folder.is_dir():  # another process made it while this one waited for the lock
            return True
        unfinished = folder.parent / f".{folder.name}.unfinished"
        shutil.rmtree(unfinished, ignore_errors=True)  # left by a process that was killed while it held the lock
        unfinished.mkdir()
        try:
            make(unfinished)
            unfinished.rename(folder)
        finally:
            shutil.rmtree(unfinished, ignore_errors=True)
    return False


def write_rows(documents: Documents, layout: PackedLayout, file: Path, *, packed: bool) -> None:
    """Writes the sequences of a data set as an Arrow stream, some documents at a time.

    Columns, all lists of int32: `input_ids` and `labels` of the sequence; if packed, `seq_lengths` with the tokens of
    each of its documents.
    """
    schema = pa.schema({name: pa.large_list(pa.int32()) for name in _COLUMNS[: 3 if packed else 2]})
    document_ends, row_ends = np.cumsum(layout.counts), np.cumsum(layout.sequence_lengths)
    starts = documents.starts
    first_row = first_document = first_token = 0
    with pa.OSFile(str(file), "wb") as sink, pa.ipc.new_stream(sink, schema) as writer:
        while first_row < len(row_ends):
            last_row = max(first_row + 1, int(np.searchsorted(row_ends, first_token + _PART_TOKENS)))
            last_row = min(last_row, first_row + _PART_ROWS, len(row_ends))
            rows = slice(first_row, last_row)
            last_document, last_token = int(document_ends[last_row - 1]), int(row_ends[last_row - 1])
            lengths = layout.lengths[first_document:last_document]
            if layout.order is None:
                ids = np.array(documents.input_ids[first_token:last_token])
                labels = np.array(documents.labels[first_token:last_token])
            else:
                part = documents.take(layout.order[first_document:last_document], starts)
                ids, labels = part.input_ids, part.labels
            labels[np.cumsum(lengths) - lengths] = IGNORE_INDEX  # nothing predicts the first token of a document
            row_offsets = np.append(first_token, row_ends[rows]) - first_token
            arrays = [_lists(row_offsets, ids), _lists(row_offsets, labels)]
            if packed:
                arrays.append(_lists(np.append(first_document, document_ends[rows]) - first_document, lengths))
            writer.write_batch(pa.record_batch(arrays, schema=schema))
            documents.release_pages()
            first_row, first_document, first_token = last_row, last_document, last_token


def _lists(offsets: np.ndarray, values: np.ndarray) -> pa.Array:
    return pa.LargeListArray.from_arrays(pa.array(offsets, pa.int64()), pa.array(values.astype(np.int32, copy=False)))


def read_rows(file: Path) -> Dataset:
    """Maps the sequences from disk as a data set of numpy arrays."""
    from datasets import Dataset  # 45 MiB that preparing does not need

    return Dataset.from_file(str(file)).with_format("numpy")
