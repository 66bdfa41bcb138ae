"""The data stage as a whole: from files to prepared data, with a ledger of every row."""

from __future__ import annotations

import gzip
import json
import logging
import multiprocessing
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from transformers import PreTrainedTokenizerFast

from data_handler import (
    PreparedData,
    prepare_data,
    preview,
    require_enough_rows,
    validation_conversations,
)
from sft.config.schema import DataKeys, DatasetKeys
from sft.data.encoding.row_encoder import RowEncoder, Seen
from sft.data.ledger import Ledger
from sft.data.sources.dataset_source import DataSource
from sft.data.sources.row import Row
from sft.errors import UserError
from tests.builders import CHATML, byte_level_tokenizer
from tests.data.formats.rows import any_rows
from tests.template_zoo import tokenizer_of

TOKENIZER = byte_level_tokenizer()
PARIS = "The capital of France is Paris."


def qa(number: int, answer: str = "Paris") -> dict[str, Any]:
    return {"question": f"Question {number}?", "answer": answer}


def write(path: Path, *rows: dict[str, Any] | str) -> str:
    path.write_text("".join((r if isinstance(r, str) else json.dumps(r)) + "\n" for r in rows))
    return str(path)


@pytest.fixture
def keys(tmp_path):
    """Makes data keys with a cache of their own: `keys(train_file=...)`."""

    def make(**values: Any) -> DataKeys:
        return DataKeys(**{"cache_dir": str(tmp_path / "cache"), "max_seq_length": 64, **values})

    return make


def prepare(
    keys: DataKeys,
    tokenizer: PreTrainedTokenizerFast = TOKENIZER,
    seed: int = 1,
    training: bool = True,
) -> PreparedData:
    return prepare_data(keys, tokenizer, seed=seed, training=training)


def questions(data: Any) -> list[str]:
    """Decodes the question of each prepared row, to identify it."""
    texts = [str(TOKENIZER.decode(row["input_ids"])) for row in data]
    return [text.split("<|im_start|>user\n")[1].split("<|im_end|>")[0] for text in texts]


def assert_accounts(data: PreparedData) -> None:
    """Asserts that the ledger's numbers equal those of the prepared data."""
    document = data.ledger
    for one in [document["total"], *document["datasets"].values()]:
        assert one["rows_read"] == one["rows_trained"] + sum(one["rows_lost"].values())
        assert one["tokens"]["total"] == one["tokens"]["trained"] + one["tokens"]["masked"]
    sets = [data.train, *data.evals.values()]
    assert document["total"]["tokens"]["total"] == sum(len(row["input_ids"]) for s in sets for row in s)
    assert document["total"]["tokens"]["trained"] == sum(int((row["labels"] != -100).sum()) for s in sets for row in s)
    assert data.train_tokens == sum(len(row["input_ids"]) for row in data.train)


def test_prepared_rows_written_out(tmp_path, keys):
    data = prepare(keys(train_file=write(tmp_path / "a.jsonl", qa(1), {"text": PARIS})))
    assert data.train.column_names == ["input_ids", "labels"]
    chat, text = data.train
    rendered = "<|im_start|>user\nQuestion 1?<|im_end|>\n<|im_start|>assistant\nParis<|im_end|>\n"
    ids = TOKENIZER.encode(rendered, add_special_tokens=False)
    assert chat["input_ids"].tolist() == ids
    answer = TOKENIZER.encode("Paris<|im_end|>", add_special_tokens=False)
    assert chat["labels"].tolist() == [-100] * (len(ids) - len(answer) - 1) + answer + [-100]
    ids = [*TOKENIZER.encode(PARIS, add_special_tokens=False), TOKENIZER.eos_token_id]
    assert text["input_ids"].tolist() == ids
    assert text["labels"].tolist() == [-100, *ids[1:]]
    assert data.end_token_ids == (TOKENIZER.convert_tokens_to_ids("<|im_end|>"), TOKENIZER.eos_token_id)
    assert (data.evals, data.from_cache) == ({}, False)
    assert data.ledger["total"]["formats"] == {"qa": 1, "text": 1}
    assert_accounts(data)


def test_texts_alone_need_no_template_and_end_with_eos(tmp_path, keys):
    tokenizer = byte_level_tokenizer(None)
    data = prepare(keys(train_file=write(tmp_path / "a.txt", PARIS)), tokenizer)
    assert data.end_token_ids == (tokenizer.eos_token_id,)


