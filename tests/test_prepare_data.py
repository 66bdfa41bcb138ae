"""Raw files become Parquet that training reads with no further setting, and every skipped row is counted."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pyarrow.parquet as pq
import pytest

import prepare_data
from data_handler import prepare_data as prepare_for_training
from sft.config.schema import DataKeys
from sft.data.sources.files import find_files
from tests.builders import byte_level_tokenizer
from tests.runs import write_rows
from tests.template_zoo import WITH_TOOLS


def pairs(count: int, start: int = 0) -> list[dict]:
    return [{"q": f"What is {n}?", "meta": {"a": f"It is {n}."}} for n in range(start, start + count)]


@pytest.fixture
def raw(tmp_path: Path) -> Path:
    write_rows(tmp_path / "a.jsonl", pairs(40))
    write_rows(tmp_path / "b.jsonl", pairs(10, start=40))
    return tmp_path


def command(raw: Path, *more: str) -> list[str]:
    keys = ["--prompt-key", "q", "--response-key", "meta.a"]
    return [str(raw / "*.jsonl"), "-o", str(raw / "out"), *keys, *more]


def questions(file: Path) -> list[str]:
    return [json.loads(row["messages"])[0]["content"] for row in pq.read_table(file).to_pylist()]


def test_the_result_trains_with_no_further_setting(raw: Path) -> None:
    assert prepare_data.main(command(raw, "--val-split", "0.2")) == 0
    train, validation = raw / "out" / "train.parquet", raw / "out" / "validation.parquet"
    keys = DataKeys(dataset_path=str(raw / "out"), cache_dir=str(raw / "cache"))
    data = prepare_for_training(keys, byte_level_tokenizer(), seed=0)
    assert (len(data.train), len(data.evals["validation"])) == (40, 10)
    assert data.ledger["total"]["rows_lost"] == {}
    assert not set(questions(train)) & set(questions(validation))
    assert sorted(questions(train) + questions(validation)) == sorted(row["q"] for row in pairs(50))


def test_an_earlier_validation_file_is_renamed_since_the_new_training_file_may_hold_its_rows(
    raw: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    prepare_data.main(command(raw, "--val-split", "0.2"))
    held, out = questions(raw / "out" / "validation.parquet"), raw / "out"
    assert prepare_data.main(command(raw)) == 0
    assert set(held) < set(questions(out / "train.parquet"))
    assert [file.name for file in find_files(str(out / "*.parquet"), "train_file")] == ["train.parquet"]
    assert questions(out / "validation.parquet.earlier") == held
    warning = f"{out / 'validation.parquet'} is from an earlier run, and was renamed to validation.parquet.earlier"
    assert warning in capsys.readouterr().err
    keys = DataKeys(dataset_path=str(out), cache_dir=str(raw / "cache"))
    assert prepare_for_training(keys, byte_level_tokenizer(), seed=0).evals == {}


def test_the_seed_decides_the_order(raw: Path) -> None:
    orders = []
    for seed in ("1", "1", "2"):
        prepare_data.main(command(raw, "--val-split", "0.2", "--seed", seed))
        orders.append(questions(raw / "out" / "train.parquet"))
    assert orders[0] == orders[1] != orders[2]


def test_stratifying_takes_the_share_from_each_file(raw: Path) -> None:
    prepare_data.main(command(raw, "--val-split", "0.2", "--stratify"))
    held = [int(q.split()[2].rstrip("?")) for q in questions(raw / "out" / "validation.parquet")]
    assert (len([n for n in held if n < 40]), len([n for n in held if n >= 40])) == (8, 2)


def test_skipped_rows_are_counted(raw: Path) -> None:
    bad = [*pairs(2), {"q": "x" * 500, "meta": {"a": "y"}}, {"q": "no answer"}, {"q": "empty", "meta": {"a": " "}}]
    write_rows(raw / "c.jsonl", bad)
    with (raw / "c.jsonl").open("a") as stream:
        stream.write("{broken\n")
    assert prepare_data.main(command(raw, "--max-chars", "200")) == 0
    report = json.loads((raw / "out" / "data_report.json").read_text())
    lost = {"duplicate": 2, "too_long": 1, "bad_schema": 1, "empty_answer": 1, "bad_json": 1}
    assert report == {"rows_read": 56, "rows_written": 50, "rows_lost": lost}


def test_chats_keep_their_tools_and_their_untrained_turns(tmp_path: Path) -> None:
    call = {"function": {"name": "f", "arguments": {"x": 1}}, "type": "function"}
    row = {
        "tools": [{"type": "function", "function": {"name": "f"}}],
        "messages": [
            {"role": "user", "content": "Hi"},
            {"role": "assistant", "content": "", "tool_calls": [call]},
            {"role": "tool", "content": "1"},
            {"role": "assistant", "content": "Not this", "train": False},
            {"role": "user", "content": "And?"},
            {"role": "assistant", "content": "This"},
        ],
    }
    file = write_rows(tmp_path / "chat.jsonl", [row])
    assert prepare_data.main([str(file), "-o", str(tmp_path / "out")]) == 0
    (written,) = pq.read_table(tmp_path / "out" / "train.parquet").to_pylist()
    messages = json.loads(written["messages"])
    assert messages[1]["tool_calls"] == [call]
    assert [m.get("train") for m in messages] == [None, None, None, False, None, None]
    assert json.loads(written["tools"]) == row["tools"]


def test_plain_conversion_keeps_rows_and_columns(raw: Path) -> None:
    assert prepare_data.main([str(raw / "*.jsonl"), "-o", str(raw / "out"), "--convert-only"]) == 0
    assert pq.read_table(raw / "out" / "train.parquet").to_pylist() == pairs(50)


def calling(tool: str, arguments: dict) -> dict:
    """A conversation with a call, and the tool's schema, whose properties are the arguments."""
    parameters = {"type": "object", "properties": {name: {"type": "string"} for name in arguments}}
    call = {"type": "function", "function": {"name": tool, "arguments": arguments}}
    return {
        "tools": [{"type": "function", "function": {"name": tool, "parameters": parameters}}],
        "messages": [
            {"role": "user", "content": "Hi"},
            {"role": "assistant", "content": None, "tool_calls": [call]},
            {"role": "tool", "content": "3"},
            {"role": "assistant", "content": "Three"},
        ],
    }


