"""Which data the keys name: sources, their settings, and the splits of a folder."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from sft.config.schema import DataKeys, DatasetKeys
from sft.data.sources.dataset_source import training_sources, validation_sources
from sft.errors import UserError


def write(path: Path, *answers: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps({"question": "Hi", "answer": a}) + "\n" for a in answers or ("Yes",)))
    return path


def names(path: Path, split: str, **keys: Any) -> list[str]:
    """Lists the files of `dataset_path` that are read for one split."""
    find = training_sources if split == "train" else validation_sources
    return [str(f.relative_to(path)) for s in find(DataKeys(dataset_path=str(path), **keys)) for f in s.files]


def test_files_for_training_and_validation_take_the_configs_settings(tmp_path):
    train, validation = write(tmp_path / "a.jsonl"), write(tmp_path / "b.jsonl")
    keys = DataKeys(
        train_file=str(train), validation_file=[str(validation)], format="qa", columns={"question": "q"}, train_on="all"
    )
    (source,) = training_sources(keys)
    assert (source.name, source.key, source.files) == ("train", "train_file", [train])
    assert (source.format, source.columns, source.train_on) == ("qa", {"question": "q"}, "all")
    (source,) = validation_sources(keys)
    assert (source.name, source.key, source.files) == ("validation", "validation_file", [validation])
    assert validation_sources(DataKeys(train_file=str(train))) == []


def test_no_training_data_is_an_error():
    with pytest.raises(UserError, match="train_file: no training data"):
        training_sources(DataKeys())


def test_data_sets_have_settings_of_their_own(tmp_path):
    a, b = write(tmp_path / "a.jsonl", "1", "2", "3"), write(tmp_path / "sub" / "b.jsonl", "4", "5")
    entries = [
        DatasetKeys(path=str(a), max_samples=2, columns={"question": "q"}, train_on="all"),
        DatasetKeys(path=str(b.parent), name="second", format="qa"),
    ]
    first, second = training_sources(DataKeys(datasets=entries, columns={"answer": "x"}))
    assert (first.name, first.key, first.files, first.format) == ("a", "datasets.0.path", [a], "auto")
    assert (first.columns, first.train_on) == ({"question": "q"}, "all")
    assert [row.data["answer"] for row in first.rows() if row.data] == ["1", "2"]
    assert (second.name, second.files, second.format) == ("second", [b], "qa")
    assert (second.columns, second.train_on) == ({"answer": "x"}, "assistant")
    assert len(list(second.rows())) == 2
    (evaluated,) = validation_sources(DataKeys(eval_datasets=entries[1:]))
    assert (evaluated.name, evaluated.key) == ("second", "eval_datasets.0.path")


def test_rows_that_are_lost_count_as_samples(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text('broken\n{"text": "a"}\n{"text": "b"}\n')
    (source,) = training_sources(DataKeys(datasets=[DatasetKeys(path=str(path), max_samples=2)]))
    assert [row.data for row in source.rows()] == [None, {"text": "a"}]


def test_two_data_sets_of_one_name_are_an_error(tmp_path):
    entries = [DatasetKeys(path=str(write(tmp_path / folder / "a.jsonl"))) for folder in "xy"]
    with pytest.raises(UserError, match=r"datasets.1.name: two data sets are called 'a'"):
        training_sources(DataKeys(datasets=entries))


@pytest.mark.parametrize(
    ("path", "is_on_the_hub"),
    [
        ("gsm8k", True),
        ("openai/gsm8k", True),
        ("teknium/OpenHermes-2.5", True),
        ("someone/data.v1", True),
        ("data/train.jsonl", False),
        ("data/train.jsonl.gz", False),
        ("./openai/gsm8k", False),
        ("/openai/gsm8k", False),
        ("~/openai/gsm8k", False),
        ("data/*", False),
    ],
)
def test_paths_and_hub_names_are_distinguished(path, is_on_the_hub, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    keys = DataKeys(datasets=[DatasetKeys(path=path)])
    if is_on_the_hub:
        (source,) = training_sources(keys)
        assert (source.hub, source.files, source.split) == (path, [], "train")
        return
    with pytest.raises(UserError, match=r"datasets\.0\.path: no such file"):
        training_sources(keys)


def test_a_local_folder_takes_precedence_over_a_hub_name(tmp_path, monkeypatch):
    write(tmp_path / "openai" / "gsm8k" / "a.jsonl")
    monkeypatch.chdir(tmp_path)
    (source,) = training_sources(DataKeys(datasets=[DatasetKeys(path="openai/gsm8k")]))
    assert (source.files, source.hub) == ([Path("openai/gsm8k/a.jsonl")], None)


def test_a_name_on_the_hub_that_cannot_be_reached_is_an_error():
    (source,) = training_sources(DataKeys(dataset_name="nobody/nothing", dataset_config_name="main"))
    assert (source.name, source.hub, source.hub_config, source.split) == ("train", "nobody/nothing", "main", "train")
    assert not source.streaming
    with pytest.raises(UserError, match="dataset_name: cannot load the data set 'nobody/nothing'") as caught:
        list(source.rows())
    assert "check the spelling" in caught.value.problems[0].hint


def test_a_data_set_on_the_hub_is_fetched_as_it_is_read_when_the_run_streams():
    entries = [DatasetKeys(path="nobody/nothing")]
    keys = [DataKeys(dataset_name="a/b", streaming=True), DataKeys(datasets=entries, streaming=True)]
    assert [source.streaming for k in keys for source in training_sources(k)] == [True, True]
    (evaluated,) = validation_sources(DataKeys(eval_datasets=entries, streaming=True))
    assert evaluated.streaming


def test_only_wanted_rows_of_the_first_max_samples_are_yielded(tmp_path):
    path = write(tmp_path / "a.jsonl", *map(str, range(10)))
    (source,) = training_sources(DataKeys(datasets=[DatasetKeys(path=str(path), max_samples=6)]))
    assert [row.index for row in source.rows(lambda index: index % 2 == 1)] == [1, 3, 5]
    assert [row.index for row in source.rows(lambda index: index >= 4)] == [4, 5]
    assert list(source.rows(lambda index: index > 6)) == []


@pytest.mark.parametrize(
    ("files", "train", "validation"),
    [
        (["train.jsonl", "validation.jsonl", "test.jsonl"], ["train.jsonl"], ["validation.jsonl"]),
        (["train.jsonl", "test.jsonl"], ["train.jsonl"], ["test.jsonl"]),
        (
            ["train-00000-of-2.jsonl", "train-00001-of-2.jsonl"],
            ["train-00000-of-2.jsonl", "train-00001-of-2.jsonl"],
            [],
        ),
        (["a.jsonl", "b.jsonl"], ["a.jsonl", "b.jsonl"], []),
        (["a.jsonl", "val_1.jsonl"], ["a.jsonl"], ["val_1.jsonl"]),
        (["my_train.jsonl", "my-dev.jsonl"], ["my_train.jsonl"], ["my-dev.jsonl"]),
        (["train/0.jsonl", "test/0.jsonl"], ["train/0.jsonl"], ["test/0.jsonl"]),
        (
            ["values.jsonl", "developers.jsonl", "testimony.jsonl"],
            ["developers.jsonl", "testimony.jsonl", "values.jsonl"],
            [],
        ),
        (["Train.jsonl", "VALID.jsonl"], ["Train.jsonl"], ["VALID.jsonl"]),
    ],
)
def test_a_folders_files_are_named_for_their_splits(tmp_path, files, train, validation):
    for file in files:
        write(tmp_path / file)
    assert names(tmp_path, "train") == train
    assert names(tmp_path, "validation") == validation
    assert names(tmp_path, "train", validation_split=0.5) == train
    assert names(tmp_path, "validation", validation_split=0.5) == []


def test_a_folder_of_validation_files_has_no_training_data(tmp_path):
    write(tmp_path / "test.jsonl")
    with pytest.raises(UserError, match="dataset_path: no training data in"):
        names(tmp_path, "train")


def test_files_beside_the_ones_named_for_training_are_logged(tmp_path, caplog):
    write(tmp_path / "train.jsonl")
    extra = write(tmp_path / "extra.jsonl")
    with caplog.at_level(logging.WARNING, logger="sft"):
        assert names(tmp_path, "train") == ["train.jsonl"]
    assert caplog.messages == [f"dataset_path: not used, as others are named for training: {extra}"]


def test_saved_data_sets(tmp_path, monkeypatch):
    from datasets import Dataset, DatasetDict

    data = Dataset.from_list([{"question": "Hi", "answer": "Yes"}])
    data.save_to_disk(tmp_path / "one")
    DatasetDict(train=data, test=data).save_to_disk(tmp_path / "two")
    (one,) = training_sources(DataKeys(dataset_path=str(tmp_path / "one")))
    assert [row.data for row in one.rows()] == [{"question": "Hi", "answer": "Yes"}]
    assert validation_sources(DataKeys(dataset_path=str(tmp_path / "one"))) == []
    (two,) = training_sources(DataKeys(dataset_path=str(tmp_path / "two")))
    (test,) = validation_sources(DataKeys(dataset_path=str(tmp_path / "two")))
    assert (two.split, test.split) == ("train", "test")
    assert len(list(test.rows())) == 1

    monkeypatch.setenv("HOME", str(tmp_path))
    (entry,) = training_sources(DataKeys(datasets=[DatasetKeys(path="~/two", split="test")]))
    assert (entry.name, entry.split, entry.files) == ("two", "test", [])
    assert len(list(entry.rows())) == 1
    # A data set to evaluate on is not read from the training split because nobody named one.
    (evaluated,) = validation_sources(DataKeys(eval_datasets=[DatasetKeys(path="~/two")]))
    assert evaluated.split == "validation"


def problem_of(**keys: Any) -> Any:
    """Returns the problem with the files of the first key, which is raised before any row is read."""
    with pytest.raises(UserError) as caught:
        (validation_sources if "validation_file" in keys else training_sources)(DataKeys(**keys))
    (problem,) = caught.value.problems
    return problem


def test_a_folder_of_several_splits_is_not_trained_as_one(tmp_path):
    for name in ("train.jsonl", "validation.jsonl", "data_report.json"):
        write(tmp_path / name)
    whole = f"`dataset_path: {tmp_path}`, which trains and evaluates by the names"
    problem = problem_of(train_file=str(tmp_path))
    assert problem.key == "train_file"
    held = "train: train.jsonl; validation: validation.jsonl"
    assert problem.message == f"the folder '{tmp_path}' holds files of several splits ({held})"
    assert problem.hint == f"write `train_file: {tmp_path / 'train.jsonl'}`, or {whole}"
    assert names(tmp_path, "train") == ["train.jsonl"]
    problem = problem_of(validation_file=[str(tmp_path)])
    assert problem.hint == f"write `validation_file: {tmp_path / 'validation.jsonl'}`, or {whole}"
    problem = problem_of(datasets=[DatasetKeys(path=str(tmp_path))])
    assert (problem.key, problem.hint) == ("datasets.0.path", f"write `path: {tmp_path / 'train.jsonl'}`")
    # Whoever names the files means them.
    (source,) = training_sources(DataKeys(train_file=f"{tmp_path}/*.jsonl"))
    assert [file.name for file in source.files] == ["train.jsonl", "validation.jsonl"]


@pytest.mark.parametrize(
    ("files", "held"),
    [
        (["train/0.jsonl", "test/0.jsonl"], "test: 0.jsonl; train: 0.jsonl"),
        (["val.jsonl", "test.jsonl"], "test: test.jsonl; validation: val.jsonl"),
        (
            ["a.jsonl", "b.jsonl", "c.jsonl", "d.jsonl", "my_dev.jsonl"],
            "train: a.jsonl, b.jsonl, c.jsonl and 1 more; validation: my_dev.jsonl",
        ),
        (["train.jsonl", "training_2.jsonl", "more.jsonl"], None),
        (["a.jsonl", "b.jsonl"], None),
        (["test_1.jsonl", "test_2.jsonl"], None),
    ],
)
def test_which_folders_hold_several_splits(tmp_path, files, held):
    for file in files:
        write(tmp_path / file)
    if held is None:
        (source,) = training_sources(DataKeys(train_file=str(tmp_path)))
        assert sorted(str(file.relative_to(tmp_path)) for file in source.files) == sorted(files)
    else:
        assert problem_of(train_file=str(tmp_path)).message.endswith(f"holds files of several splits ({held})")


def test_a_saved_data_set_is_not_taken_for_a_folder_of_files(tmp_path):
    from datasets import Dataset, DatasetDict

    data = Dataset.from_list([{"question": "Hi", "answer": "Yes"}])
    DatasetDict(train=data, test=data).save_to_disk(tmp_path / "two")
    for keys, instead in (
        ({"train_file": str(tmp_path / "two")}, f"dataset_path: {tmp_path / 'two'}"),
        ({"train_file": str(tmp_path)}, f"dataset_path: {tmp_path / 'two' / 'test'}"),
        ({"validation_file": str(tmp_path / "two/test")}, f"eval_datasets: [{{path: {tmp_path / 'two' / 'test'}}}]"),
        ({"datasets": [DatasetKeys(path=str(tmp_path))]}, f"path: {tmp_path / 'two' / 'test'}"),
    ):
        assert problem_of(**keys).hint == f"write `{instead}`, which reads it as it was saved"
    # A file that is called as one of theirs is a file of rows if none of theirs is beside it.
    write(tmp_path / "rows" / "state.json")
    (source,) = training_sources(DataKeys(train_file=str(tmp_path / "rows")))
    assert source.files == [tmp_path / "rows" / "state.json"]


def test_the_fingerprint_changes_with_the_data(tmp_path):
    from datasets import Dataset

    def fingerprint(**keys: Any) -> str:
        (source,) = training_sources(DataKeys(**keys))
        return source.fingerprint()

    path = write(tmp_path / "a.jsonl", "Yes")
    first = fingerprint(train_file=str(path))
    assert fingerprint(train_file=str(path)) == first
    path.write_text(path.read_text().replace("Yes", "No!"))
    assert fingerprint(train_file=str(path)) != first
    write(path, "Yes")
    assert fingerprint(train_file=str(path)) == first
    copy = write(tmp_path / "b.jsonl", "Yes")  # the ledger names the file
    both = [fingerprint(train_file=[str(path), str(copy)]), fingerprint(train_file=[str(copy), str(path)])]
    assert len({first, fingerprint(train_file=str(copy)), *both}) == 4

    large = tmp_path / "large.txt"  # longer than one piece that is hashed
    large.write_bytes(b"x" * 3_000_001)
    whole = fingerprint(train_file=str(large))
    for at in (0, 1 << 20, 3_000_000):
        with large.open("r+b") as stream:
            stream.seek(at)
            stream.write(b"y")
        changed = fingerprint(train_file=str(large))
        assert changed != whole
        whole = changed

    Dataset.from_list([{"text": "a"}]).save_to_disk(tmp_path / "saved")
    saved = fingerprint(dataset_path=str(tmp_path / "saved"))
    Dataset.from_list([{"text": "b"}]).save_to_disk(tmp_path / "saved")
    assert fingerprint(dataset_path=str(tmp_path / "saved")) != saved
    assert fingerprint(dataset_name="a/b") != fingerprint(dataset_name="a/c")
    assert fingerprint(dataset_name="a/b") != fingerprint(dataset_name="a/b", dataset_config_name="main")


def test_a_hub_data_set_is_identified_by_its_commit_or_offline_by_that_of_its_copy(tmp_path, monkeypatch):
    import huggingface_hub

    def fingerprint() -> str:
        (source,) = training_sources(DataKeys(dataset_name="a/b"))
        return source.fingerprint()

    def at(commit: str) -> None:
        monkeypatch.setattr(huggingface_hub, "dataset_info", lambda name, **_: SimpleNamespace(sha=f"{name}@{commit}"))

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    nowhere = fingerprint()  # tests are offline
    at("1")
    first = fingerprint()
    at("2")
    second = fingerprint()
    monkeypatch.undo()
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    copy = tmp_path / "datasets--a--b" / "refs" / "main"
    copy.parent.mkdir(parents=True)
    copy.write_text("a/b@1")
    assert fingerprint() == first
    assert len({nowhere, first, second}) == 3
