"""Prepared data on disk: found again when nothing that matters has changed, made once by whoever comes first.

The ranks of one node (or of several nodes on a shared disk) all ask for the same key. The first to take the lock
prepares; the others wait for the lock, not for a collective, so no process group times out however long it takes.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from datasets import Dataset
from filelock import FileLock

Columns = dict[str, list[np.ndarray]]


def cache_root(cache_dir: str | None) -> Path:
    """Where prepared data lives: `cache_dir`, else $SFT_CACHE, else under the user's cache folder."""
    fallback = Path(os.environ.get("XDG_CACHE_HOME", "~/.cache")) / "sft_pipeline"
    return Path(cache_dir or os.environ.get("SFT_CACHE") or fallback).expanduser()


def cache_key(parts: dict[str, Any], code: list[Path]) -> str:
    """A name for what `parts` (JSON-able) and the source files `code` make."""
    digest = hashlib.blake2b(json.dumps(parts, sort_keys=True, default=str).encode(), digest_size=16)
    for file in sorted(code):
        digest.update(file.read_bytes())
    return digest.hexdigest()


def make_once(folder: Path, make: Callable[[Path], None]) -> bool:
    """Has `make` fill `folder`, unless it is there already; whole or not at all.

    Returns:
        Whether it was there already.
    """
    if folder.is_dir():
        return True
    folder.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{folder}.lock"):
        if folder.is_dir():  # another process made it while this one waited
            return True
        unfinished = folder.parent / f".{folder.name}.unfinished"
        shutil.rmtree(unfinished, ignore_errors=True)  # of a process that was killed while it held the lock
        unfinished.mkdir()
        try:
            make(unfinished)
            unfinished.rename(folder)
        finally:
            shutil.rmtree(unfinished, ignore_errors=True)
    return False


def write_columns(columns: Columns, file: Path) -> None:
    """Writes lists of int32 arrays as an Arrow stream; the arrays of a column are joined, never made Python lists."""
    arrays = {}
    for name, values in columns.items():
        offsets = np.zeros(len(values) + 1, dtype=np.int64)
        np.cumsum([len(v) for v in values], out=offsets[1:])
        flat = np.concatenate(values).astype(np.int32, copy=False) if values else np.zeros(0, dtype=np.int32)
        arrays[name] = pa.LargeListArray.from_arrays(pa.array(offsets), pa.array(flat))
    table = pa.table(arrays)
    with pa.OSFile(str(file), "wb") as sink, pa.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table, max_chunksize=4096)


def read_columns(file: Path) -> Dataset:
    """The columns as a memory-mapped data set whose rows are numpy arrays."""
    return Dataset.from_file(str(file)).with_format("numpy")
