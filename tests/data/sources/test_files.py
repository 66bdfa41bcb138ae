"""Finding the files that a user names, and reading all their rows in order with their places."""

from __future__ import annotations

import gzip
import json
import logging
import os
import tracemalloc
from pathlib import Path
from typing import Any

import pytest

from sft.data.sources.files import find_files, read_files, read_hub, read_saved
from sft.errors import UserError
from tests.data.sources.samples import CONTENTS, JSONL, LINES, PACK, ROWS, TABLE, error, parquet_bytes, read, write


@pytest.mark.parametrize("compression", PACK)
@pytest.mark.parametrize("name", CONTENTS)
def test_every_kind_of_file_gives_the_same_rows_with_their_places(tmp_path, name, compression):
    content = CONTENTS[name]
    raw = content if isinstance(content, bytes) else content.encode()
    path = tmp_path / (name + compression)
    rows = read(path, PACK[compression](raw))
    assert [row.data for row in rows] == ROWS
    assert [row.index for row in rows] == [0, 1, 2]
    assert [row.line for row in rows] == LINES.get(name, [1, 2, 3])
    assert {row.file for row in rows} == {str(path)}
    assert all(row.lost is None for row in rows)


@pytest.mark.parametrize("compression", PACK)
@pytest.mark.parametrize("name", CONTENTS)
@pytest.mark.parametrize("picked", [[0], [1, 4], [2, 3], [5], [], [0, 1, 2, 3, 4, 5]])
def test_rows_that_are_not_wanted_are_only_counted(tmp_path, name, compression, picked):
    content = CONTENTS[name]
    raw = PACK[compression](content if isinstance(content, bytes) else content.encode())
    files = [write(tmp_path / "one" / (name + compression), raw), write(tmp_path / "two" / (name + compression), raw)]
    asked: set[int] = set()

    def wanted(index: int) -> bool:
        asked.add(index)
        return index in picked

    every = list(read_files(files))
    assert list(read_files(files, wanted)) == [row for row in every if row.index in picked]
    assert asked == set(range(6))


def test_a_file_is_not_held_in_memory(tmp_path):
    """A file of 8 MB of each kind is read within 5 MB of Python's memory."""
    row = {"question": "Hi?", "answer": "x" * 2000}
    contents = {
        "a.jsonl": (json.dumps(row) + "\n") * 4000,
        "a.txt": ("x" * 2000 + "\n") * 4000,
        "a.csv": "question,answer\n" + ("Hi?," + "x" * 2000 + "\n") * 4000,
        "a.json": "[" + ",".join([json.dumps(row)] * 4000) + "]",
        "b.json": (json.dumps(row) + "\n") * 4000,
    }
    packed: dict[str, bytes] = {f"{name}{c}": PACK[c](text.encode()) for name, text in contents.items() for c in PACK}
    for name, content in packed.items():
        path = write(tmp_path / name, content)
        tracemalloc.start()
        count = sum(1 for _ in read_files([path]))
        _, peak = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        assert (count, peak < 5_000_000) == (4000, True), f"{name}: {peak:,} bytes"


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.jsonl", "\n  \n\t\n"),
        ("a.json", "[]"),
        ("a.csv", "question,answer\n"),
        ("a.csv", " \n\n"),
        ("a.txt", "\ufeff\n\n"),
        ("a.jsonl.gz", gzip.compress(b"", mtime=0)),
        ("a.parquet", parquet_bytes(TABLE.slice(0, 0))),
    ],
)
def test_a_file_without_rows_is_an_error(tmp_path, name, content):
    assert error(tmp_path / name, content).message == "holds no rows"


def test_one_file_without_rows_among_others_is_logged(tmp_path, caplog):
    files = [write(tmp_path / "a.json", "[]"), write(tmp_path / "b.jsonl", JSONL)]
    with caplog.at_level(logging.WARNING, logger="sft"):
        assert len(list(read_files(files))) == 3
    assert caplog.messages == [f"{files[0]} holds no rows"]


def test_a_list_a_glob_and_a_folder_give_each_file_once_and_in_order(tmp_path):
    b, a, c = (write(tmp_path / "data" / name, JSONL) for name in ("b.jsonl", "a.jsonl.gz", "sub/c.json"))
    write(tmp_path / "data" / "notes.md", "no data")
    folder = str(tmp_path / "data")
    assert find_files(folder, "train_file") == [a, b, c]
    assert find_files(f"{folder}/*.jsonl*", "train_file") == [a, b]
    assert find_files(f"{folder}/**/*.json", "train_file") == [c]
    assert find_files([str(c), f"{folder}/*.jsonl", folder, str(b)], "train_file") == [c, b, a]


