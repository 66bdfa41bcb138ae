"""Reads rows of Parquet and Arrow files, batch by batch."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from sft.data.sources.file_io import COMPRESSIONS, open_stream
from sft.data.sources.row import Parsed, Row, Rows, Wanted, require_distinct
from sft.errors import Problem, UserError

_BATCH_ROWS = 4096  # rows of a Parquet file read at a time

Batch = tuple[int, Any]
"""The number of rows, and the record batch that holds them, or None when none of them is wanted."""


def read_parquet(file: Path, first: int, wanted: Wanted) -> Rows:
    """Reads Parquet as `text_readers.read_file` does; row groups without a wanted row are not read."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        table = pq.ParquetFile(_open_input(file))
        require_distinct(table.schema_arrow.names, file)
        return (yield from _read_batches(file, _parquet_batches(table, first, wanted), first, wanted))
    except (pa.ArrowException, OSError) as error:
        raise UserError(Problem(f"not Parquet: {error}", file=str(file))) from None


def read_arrow(file: Path, first: int, wanted: Wanted) -> Rows:
    """Reads Arrow's file and stream formats as `text_readers.read_file` does."""
    import pyarrow as pa

    try:
        source = _open_input(file)
        try:
            reader: Any = pa.ipc.open_file(source)
            batches: Any = (reader.get_batch(i) for i in range(reader.num_record_batches))
        except pa.ArrowInvalid:
            source.seek(0)
            reader = batches = pa.ipc.open_stream(source)
        require_distinct(reader.schema.names, file)
        return (yield from _read_batches(file, ((batch.num_rows, batch) for batch in batches), first, wanted))
    except (pa.ArrowException, OSError) as error:
        raise UserError(Problem(f"not an Arrow file: {error}", file=str(file))) from None


def _open_input(file: Path) -> Any:
    import pyarrow as pa

    if file.suffix.lower() not in COMPRESSIONS:
        return pa.memory_map(str(file))
    with open_stream(file) as stream:
        return pa.BufferReader(stream.read())


def _parquet_batches(table: Any, first: int, wanted: Wanted) -> Iterator[Batch]:
    for group in range(table.num_row_groups):
        count = table.metadata.row_group(group).num_rows
        if wanted is None or any(wanted(index) for index in range(first, first + count)):
            for batch in table.iter_batches(_BATCH_ROWS, row_groups=[group]):
                yield batch.num_rows, batch
        else:
            yield count, None
        first += count


def drop_null_keys(value: Any, in_list: bool = False) -> Any:
    """Drops the null keys of objects inside lists.

    Arrow gives every object of a column the keys of all of them, null where an object has no such key: each tool call
    would be trained with the arguments of all others. A table cannot tell a null that was meant, which is dropped too.
    Objects outside of lists keep their keys: they are no part of a conversation, and `columns` may name each key.
    """
    if isinstance(value, dict):
        return {key: drop_null_keys(one, in_list) for key, one in value.items() if one is not None or not in_list}
    if isinstance(value, list) and any(type(one) in (dict, list) for one in value):
        return [drop_null_keys(one, True) for one in value]
    return value


def _read_batches(file: Path, batches: Iterator[Batch], first: int, wanted: Wanted) -> Rows:
    name, start = str(file), first
    for count, batch in batches:
        available = range(count if batch is not None else 0)
        picked = available if wanted is None else [at for at in available if wanted(start + at)]
        if picked:
            chosen = batch if len(picked) == count else batch.take(picked)
            for at, (data, lost) in zip(picked, _parse_batch(chosen), strict=True):
                yield Row(name, start + at, start + at - first + 1, data, lost)
        start += count
    return start - first


def _has_nulls(array: Any, in_list: bool = False) -> bool:
    """Tells whether a column may need `drop_null_keys`, which takes as long as making the rows."""
    import pyarrow as pa

    if pa.types.is_list(array.type) or pa.types.is_large_list(array.type):
        return _has_nulls(array.flatten(), True)
    if pa.types.is_struct(array.type):
        return any((in_list and child.null_count > 0) or _has_nulls(child, in_list) for child in array.flatten())
    return bool(pa.types.is_nested(array.type))


def _parse_batch(batch: Any) -> list[Parsed]:
    try:
        rows = batch.to_pylist()
        return [(data, None) for data in (map(drop_null_keys, rows) if any(map(_has_nulls, batch.columns)) else rows)]
    except (ValueError, OverflowError):  # Arrow validates neither texts nor times: find the invalid rows
        return [_parse_row(batch.slice(at, 1)) for at in range(batch.num_rows)]


def _parse_row(row: Any) -> Parsed:
    try:
        return drop_null_keys(row.to_pylist()[0]), None
    except UnicodeDecodeError as error:
        return None, ("bad_encoding", f"not UTF-8: {error.reason}")
    except (ValueError, OverflowError) as error:
        return None, ("bad_schema", f"a value that cannot be read: {error}")
