"""Prepared data is reused, made once by the first process, and complete or absent."""

from __future__ import annotations

import multiprocessing
from multiprocessing.synchronize import Semaphore
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from datasets import disable_caching

from sft.data.documents import Documents
from sft.data.preparation.cache import cache_key, cache_root, make_once, read_rows, write_rows
from sft.data.preparation.packing import pack

disable_caching()


def fill(folder: Path) -> None:
    (folder / "data.txt").write_text("made")


def test_the_first_makes_and_the_next_finds(tmp_path):
    folder = tmp_path / "deep" / "down" / "abc"
    calls: list[Path] = []

    def make(unfinished: Path) -> None:
        assert unfinished.is_dir()
        assert unfinished.parent == folder.parent  # the same disk, so renaming is atomic
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


def test_what_a_killed_process_left_is_replaced(tmp_path):
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


PROCESSES, TIMEOUT = 3, 120


def prepare(folder: Path, arrived: Semaphore, results: multiprocessing.Queue) -> None:
    def make_when_all_have_arrived(unfinished: Path) -> None:
        with (unfinished.parent / "calls").open("a") as calls:
            calls.write("made\n")
        for _ in range(PROCESSES):
            assert arrived.acquire(timeout=TIMEOUT), "another process is missing, or made the folder too"
        fill(unfinished)

    arrived.release()
    was_there = make_once(folder, make_when_all_have_arrived)
    results.put((was_there, (folder / "data.txt").read_text()))


@pytest.mark.slow
def test_processes_that_start_together_make_it_once(tmp_path):
    context = multiprocessing.get_context("spawn")
    arrived, results = context.Semaphore(0), context.Queue()
    arguments = (tmp_path / "abc", arrived, results)
    processes = [context.Process(target=prepare, args=arguments) for _ in range(PROCESSES)]
    for process in processes:
        process.start()
    found = sorted(results.get(timeout=TIMEOUT) for _ in processes)
    for process in processes:
        process.join(timeout=TIMEOUT)
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


def some_documents(lengths: list[int], seed: int = 0) -> Documents:
    rng = np.random.default_rng(seed)
    ids = rng.integers(0, 200_000, sum(lengths)).astype(np.int32)
    labels = np.where(rng.random(len(ids)) < 0.5, ids, -100).astype(np.int32)
    made = Documents(ids, labels, np.array(lengths), np.arange(len(lengths)))
    labels[made.starts] = -100
    return made


@pytest.mark.parametrize("packing", [None, "bfd", "wrapped"])
def test_sequences_are_read_as_they_were_packed(tmp_path, packing):
    made = some_documents([1, 5, 2, 3] * 3000)
    layout = pack(made.lengths, packing, 64)
    write_rows(made, layout, tmp_path / "a.arrow", packed=packing is not None)
    found = read_rows(tmp_path / "a.arrow")
    assert found.column_names == ["input_ids", "labels", "seq_lengths"][: 2 if packing is None else 3]
    assert len(found) == len(layout.counts) == (12_000 if packing is None else 516)
    laid = made if layout.order is None else made.take(layout.order)
    ends = np.cumsum(layout.sequence_lengths)
    for at in (0, 1, len(found) // 2, len(found) - 1):
        whole = slice(ends[at] - layout.sequence_lengths[at], ends[at])
        assert found[at]["input_ids"].tolist() == laid.input_ids[whole].tolist()
        assert isinstance(found[at]["input_ids"], np.ndarray)
        if packing:
            assert found[at]["seq_lengths"].sum() == len(found[at]["input_ids"]) <= 64
    assert sum(len(row["input_ids"]) for row in found) == len(made.input_ids)


def test_the_first_token_after_a_cut_is_masked(tmp_path):
    ids = np.arange(10, 18, dtype=np.int32)
    made = Documents(ids, np.where(ids == 10, -100, ids).astype(np.int32), np.array([8]), np.array([0]))
    write_rows(made, pack(made.lengths, "wrapped", 5), tmp_path / "a.arrow", packed=True)
    first, second = read_rows(tmp_path / "a.arrow")
    assert first["labels"].tolist() == [-100, 11, 12, 13, 14]
    assert second["labels"].tolist() == [-100, 16, 17]


def test_a_data_set_may_be_empty(tmp_path):
    for packing in (None, "bfd", "wrapped"):
        write_rows(Documents.empty(), pack(np.zeros(0, np.int64), packing, 8), tmp_path / "a.arrow", packed=False)
        found = read_rows(tmp_path / "a.arrow")
        assert (len(found), found.column_names) == (0, ["input_ids", "labels"])