def test_indices_count_over_all_files_and_lines_within_each(tmp_path):
    files = [write(tmp_path / "a.jsonl", JSONL), write(tmp_path / "b.jsonl", JSONL)]
    rows = list(read_files(files))
    assert [(row.file, row.index, row.line) for row in rows] == [
        (str(file), 3 * number + at, at + 1) for number, file in enumerate(files) for at in range(3)
    ]


def test_copies_that_editors_leave_in_a_folder_are_not_read(tmp_path):
    kept = write(tmp_path / ".hidden_root" / "data" / "a.jsonl", JSONL)
    write(kept.parent / ".ipynb_checkpoints" / "a-checkpoint.jsonl", JSONL)
    write(kept.parent / "._a.jsonl", b"\x00\x05")
    assert find_files(str(kept.parent), "train_file") == [kept]


def test_metadata_files_in_a_folder_are_not_data(tmp_path):
    kept = write(tmp_path / "a.jsonl", JSONL)
    for name in ("data_report.json", "dataset_dict.json", "sub/dataset_info.json", "sub/state.json"):
        write(tmp_path / name, "{}")
    assert find_files(str(tmp_path), "train_file") == [kept]
    assert find_files(str(tmp_path / "data_report.json"), "train_file") == [tmp_path / "data_report.json"]


def test_a_file_whose_name_looks_like_a_glob_is_found(tmp_path):
    path = write(tmp_path / "a[1].jsonl", JSONL)
    assert find_files(str(path), "train_file") == [path]


def test_a_path_under_the_home_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    path = write(tmp_path / "a.jsonl", JSONL)
    assert find_files("~/a.jsonl", "train_file") == [path]


@pytest.mark.parametrize(
    ("spec", "message", "hint"),
    [
        ("trian.jsonl", "no such file: '{root}/trian.jsonl'", "did you mean '{root}/train.jsonl'?"),
        ("zzz", "no such file: '{root}/zzz'", "the folder '{root}' has no such file"),
        ("no/a.jsonl", "no such file: '{root}/no/a.jsonl'", "the folder '{root}/no' does not exist either"),
        ("*.parquet", "no such file: '{root}/*.parquet'", "the folder '{root}' has no such file"),
        ("docs", "the folder '{root}/docs' holds no data file", "expected one of .jsonl, "),
        ("docs/a.md", "cannot tell the format of '{root}/docs/a.md' by its name", "expected one of .jsonl, "),
        ("empty.jsonl", "'{root}/empty.jsonl' is empty", "give a file with at least one row"),
    ],
)
def test_a_name_without_rows_is_an_error_with_a_hint(tmp_path, spec, message, hint):
    write(tmp_path / "train.jsonl", JSONL)
    write(tmp_path / "empty.jsonl", "")
    write(tmp_path / "docs" / "a.md", "no data")
    with pytest.raises(UserError) as caught:
        find_files(str(tmp_path / spec), "train_file")
    (problem,) = caught.value.problems
    assert problem.message == message.format(root=tmp_path)
    assert problem.hint.startswith(hint.format(root=tmp_path))
    assert problem.key == "train_file"


@pytest.mark.parametrize("spec", ["", "  ", [], [""]])
def test_an_empty_path_is_not_the_current_folder(spec, tmp_path, monkeypatch):
    write(tmp_path / "a.jsonl", JSONL)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match="names no file"):
        find_files(spec, "train_file")


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda path: path.symlink_to(path), "is a broken link"),
        (lambda path: path.symlink_to(path.parent / "gone.jsonl"), "is a broken link"),
        (lambda path: os.mkfifo(path), "is a pipe or a device"),
    ],
)
def test_a_path_that_is_not_a_file_is_reported_as_what_it_is(tmp_path, make, message):
    path = tmp_path / "a.jsonl"
    make(path)
    with pytest.raises(UserError, match=f"train_file: '.*a.jsonl' {message}"):
        find_files(str(path), "train_file")
    kept = write(tmp_path / "b.jsonl", JSONL)
    assert find_files(str(tmp_path), "train_file") == [kept]


def test_linked_folders_are_read_and_links_back_are_not_followed(tmp_path):
    outside = write(tmp_path / "disk" / "b.jsonl", JSONL)
    data = tmp_path / "data"
    kept = write(data / "a.jsonl", JSONL)
    (data / "linked").symlink_to(outside.parent)
    (data / "back").symlink_to(data)
    (outside.parent / "round").symlink_to(data)
    assert find_files(str(data), "train_file") == [kept, data / "linked" / "b.jsonl"]