def test_a_file_with_every_kind_of_loss_accounts_for_each_row(tmp_path, keys):
    train = write(
        tmp_path / "a.jsonl",
        qa(1),
        "{broken",
        {"a": 1},
        {"question": "Hi", "answer": " "},
        qa(2, "Paris " * 99),
        {"messages": [{"role": "user", "content": "Hi"}]},
        {"question": "half a pair \ud83c", "answer": "Paris"},
        {"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "No", "weight": 0}]},
        qa(3),
    )
    data = prepare(keys(train_file=train))
    ledger = data.ledger["datasets"]["train"]
    assert questions(data.train) == ["Question 1?", "Question 3?"]
    assert ledger["rows_lost"] == {
        "no_trained_token": 2,
        "bad_json": 1,
        "bad_schema": 1,
        "empty_answer": 1,
        "too_long": 1,
        "bad_encoding": 1,
    }
    assert sorted((e["line"], e["reason"]) for e in ledger["lost_examples"]) == [
        (2, "bad_json"),
        (3, "bad_schema"),
        (4, "empty_answer"),
        (5, "too_long"),
        (6, "no_trained_token"),
        (7, "bad_encoding"),
        (8, "no_trained_token"),
    ]
    assert {e["file"] for e in ledger["lost_examples"]} == {train}
    assert_accounts(data)


def test_a_tool_message_that_the_template_drops_is_a_template_mismatch(tmp_path, keys):
    template = (
        "{% for m in messages if m['role'] != 'tool' %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n"
        "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    turns = [("user", "Hi"), ("tool", "3"), ("assistant", "Three")]
    row = {"messages": [{"role": r, "content": c} for r, c in turns]}
    data = prepare(keys(train_file=write(tmp_path / "a.jsonl", row, qa(1))), byte_level_tokenizer(template))
    assert data.ledger["total"]["rows_lost"] == {"template_mismatch": 1}


@pytest.mark.parametrize(
    ("truncation", "tokens", "truncated", "cut"), [("left", 64, 46, 0), ("right", 64, 46, 1), ("split", 110, 0, 0)]
)
def test_truncation_is_counted(tmp_path, keys, truncation, tokens, truncated, cut):
    text = {"text": "a" * 109}
    data = prepare(keys(train_file=write(tmp_path / "a.jsonl", text), truncation=truncation))
    ledger = data.ledger["total"]
    assert (ledger["rows_trained"], ledger["answers_cut"]) == (1, cut)
    assert (ledger["tokens"]["total"], ledger["tokens"]["truncated"]) == (tokens, truncated)
    assert [len(row["input_ids"]) for row in data.train] == ([64, 46] if truncation == "split" else [64])
    assert_accounts(data)


def test_truncation_error_names_the_row(tmp_path, keys):
    train = write(tmp_path / "a.jsonl", qa(1), qa(2, "a" * 99))
    with pytest.raises(UserError) as caught:
        prepare(keys(train_file=train, truncation="error"))
    (problem,) = caught.value.problems
    assert (problem.file, problem.line, problem.key) == (train, 2, "truncation")
    assert problem.message.endswith("tokens, max_seq_length is 64")
    assert not list((tmp_path / "cache").glob("*/"))


def test_several_data_sets_each_have_a_ledger(tmp_path, keys):
    entries = [
        DatasetKeys(path=write(tmp_path / "a.jsonl", qa(1), "{broken")),
        DatasetKeys(path=write(tmp_path / "b.jsonl", qa(2), qa(3)), max_samples=1),
    ]
    evals = [DatasetKeys(path=write(tmp_path / "c.jsonl", qa(4)), name="a")]
    data = prepare(keys(datasets=entries, eval_datasets=evals))
    assert questions(data.train) == ["Question 1?", "Question 2?"]
    assert list(data.evals) == ["a"]
    assert questions(data.evals["a"]) == ["Question 4?"]
    assert {n: (d["rows_read"], d["rows_trained"]) for n, d in data.ledger["datasets"].items()} == {
        "a": (2, 1),
        "b": (1, 1),
        "eval_a": (1, 1),
    }
    assert_accounts(data)


def test_evaluating_alone_prepares_no_training_rows(tmp_path, keys):
    validation = write(tmp_path / "v.jsonl", qa(1))
    data = prepare(keys(validation_file=validation), training=False)
    assert (len(data.train), data.train_tokens) == (0, 0)
    assert questions(data.evals["validation"]) == ["Question 1?"]
    assert list(data.ledger["datasets"]) == ["validation"]
    train = write(tmp_path / "t.jsonl", *map(qa, range(10)))
    split = prepare(keys(train_file=train, validation_split=0.2), training=False)
    assert len(split.evals["validation"]) == 2


def test_duplicates_are_counted_and_dropped_with_dedupe(tmp_path, keys):
    train = write(tmp_path / "a.jsonl", qa(1), qa(2), qa(1), qa(1), qa(3), qa(1, "Other"))
    validation = write(tmp_path / "v.jsonl", qa(3), qa(3))
    counted = prepare(keys(train_file=train, validation_file=validation))
    ledger = counted.ledger["datasets"]["train"]
    assert (ledger["rows_trained"], ledger["duplicates"], ledger["in_validation"]) == (6, 2, 1)
    deduped = prepare(keys(train_file=train, validation_file=validation, dedupe=True))
    ledger = deduped.ledger["datasets"]["train"]
    assert ledger["rows_lost"] == {"duplicate": 2, "in_validation": 1}
    assert questions(deduped.train) == ["Question 1?", "Question 2?", "Question 1?"]
    # Validation rows are never dropped, only counted.
    ledger = deduped.ledger["datasets"]["validation"]
    assert (ledger["rows_trained"], ledger["duplicates"]) == (2, 1)
    require_enough_rows(keys(), deduped.ledger)


def test_a_row_of_another_training_set_is_a_duplicate(tmp_path, keys):
    entries = [DatasetKeys(path=write(tmp_path / f"{n}.jsonl", qa(1), qa(number))) for number, n in enumerate("xy", 5)]
    data = prepare(keys(datasets=entries, dedupe=True))
    assert questions(data.train) == ["Question 1?", "Question 5?", "Question 6?"]
    assert data.ledger["datasets"]["y"]["rows_lost"] == {"duplicate": 1}
    assert_accounts(data)


def test_too_many_lost_rows_are_an_error_with_the_rows(tmp_path, keys):
    train = write(tmp_path / "a.jsonl", *map(qa, range(8)), "{broken", {"a": 1})
    data = prepare(keys(train_file=train))
    require_enough_rows(keys(max_lost_fraction=0.2), data.ledger)
    with pytest.raises(UserError) as caught:
        require_enough_rows(keys(max_lost_fraction=0.19), data.ledger)
    summary, *examples = caught.value.problems
    assert summary.key == "max_lost_fraction"
    assert summary.message == (
        "2 of 10 rows of 'train' are lost (1 bad_json, 1 bad_schema): 20.0%, max_lost_fraction is 19.0%"
    )
    assert [(e.file, e.line) for e in examples] == [(train, 9), (train, 10)]
    assert examples[1].message.startswith("bad_schema: fits no known format: its keys are a; ")


def test_no_row_left_is_an_error_whatever_may_be_lost(tmp_path, keys):
    train = write(tmp_path / "a.jsonl", {"a": 1})
    data = prepare(keys(train_file=train, max_lost_fraction=0.99))
    with pytest.raises(UserError, match=r"1 of 1 rows of 'train' are lost \(1 bad_schema\)\n") as caught:
        require_enough_rows(keys(max_lost_fraction=0.99), data.ledger)
    # No max_lost_fraction would help.
    assert (caught.value.problems[0].key, "max_lost_fraction" in str(caught.value)) == (None, False)
    assert caught.value.problems[0].hint.endswith("name them with `columns:`")


def test_a_single_row_cannot_be_split(tmp_path, keys):
    data = prepare(keys(train_file=write(tmp_path / "a.jsonl", qa(1)), validation_split=0.1))
    with pytest.raises(UserError, match="validation_split: 'validation' has no rows"):
        require_enough_rows(keys(), data.ledger)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", b"", "'{file}' is empty"),
        ("a.jsonl", b" \n\n", "{file}: holds no rows"),
        ("a.json", b'[\n{"text": 1},\n{"text" 2}]', "{file}:3: not JSON: "),
        ("a.csv", b'a,b\n1,2\n"3,4', "{file}:3: not CSV: "),
        ("a.json", '[{"text":\n"é"}]'.encode("latin-1"), "{file}:2: not UTF-8: "),
        ("a.parquet", b"PAR1 broken", "{file}: not Parquet: "),
        ("a.jsonl.gz", gzip.compress(b'{"text": "a"}\n' * 99, mtime=0)[:-9], "{file}: cannot be read: "),
    ],
)
def test_files_that_cannot_be_read_are_errors_that_name_them(tmp_path, keys, name, content, message):
    file = tmp_path / name
    file.write_bytes(content)
    with pytest.raises(UserError) as caught:
        prepare(keys(train_file=str(file)))
    assert message.format(file=file) in str(caught.value)
    assert not list((tmp_path / "cache").glob("*/"))


