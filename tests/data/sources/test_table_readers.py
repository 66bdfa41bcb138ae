"""Rows of Parquet and Arrow files and of saved data sets."""

from __future__ import annotations

import json
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from sft.data.sources.files import read_files, read_hub, read_saved
from tests.data.sources.samples import CONTENTS, ROWS, arrow_bytes, error, parquet_bytes, read, write


def test_row_groups_without_a_wanted_row_are_not_read(tmp_path, monkeypatch):
    path = write(tmp_path / "a.parquet", CONTENTS["a.parquet"])  # groups of two rows and one
    groups: list[int] = []
    read_batches = pq.ParquetFile.iter_batches

    def note(self: Any, size: int, row_groups: list[int]) -> Any:
        groups.extend(row_groups)
        return read_batches(self, size, row_groups)

    monkeypatch.setattr(pq.ParquetFile, "iter_batches", note)
    assert [row.data for row in read_files([path], lambda index: index == 2)] == [ROWS[2]]
    assert groups == [1]


@pytest.mark.parametrize(
    ("name", "kind"), [("a.parquet", "not Parquet"), ("a.arrow", "not an Arrow file"), ("b.arrow", "not an Arrow file")]
)
def test_broken_tables_are_errors(tmp_path, name, kind):
    content = CONTENTS[name]
    assert isinstance(content, bytes)
    assert error(tmp_path / name, b"no table at all" * 9).message.startswith(kind)
    assert error(tmp_path / name, content[: len(content) // 2]).message.startswith(kind)


def test_a_text_in_a_table_that_is_not_utf8_is_one_lost_row(tmp_path):
    column = pa.array([b"Hi", b"caf\xe9", b"Yes"], pa.binary()).view(pa.string())
    rows = read(tmp_path / "a.parquet", parquet_bytes(pa.table({"text": column})))
    assert [row.data for row in rows] == [{"text": "Hi"}, None, {"text": "Yes"}]
    assert rows[1].lost == ("bad_encoding", "not UTF-8: unexpected end of data")
    assert rows[1].line == 2


NESTED = [
    {"meta": {"a": None, "b": 1}, "messages": [{"calls": [{"name": "w", "arguments": {"city": "Paris"}}]}]},
    {"meta": {"a": 2, "b": None}, "messages": [{"calls": [{"name": "s", "arguments": {"n": [None, 1]}}], "id": "7"}]},
    {"meta": None, "messages": [{"id": "8"}, {"calls": []}]},
]


@pytest.mark.parametrize("kind", ["a.parquet", "a.arrow", "saved", "hub", "stream"])
def test_objects_in_lists_of_a_table_keep_only_their_own_keys(tmp_path, monkeypatch, kind):
    """Arrow gives each of them the keys of all, as null; keys of a column itself stay, for `columns` may name them."""
    import datasets

    table = pa.Table.from_pylist(NESTED)
    assert table.to_pylist()[0]["messages"][0]["calls"][0]["arguments"] == {"city": "Paris", "n": None}
    if kind == "saved":
        datasets.Dataset.from_list(NESTED).save_to_disk(tmp_path / "one")
        rows = list(read_saved(tmp_path / "one", "train", "k"))
    elif kind in ("hub", "stream"):
        monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
        write(tmp_path / "data" / "train.parquet", parquet_bytes(table))
        rows = list(read_hub(str(tmp_path / "data"), None, "train", "k", streaming=kind == "stream"))
    else:
        content = parquet_bytes(table) if kind == "a.parquet" else arrow_bytes(table, stream=True)
        rows = read(tmp_path / kind, content)
    assert [row.data for row in rows] == NESTED


def test_a_null_in_json_lines_is_kept(tmp_path):
    row = {"messages": [{"calls": [{"arguments": {"city": None}}]}]}
    assert [found.data for found in read(tmp_path / "a.jsonl", json.dumps(row))] == [row]
