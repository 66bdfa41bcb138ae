"""The same three rows in every kind of file, and helpers that write and read them."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard
from hypothesis import strategies as st

from sft.data.sources.files import read_files
from sft.data.sources.row import Row
from sft.errors import UserError

ROWS = [{"question": "Hi?", "answer": "Yes"}, {"question": "é🎉", "answer": "a\nb"}, {"question": "3", "answer": "No"}]

JSONL = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in ROWS)


def write(path: Path, content: str | bytes) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


def read(path: Path, content: str | bytes | None = None) -> list[Row]:
    """Reads the rows of one file, which is written first when `content` is given."""
    if content is not None:
        write(path, content)
    return list(read_files([path]))


def error(path: Path, content: str | bytes) -> Any:
    """Returns the one problem that reading a file of this content raises."""
    with pytest.raises(UserError) as caught:
        read(path, content)
    assert len(caught.value.problems) == 1
    assert caught.value.problems[0].file == str(path)
    return caught.value.problems[0]


def arrow_bytes(table: pa.Table, stream: bool) -> bytes:
    sink = pa.BufferOutputStream()
    make: Any = pa.ipc.new_stream if stream else pa.ipc.new_file
    with make(sink, table.schema) as writer:
        writer.write_table(table, max_chunksize=2)
    return sink.getvalue().to_pybytes()


def parquet_bytes(table: pa.Table) -> bytes:
    sink = pa.BufferOutputStream()
    pq.write_table(table, sink, row_group_size=2)
    return sink.getvalue().to_pybytes()


TABLE = pa.Table.from_pylist(ROWS)

CSV = 'question,answer\nHi?,Yes\né🎉,"a\nb"\n3,No\n'

CONTENTS: dict[str, Any] = {
    "a.jsonl": JSONL,
    "a.ndjson": JSONL,
    "a.json": json.dumps(ROWS),
    "a.csv": CSV,
    "a.tsv": CSV.replace(",", "\t"),
    "a.parquet": parquet_bytes(TABLE),
    "a.arrow": arrow_bytes(TABLE, stream=False),
    "b.arrow": arrow_bytes(TABLE, stream=True),
}

LINES = {"a.csv": [2, 3, 5], "a.tsv": [2, 3, 5]}

PACK: dict[str, Any] = {"": bytes, ".gz": gzip.compress, ".zst": zstandard.ZstdCompressor().compress}

any_json = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=8), st.just('🎉\\"\n')),
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(st.text(max_size=3), inner, max_size=3)),
    max_leaves=8,
)