def test_the_split_is_drawn_by_the_seed(tmp_path, keys):
    train = write(tmp_path / "a.jsonl", *map(qa, range(40)))
    first = prepare(keys(train_file=train, validation_split=0.25), seed=3)
    held = questions(first.evals["validation"])
    assert len(held) == 10
    everything = [f"Question {n}?" for n in range(40)]
    assert [q for q in everything if q not in held] == questions(first.train)  # in the order of the source
    assert [q for q in everything if q in held] == held
    other_cache = keys(train_file=train, validation_split=0.25, cache_dir=str(tmp_path / "other"))
    assert questions(prepare(other_cache, seed=3).evals["validation"]) == held
    assert questions(prepare(other_cache, seed=4).evals["validation"]) != held
    own_seed = keys(train_file=train, validation_split=0.25, shuffle_seed=3)
    assert questions(prepare(own_seed, seed=4).evals["validation"]) == held
    assert_accounts(first)


@pytest.mark.parametrize(
    ("packing", "packed"),
    [("auto", False), ("bfd", True), (False, False)],
)
def test_packing_modes(tmp_path, keys, packing, packed):
    train = write(tmp_path / "a.jsonl", *map(qa, range(9)))
    data = prepare(keys(train_file=train, packing=packing))
    assert ("seq_lengths" in data.train.column_names) is packed
    assert (data.ledger["total"]["packing"]["rows"] > 0) is packed


