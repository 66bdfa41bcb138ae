"""Prepared data is found again, made once by whoever comes first, and whole or not at all."""

from __future__ import annotations

import multiprocessing
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from datasets import disable_caching

from sft.dataset_cache import cache_key, cache_root, make_once, read_columns, write_columns

disable_caching()


def fill(folder: Path) -> None:
    (folder / "data.txt").write_text("made")


def test_the_first_makes_and_the_next_finds(tmp_path):
    folder = tmp_path / "deep" / "down" / "abc"
    calls: list[Path] = []

    def make(unfinished: Path) -> None:
        assert unfinished.is_dir()
        assert unfinished.parent == folder.parent  # the same disk, so that the renaming is atomic
        assert not folder.exists()
        calls.append(unfinished)
        fill(unfinished)

    assert [make_once(folder, make), make_once(folder, make)] == [False, True]
    assert len(calls) == 1
    assert (folder / "data.txt").read_text() == "made"
    assert sorted(p.name for p in folder.parent.iterdir()) == ["abc", "abc.lock"]


def test_a_failing_make_leaves_nothing_behind(tmp_path):
    folder = tmp_path / "abc"

    def fail(unfinished: Path) -> None:
        fill(unfinished)
        raise KeyError("broken")

    with pytest.raises(KeyError, match="broken"):
        make_once(folder, fail)
    assert [p.name for p in tmp_path.iterdir()] == ["abc.lock"]
    assert make_once(folder, fill) is False
    assert (folder / "data.txt").is_file()


def test_what_a_killed_process_left_is_not_taken_for_data(tmp_path):
    folder = tmp_path / "abc"

    def be_killed(unfinished: Path) -> None:
        (unfinished / "half.txt").write_text("half")
        for path in tmp_path.iterdir():  # what the disk holds at this moment, as a kill would leave it
            if path.is_dir():
                left_over.append(path)

    left_over: list[Path] = []
    make_once(folder, be_killed)
    (left,) = left_over
    folder.rename(left)
    assert make_once(folder, fill) is False
    assert [p.name for p in folder.iterdir()] == ["data.txt"]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["abc", "abc.lock"]


def make_slowly(unfinished: Path) -> None:
    with (unfinished.parent / "calls").open("a") as calls:
        calls.write("made\n")
    time.sleep(0.5)
    fill(unfinished)


def prepare(folder: Path, results: multiprocessing.Queue) -> None:
    was_there = make_once(folder, make_slowly)
    results.put((was_there, (folder / "data.txt").read_text()))


@pytest.mark.slow
def test_processes_that_come_at_once_make_it_once(tmp_path):
    context = multiprocessing.get_context("spawn")
    results = context.Queue()
    processes = [context.Process(target=prepare, args=(tmp_path / "abc", results)) for _ in range(3)]
    for process in processes:
        process.start()
    found = sorted(results.get(timeout=60) for _ in processes)
    for process in processes:
        process.join(timeout=60)
        assert process.exitcode == 0
    assert found == [(False, "made"), (True, "made"), (True, "made")]
    assert (tmp_path / "calls").read_text() == "made\n"


def test_the_key_changes_with_each_part_and_with_the_code(tmp_path):
    code = tmp_path / "code.py"
    code.write_text("a = 1")
    parts: dict[str, Any] = {"keys": {"a": 1, "b": [1, 2]}, "template": None}
    key = cache_key(parts, [code])
    assert cache_key({"template": None, "keys": {"b": [1, 2], "a": 1}}, [code]) == key
    others = [
        {**parts, "template": ""},
        {**parts, "keys": {"a": 1, "b": [2, 1]}},
        {**parts, "keys": {"a": "1", "b": [1, 2]}},
    ]
    keys = {key, *(cache_key(other, [code]) for other in others)}
    code.write_text("a = 2")
    keys.add(cache_key(parts, [code]))
    assert len(keys) == 5


def test_where_the_cache_is(monkeypatch, tmp_path):
    monkeypatch.delenv("SFT_CACHE", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert cache_root(None) == tmp_path / "xdg" / "sft_pipeline"
    monkeypatch.setenv("SFT_CACHE", str(tmp_path / "sft"))
    assert cache_root(None) == tmp_path / "sft"
    assert cache_root(str(tmp_path / "own")) == tmp_path / "own"
    monkeypatch.setenv("HOME", str(tmp_path))
    assert cache_root("~/own") == tmp_path / "own"


def test_columns_come_back_as_they_were(tmp_path):
    rng = np.random.default_rng(0)
    values = [rng.integers(-100, 200_000, n).astype(np.int32) for n in [1, 5, 0, 3] * 3000]
    write_columns({"input_ids": values, "labels": values[::-1]}, tmp_path / "a.arrow")
    found = read_columns(tmp_path / "a.arrow")
    assert found.column_names == ["input_ids", "labels"]
    assert len(found) == 12_000
    for at in (0, 1, 2, 4095, 4096, 11_999):
        assert found[at]["input_ids"].tolist() == values[at].tolist()
        assert found[at]["labels"].tolist() == values[::-1][at].tolist()
    assert isinstance(found[0]["input_ids"], np.ndarray)


def test_no_rows_are_a_data_set_too(tmp_path):
    write_columns({"input_ids": [], "labels": []}, tmp_path / "a.arrow")
    found = read_columns(tmp_path / "a.arrow")
    assert (len(found), found.column_names) == (0, ["input_ids", "labels"])