CALLS = [calling("weather", {"city": "Paris"}), calling("stock", {"ticker": "A", "on": None, "days": 2**70})]
PROMPTS = [
    {"prompt": [{"role": "user", "content": "Hi"}], "completion": row["messages"][1:], "tools": row["tools"]}
    for row in (calling("weather", {"city": "Paris"}), calling("stock", {"ticker": "A", "days": 2}))
]


@pytest.mark.parametrize("rows", [CALLS, PROMPTS])
def test_rows_with_different_tools_and_arguments_give_the_same_ids_after_conversion(
    tmp_path: Path, rows: list[dict]
) -> None:
    raw, out = write_rows(tmp_path / "a.jsonl", rows), tmp_path / "out"
    assert prepare_data.main([str(raw), "-o", str(out), "--convert-only"]) == 0
    files, tokenizer = (raw, out / "train.parquet"), byte_level_tokenizer(WITH_TOOLS)
    keys = [DataKeys(train_file=str(f), cache_dir=str(tmp_path), max_seq_length=2048, packing=False) for f in files]
    before, after = (prepare_for_training(one, tokenizer, seed=0).train for one in keys)
    assert [row["input_ids"].tolist() for row in after] == [row["input_ids"].tolist() for row in before]
    assert [row["labels"].tolist() for row in after] == [row["labels"].tolist() for row in before]
    assert '<call>weather {"city": "Paris"}</call>' in tokenizer.decode(after[0]["input_ids"])


@pytest.mark.parametrize("convert_only", [[], ["--convert-only"]])
def test_half_a_surrogate_pair_loses_its_row_alone(tmp_path: Path, convert_only: list[str]) -> None:
    rows = [{"question": f"{n}?", "answer": answer} for n, answer in enumerate(("Yes", "half \ud83d of a pair", "No"))]
    out = tmp_path / "out"
    assert prepare_data.main([str(write_rows(tmp_path / "a.jsonl", rows)), "-o", str(out), *convert_only]) == 0
    report = json.loads((out / "data_report.json").read_text())
    assert report == {"rows_read": 3, "rows_written": 2, "rows_lost": {"bad_encoding": 1}}


@pytest.mark.parametrize("value", [{}, {"n": 2**63}, [{}], [1, "a"], [2**70], 2**70])
def test_values_that_no_column_of_parquet_holds_become_json_text(tmp_path: Path, value: object) -> None:
    rows = [{**pair, "meta": meta} for pair, meta in zip(pairs(2), (value, None), strict=True)]
    assert prepare_data.main([str(write_rows(tmp_path / "a.jsonl", rows)), "-o", str(tmp_path), "--convert-only"]) == 0
    written, empty = pq.read_table(tmp_path / "train.parquet").to_pylist()
    assert (json.loads(written["meta"]), empty["meta"]) == (value, None)
    assert written["q"] == rows[0]["q"]


@pytest.mark.parametrize("values", [(2**70, 1), ({"text": 1}, {"text": "a"}), ({}, {}), (1, "a")])
def test_an_answer_that_no_column_of_parquet_holds_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], values: tuple[object, ...]
) -> None:
    """In JSON text it would be trained on as that text."""
    raw = write_rows(tmp_path / "a.jsonl", [{"question": "Hi?", "answer": value} for value in values])
    assert prepare_data.main([str(raw), "-o", str(tmp_path / "out"), "--convert-only"]) == 2
    assert "the column 'answer' has values that no column of Parquet holds" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["{raw}/a.jsonl", "-o", "{raw}/b.jsonl", "--convert-only"], "--output-dir: cannot be written: "),
        (["{raw}/a.jsonl", "-o", "{raw}/b.jsonl/deeper", "--convert-only"], "--output-dir: cannot be written: "),
        (["{raw}/mixed.json", "-o", "out", "--convert-only"], "the column 'n' has values that no column"),
        (["nowhere/*.jsonl", "-o", "out"], "no such file"),
        (["{raw}/a.jsonl", "-o", "out", "--val-split", "1.5"], "--val-split"),
        (["{raw}/a.jsonl", "-o", "out", "--prompt-key", "q"], "go together"),
        (["{raw}/a.jsonl", "-o", "out", "--format", "chat"], "none of 40 rows is left"),
    ],
)
def test_a_mistake_is_reported(
    raw: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    (raw / "mixed.json").write_text('[{"n": 1}, {"n": "a"}]')
    assert prepare_data.main([a.format(raw=raw) for a in arguments]) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("name", ["train.parquet", "validation.parquet", "data_report.json"])
def test_a_folder_that_cannot_be_written_to_is_reported(
    raw: Path, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    (raw / "out" / name / "in the way").mkdir(parents=True)  # which stops root as well
    assert prepare_data.main(command(raw, "--val-split", "0.2")) == 2
    printed = capsys.readouterr().err
    assert "--output-dir: cannot be written: " in printed
    assert "give a writable folder" in printed


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_folder_without_write_permission_is_reported(raw: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (raw / "out").mkdir(mode=0o555)
    assert prepare_data.main(command(raw)) == 2
    assert "--output-dir: cannot be written: " in capsys.readouterr().err