def test_packed_rows_hold_the_same_documents(tmp_path, keys):
    train = write(tmp_path / "a.jsonl", *(qa(n, "Paris " * n) for n in range(1, 9)))
    validation = write(tmp_path / "v.jsonl", qa(1), qa(2))
    plain = prepare(keys(train_file=train, validation_file=validation, packing=False))
    both = {"train_file": train, "validation_file": validation, "max_seq_length": 128}
    packed = prepare(keys(**both, packing="bfd", eval_packing=False))
    documents: list[tuple[np.ndarray, np.ndarray]] = []
    for row in packed.train:
        ends = np.cumsum(row["seq_lengths"])
        assert ends[-1] == len(row["input_ids"]) <= 128
        assert row["seq_lengths"].sum() == len(row["input_ids"])
        documents += zip(np.split(row["input_ids"], ends[:-1]), np.split(row["labels"], ends[:-1]), strict=True)
    assert all(labels[0] == -100 for _, labels in documents)
    assert sorted((ids.tolist(), labels.tolist()) for ids, labels in documents) == sorted(
        (row["input_ids"].tolist(), row["labels"].tolist()) for row in plain.train
    )
    assert packed.evals["validation"].column_names == ["input_ids", "labels"]
    ledger = packed.ledger["datasets"]["train"]
    assert ledger["packing"]["rows"] == len(packed.train) < 8
    assert ledger["packing"]["fill"] == round((packed.train_tokens or 0) / (128 * len(packed.train)), 6)
    assert_accounts(packed)