def test_a_folder_that_may_not_be_read_is_an_error_and_not_an_empty_one(tmp_path, monkeypatch):
    write(tmp_path / "a.jsonl", JSONL)
    write(tmp_path / "sub" / "b.jsonl", JSONL)
    look = os.scandir

    def refuse(folder: Any) -> Any:
        if str(folder).endswith("sub"):
            raise PermissionError(13, "Permission denied", str(folder))
        return look(folder)

    monkeypatch.setattr(os, "scandir", refuse)
    with pytest.raises(UserError, match=r"train_file: cannot be searched: .*Permission denied: '.*sub'"):
        find_files(str(tmp_path), "train_file")


def test_one_file_under_two_names_is_read_once(tmp_path, monkeypatch):
    write(tmp_path / "a.jsonl", JSONL)
    monkeypatch.chdir(tmp_path)
    assert find_files(["a.jsonl", str(tmp_path / "a.jsonl"), "./a.jsonl"], "k") == [Path("a.jsonl")]


def test_a_saved_data_set_and_one_split_of_several(tmp_path):
    from datasets import Dataset, DatasetDict

    data = Dataset.from_list(ROWS)
    data.save_to_disk(tmp_path / "one")
    DatasetDict(train=data, test=data.select([1])).save_to_disk(tmp_path / "two")
    assert [row.data for row in read_saved(tmp_path / "one", "train", "dataset_path")] == ROWS
    (row,) = read_saved(tmp_path / "two", "test", "dataset_path")
    assert (row.file, row.index, row.line, row.data) == (str(tmp_path / "two"), 0, 1, ROWS[1])
    with pytest.raises(UserError, match=r"dataset_path: cannot load the saved data set .*\(dev\)"):
        list(read_saved(tmp_path / "two", "dev", "dataset_path"))
    with pytest.raises(UserError, match="cannot load the saved data set"):
        list(read_saved(tmp_path / "three", "train", "dataset_path"))


@pytest.mark.parametrize("format", [{"type": "numpy"}, {"type": "pandas"}, {"type": None, "columns": ["id"]}])
def test_the_format_that_a_data_set_was_saved_in_changes_no_row(tmp_path, format):
    from datasets import Dataset, DatasetDict

    rows = [{"messages": [{"role": "user", "content": "Hi"}], "id": n, "pair": [n, n]} for n in range(3)]
    data = Dataset.from_list(rows).with_format(**format)
    data.save_to_disk(tmp_path / "one")
    DatasetDict(train=data).save_to_disk(tmp_path / "two")
    for name in ("one", "two"):
        assert [row.data for row in read_saved(tmp_path / name, "train", "k")] == rows


@pytest.mark.parametrize("picked", [None, [0], [1, 1500], [2400], []])
def test_the_wanted_rows_of_a_saved_data_set(tmp_path, picked):
    from datasets import Dataset

    rows = [{"question": str(number), "meta": {"n": [number]}} for number in range(2500)]
    Dataset.from_list(rows).save_to_disk(tmp_path / "one")
    found = list(read_saved(tmp_path / "one", "train", "k", None if picked is None else lambda i: i in picked))
    indices = range(2500) if picked is None else picked
    assert [(row.index, row.line, row.data) for row in found] == [(i, i + 1, rows[i]) for i in indices]


@pytest.mark.parametrize("streaming", [False, True])
def test_a_data_set_of_the_hub_is_read_whole_or_as_a_stream(tmp_path, monkeypatch, streaming):
    """A folder stands for the hub: `datasets` loads both by the same call."""
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    write(tmp_path / "data" / "train.jsonl", JSONL)
    name = str(tmp_path / "data")
    rows = list(read_hub(name, None, "train", "dataset_name", streaming=streaming))
    assert [(row.file, row.index, row.line, row.data) for row in rows] == [
        (f"{name}/train", at, at + 1, row) for at, row in enumerate(ROWS)
    ]
    picked = list(read_hub(name, None, "train", "dataset_name", lambda index: index == 1, streaming))
    assert picked == [rows[1]]
    assert list((tmp_path / "cache").rglob("*.arrow")) == [] or not streaming
    with pytest.raises(UserError, match="dataset_name: cannot load the data set"):
        list(read_hub(name, None, "nowhere", "dataset_name", streaming=streaming))