@pytest.mark.parametrize("packing", ["bfd", "wrapped"])
def test_the_fill_counts_only_the_packed_rows(tmp_path, keys, packing):
    large = DatasetKeys(path=write(tmp_path / "large.jsonl", *map(qa, range(40))), weight=3)
    small = DatasetKeys(path=write(tmp_path / "small.jsonl", *({"text": PARIS * n} for n in range(1, 4))), weight=1)
    validation = write(tmp_path / "v.jsonl", *map(qa, range(50, 90)))
    settings = {"datasets": [small, large], "validation_file": validation, "packing": packing, "max_seq_length": 100}
    data = prepare(keys(**settings, eval_packing=False))
    fill = round(sum(len(row["input_ids"]) for row in data.train) / (100 * len(data.train)), 6)
    assert data.ledger["total"]["packing"] == {"rows": len(data.train), "fill": fill}
    packings = {name: one["packing"] for name, one in data.ledger["datasets"].items()}
    nothing = {"rows": 0, "fill": None}
    assert packings == {"small": {"rows": len(data.train), "fill": fill}, "large": nothing, "validation": nothing}
    both = prepare(keys(**settings, eval_packing="bfd"))
    rows = [len(row["input_ids"]) for part in (both.train, both.evals["validation"]) for row in part]
    assert both.ledger["total"]["packing"] == {"rows": len(rows), "fill": round(sum(rows) / (100 * len(rows)), 6)}


def test_wrapped_texts_are_one_stream_and_no_row_is_too_long(tmp_path, keys):
    texts = [{"text": "Paris is the capital. " * n} for n in (20, 1, 30)]
    validation = write(tmp_path / "v.jsonl", {"text": "a" * 100})
    both = {"train_file": write(tmp_path / "a.jsonl", *texts), "validation_file": validation}
    data = prepare(keys(**both, packing="wrapped", eval_packing=False))
    stream = [t for one in texts for t in [*TOKENIZER.encode(one["text"]), TOKENIZER.eos_token_id]]
    assert np.concatenate([row["input_ids"] for row in data.train]).tolist() == stream
    assert all(len(row["input_ids"]) == 64 for row in list(data.train)[:-1])
    # Only `wrapped` keeps long texts whole.
    assert data.ledger["datasets"]["validation"]["rows_lost"] == {"too_long": 1}
    assert data.ledger["datasets"]["train"]["rows_lost"] == {}
    assert_accounts(data)

    other = prepare(keys(**both, packing="bfd", eval_packing="wrapped"))
    assert other.ledger["datasets"]["train"]["rows_lost"] == {"too_long": 2}
    assert [len(row["input_ids"]) for row in other.evals["validation"]] == [64, 37]
    assert_accounts(other)


def test_wrapping_several_data_sets_counts_all_tokens(tmp_path, keys):
    entries = [
        DatasetKeys(path=write(tmp_path / f"{name}.jsonl", *({"text": "abc " * n} for n in lengths)))
        for name, lengths in (("x", (40, 7)), ("y", (90, 33, 2)))
    ]
    data = prepare(keys(datasets=entries, packing="wrapped", max_seq_length=16))
    assert_accounts(data)


def test_the_second_preparation_reads_the_first_ones_cache(tmp_path, keys):
    config = keys(train_file=write(tmp_path / "a.jsonl", *map(qa, range(20)), "{broken"), validation_split=0.2)
    first, second = prepare(config), prepare(config)
    assert (first.from_cache, second.from_cache) == (False, True)
    assert first.sample == second.sample
    assert first.sample is not None
    assert (first.sample["split"], first.sample["row"]) == ("train", 0)
    assert (first.ledger, first.end_token_ids, first.train_tokens) == (
        second.ledger,
        second.end_token_ids,
        second.train_tokens,
    )
    assert list(first.evals) == list(second.evals) == ["validation"]
    for one, other in ((first.train, second.train), (first.evals["validation"], second.evals["validation"])):
        assert [(r["input_ids"].tolist(), r["labels"].tolist()) for r in one] == [
            (r["input_ids"].tolist(), r["labels"].tolist()) for r in other
        ]


def test_whatever_changes_the_data_invalidates_the_cache(tmp_path, keys):
    train = tmp_path / "a.jsonl"
    write(train, *map(qa, range(6)))

    def was_found(tokenizer: PreTrainedTokenizerFast = TOKENIZER, seed: int = 1, **values: Any) -> bool:
        return prepare(keys(train_file=str(train), **values), tokenizer, seed).from_cache

    assert [was_found(), was_found()] == [False, True]
    assert not was_found(max_seq_length=63)
    assert not was_found(train_on="all")
    assert not was_found(validation_split=0.5)
    assert not was_found(validation_split=0.5, seed=2)
    assert not was_found(byte_level_tokenizer(str(TOKENIZER.chat_template).replace("\n", " ")))
    assert not was_found(byte_level_tokenizer(vocab_size=350))
    other_eos = byte_level_tokenizer()
    other_eos.eos_token = "<|im_end|>"
    assert not was_found(other_eos)
    train.write_text(train.read_text().replace("Paris", "Parit", 1))
    assert [was_found(), was_found()] == [False, True]
    # The number of workers does not change the data.
    assert was_found(preprocessing_num_workers=1)
    # Nor does what an earlier call left in the tokenizer.
    used = byte_level_tokenizer()
    used(["Paris is", "Paris"], padding=True, truncation=True, max_length=2)
    assert was_found(used)


def prepare_in_process(config: DataKeys, ready: Any, results: multiprocessing.Queue) -> None:
    tokenizer = byte_level_tokenizer()
    ready.set()
    data = prepare(config, tokenizer)
    results.put((data.from_cache, len(data.train)))


@pytest.mark.slow
def test_two_processes_at_once_prepare_once(tmp_path, keys):
    config = keys(train_file=write(tmp_path / "a.jsonl", *map(qa, range(5000))))
    context = multiprocessing.get_context("spawn")
    ready, results = context.Event(), context.Queue()
    process = context.Process(target=prepare_in_process, args=(config, ready, results))
    process.start()
    assert ready.wait(timeout=120)
    data = prepare(config)
    found = [(data.from_cache, len(data.train)), results.get(timeout=120)]
    process.join(timeout=60)
    assert sorted(found) == [(False, 5000), (True, 5000)]


def test_the_preview_is_the_first_rows_in_source_order(tmp_path, keys, caplog):
    first = write(tmp_path / "a.jsonl", qa(1), "{broken", {"text": PARIS})
    second = write(
        tmp_path / "b.jsonl", {"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "No"}]}
    )
    validation = write(tmp_path / "v.jsonl", qa(4))
    config = keys(train_file=[first, second], validation_file=validation, system_prompt="Be brief")
    with caplog.at_level(logging.WARNING, logger="sft"):
        samples = list(preview(config, TOKENIZER, 10, seed=1))
    assert [(s["split"], s["file"], s["row"], s["format"]) for s in samples] == [
        ("train", first, 0, "qa"),
        ("train", first, 2, "text"),
        ("train", second, 3, "chat"),
        ("validation", validation, 0, "qa"),
    ]
    assert len(caplog.messages) == 1
    assert caplog.messages[0].startswith(f"{first}:2: lost: bad_json: ")

    chat, text = samples[:2]
    assert list(chat) == [
        "split",
        "file",
        "row",
        "format",
        "messages",
        "rendered",
        "input_ids",
        "labels",
        "trained_text",
    ]
    assert chat["messages"] == [
        {"role": "system", "content": "Be brief"},
        {"role": "user", "content": "Question 1?"},
        {"role": "assistant", "content": "Paris"},
    ]
    assert chat["rendered"] == (
        "<|im_start|>system\nBe brief<|im_end|>\n<|im_start|>user\nQuestion 1?<|im_end|>\n"
        "<|im_start|>assistant\nParis<|im_end|>\n"
    )
    assert chat["trained_text"] == "Paris<|im_end|>"
    assert text["text"] == text["rendered"] == PARIS
    for sample in samples:
        assert str(TOKENIZER.decode(sample["input_ids"])).removesuffix("<|endoftext|>") == sample["rendered"]
        assert len(sample["labels"]) == len(sample["input_ids"])
        assert all(label in (-100, token) for label, token in zip(sample["labels"], sample["input_ids"], strict=True))
        assert sample["labels"][0] == -100
    assert json.loads(json.dumps(samples)) == samples
    assert list(preview(config, TOKENIZER, 2, seed=1)) == samples[:2]
    assert list(preview(config, TOKENIZER, 0, seed=1)) == []


def test_the_preview_names_the_first_twenty_lost_rows_of_each_reason_and_counts_the_rest(tmp_path, keys, caplog):
    train = write(tmp_path / "a.jsonl", *["{broken"] * 25, *[{"a": 1}] * 22, *["{broken"] * 2, {"question": 1}, qa(1))
    with caplog.at_level(logging.WARNING, logger="sft"):
        (sample,) = preview(keys(train_file=train), TOKENIZER, 2, seed=1)
    assert sample["row"] == 50
    *named, rest = caplog.messages
    assert rest == "rows lost besides these: 7 bad_json, 3 bad_schema"
    lines = [(int(text.split(":")[1]), text.split(": ")[2]) for text in named]
    assert lines == [(n, "bad_json") for n in range(1, 21)] + [(n, "bad_schema") for n in range(26, 46)]
    # `prepare_data` reads the first sample too, but leaves lost rows to the ledger.
    caplog.clear()
    with caplog.at_level(logging.WARNING, logger="sft"):
        assert prepare(keys(train_file=train)).sample == sample
    assert caplog.messages == []


def test_a_preview_of_nothing_is_an_error(tmp_path, keys):
    train = write(tmp_path / "a.jsonl", "{broken", *[{"a": 1}] * 2)
    with pytest.raises(UserError) as caught:
        list(preview(keys(train_file=train), TOKENIZER, 5, seed=1))
    (problem,) = caught.value.problems
    assert problem.message == "none of 3 rows can be trained (2 bad_schema, 1 bad_json)"
    assert problem.hint.endswith("name them with `columns:`")
    # `prepare_data` continues: its ledger says more.
    assert prepare(keys(train_file=train)).sample is None


def test_the_preview_shows_what_the_preparation_makes(tmp_path, keys):
    config = keys(train_file=write(tmp_path / "a.jsonl", *map(qa, range(20))), validation_split=0.3)
    samples = list(preview(config, TOKENIZER, 20, seed=5))
    data = prepare(config, seed=5)
    assert [s["row"] for s in samples] == list(range(20))
    for split, prepared in (("train", data.train), ("validation", data.evals["validation"])):
        shown = [(s["input_ids"], s["labels"]) for s in samples if s["split"] == split]
        assert shown == [(row["input_ids"].tolist(), row["labels"].tolist()) for row in prepared]


def test_the_trained_text_is_exact_for_tokenizers_that_clean_up_what_they_decode(tmp_path, keys):
    tokenizer = byte_level_tokenizer()
    tokenizer.clean_up_tokenization_spaces = True
    config = keys(train_file=write(tmp_path / "a.jsonl", qa(1, "No , it 's not .")))
    (sample,) = preview(config, tokenizer, 1, seed=1)
    assert sample["trained_text"] == "No , it 's not .<|im_end|>"


def test_validation_conversations_are_held_out_rows_that_end_with_an_answer(tmp_path, keys):
    rows: list[Any] = [qa(1), {"text": PARIS}, "{broken", {"a": 1}, qa(2), qa(3)]
    ends_with_a_question = [{"role": "assistant", "content": "Hi"}, {"role": "user", "content": "Yes?"}]
    validation = write(tmp_path / "v.jsonl", {"messages": ends_with_a_question}, *rows)
    # No training data is needed, and none is read.
    found = validation_conversations(keys(validation_file=validation), TOKENIZER, seed=1, limit=2)
    assert [c.messages[-2]["content"] for c in found] == ["Question 1?", "Question 2?"]
    config = keys(train_file=write(tmp_path / "a.jsonl", *map(qa, range(20))), validation_split=0.3)
    found = validation_conversations(config, TOKENIZER, seed=5, limit=99)
    assert [c.messages[-2]["content"] for c in found] == questions(prepare(config, seed=5).evals["validation"])


def test_a_validation_row_that_is_lost_is_replaced_by_the_next(tmp_path, keys):
    template = "{% if messages[0]['content'] == 'Question 0?' %}{{ raise_exception('no') }}{% endif %}" + CHATML
    refused, pair, long = qa(0), qa(2, "half \ud83d of a pair"), qa(5, "x" * 500)
    rows = [refused, qa(1), pair, qa(3), qa(4), long]
    config = keys(validation_file=write(tmp_path / "v.jsonl", *rows), truncation="drop")
    found = validation_conversations(config, byte_level_tokenizer(template), seed=1, limit=3)
    assert [c.messages[0]["content"] for c in found] == ["Question 1?", "Question 3?", "Question 4?"]
    found = validation_conversations(config, byte_level_tokenizer(template), seed=1, limit=99)
    assert [c.messages[0]["content"] for c in found] == ["Question 1?", "Question 3?", "Question 4?"]


def test_weights_mix_the_data_sets_and_every_row_stays_accounted_for(tmp_path, keys):
    large = write(tmp_path / "large.jsonl", *map(qa, range(90)))
    small = write(tmp_path / "small.jsonl", *map(qa, range(100, 110)))
    entries = [DatasetKeys(path=large, weight=1), DatasetKeys(path=small, weight=1.0)]
    data = prepare(keys(datasets=entries))
    found = data.ledger["datasets"]
    assert (found["large"]["rows_trained"], found["large"]["rows_lost"]) == (50, {"not_drawn": 40})
    assert (found["small"]["rows_trained"], found["small"]["rows_lost"], found["small"]["passes"]) == (10, {}, 5.0)
    assert len(data.train) == 100
    assert (
        data.train_tokens == sum(len(row["input_ids"]) for row in data.train) == data.ledger["total"]["tokens"]["total"]
    )
    assert sorted(questions(data.train)) == sorted(questions(prepare(keys(datasets=entries, packing=False)).train))
    assert_accounts(data)
    packed = prepare(keys(datasets=entries, packing="bfd", max_seq_length=128))
    assert sum(len(row["seq_lengths"]) for row in packed.train) == 100
    by_tokens = prepare(keys(datasets=entries, mix_by="tokens"))
    tokens = [by_tokens.ledger["datasets"][name]["tokens"]["total"] for name in ("large", "small")]
    assert abs(tokens[0] - tokens[1]) < 60


def test_reasoning_that_the_template_drops_is_counted(tmp_path, keys):
    messages = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Yes", "reasoning_content": "hm"}]
    data = prepare(keys(train_file=write(tmp_path / "a.jsonl", {"messages": messages}, qa(1))))
    assert data.ledger["total"]["thoughts_left_out"] == 1


@pytest.mark.parametrize(("family", "left_out"), [("llama31", 1), ("mistral_v3", 1), ("qwen25", 0), ("chatml", 0)])
def test_a_text_beside_a_call_that_the_template_does_not_write_is_counted(tmp_path, keys, family, left_out):
    def row(content: str | None) -> dict[str, Any]:
        call = {"id": "123456789", "function": {"name": "count", "arguments": {"of": 1}}}
        calling = {"role": "assistant", "content": content, "tool_calls": [call]}
        answer = {"role": "tool", "content": "3", "tool_call_id": "123456789"}
        return {
            "messages": [{"role": "user", "content": "Hi"}, calling, answer, {"role": "assistant", "content": "3."}]
        }

    file = write(tmp_path / "a.jsonl", row("I look.\n"), row(None), row(" "), qa(1))
    ledger = prepare(keys(train_file=file, max_seq_length=999), tokenizer_of(family)).ledger["total"]
    assert (ledger["rows_trained"], ledger["texts_left_out"]) == (4, left_out)


@given(any_rows)
@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.too_slow])
def test_any_row_is_encoded_or_lost(row):
    ledger = Ledger()
    source = DataSource("train", "train_file", "auto", None, "assistant")
    (documents,) = RowEncoder(TOKENIZER, DataKeys()).encode([Row("a.json", 7, 1, row)], source, ledger, Seen(set()))
    assert len(documents) + ledger.rows_lost.total() == ledger.rows_read == 1
    for ids, labels in documents:
        assert labels[0] == -100
        assert documents.rows.tolist() == [7]
        assert (labels[labels != -100] == ids[labels != -100]).all()


@pytest.mark.parametrize(
    ("name", "rows", "formats"),
    [
        ("alpaca_en_demo.json", 999, {"alpaca": 999}),
        ("identity.json", 91, {"alpaca": 91}),
        ("dolly.json", 12, {"qa": 12}),
        ("glaive_toolcall_en_demo.json", 300, {"chat": 300}),
        ("c4_demo.jsonl", 300, {"text": 300}),
        ("wiki_demo.txt", 30, {"text": 30}),
    ],
)
def test_real_files_lose_no_row(shared_data, keys, name, rows, formats):
    data = prepare(keys(train_file=str(shared_data / "formats" / name), max_seq_length=1 << 20))
    ledger = data.ledger["total"]
    assert (ledger["rows_read"], ledger["rows_lost"]) == (rows, {})
    assert ledger["formats"] == formats
    assert len(data.train) == rows
