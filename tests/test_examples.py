"""The shipped example: made from a seed, small, in four formats, without operands shared by its splits."""

from __future__ import annotations

import csv
import json
import random
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from examples.make_examples import CORPUS_ROWS, ROWS, SEED, make_corpus, make_data, make_tokenizer, texts_of
from examples.tasks import OPERANDS, SENTENCE_WORDS, TASKS, held_out, make_operand

ROOT = Path(__file__).resolve().parents[1]
DATA = ROOT / "examples" / "data"
MODEL = ROOT / "examples" / "tiny_llama"
SPLITS = ("train", "validation")
NAMES = {"alpaca": "alpaca.json", "chat": "chat.jsonl", "qa": "qa.csv", "text": "text.txt"}
SHAPES = {"word": "[a-z]{3,6}", "number": "[0-9]{3,4}", "pair": "[0-9]{1,2} and [0-9]{1,2}"}


def read_rows(split: str, kind: str) -> list[dict[str, Any]]:
    """Reads the rows of a committed file with the standard library only."""
    text = (DATA / split / NAMES[kind]).read_text(encoding="utf-8")
    if kind == "alpaca":
        return json.loads(text)
    if kind == "chat":
        return [json.loads(line) for line in text.splitlines()]
    if kind == "qa":
        return list(csv.DictReader(text.splitlines()))
    return [{"text": line} for line in text.splitlines()]


def exchanges(split: str) -> list[tuple[str, str]]:
    """Returns every (request, answer) of a split in any format; an alpaca input follows its instruction."""
    pairs = [(f"{row['instruction']} {row['input']}".strip(), row["output"]) for row in read_rows(split, "alpaca")]
    for row in read_rows(split, "chat"):
        turns = [message["content"] for message in row["messages"] if message["role"] != "system"]
        pairs += zip(turns[::2], turns[1::2], strict=True)
    return pairs + [(row["question"], row["answer"]) for row in read_rows(split, "qa")]


def readings(request: str) -> set[tuple[str, str]]:
    """Returns each (task, operand) that `request` can mean, from its words alone."""
    found = set()
    for name, task in TASKS.items():
        for form in (*task.orders, *task.questions, *(f"{text} {{x}}" for text in task.instructions)):
            pattern = re.escape(form).replace(r"\{x\}", f"({SHAPES[task.kind]})")
            if match := re.fullmatch(pattern, request):
                found.add((name, match[1]))
    return found


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    """The committed tokenizer, as a user loads it."""
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(MODEL)


def test_the_same_seed_gives_the_committed_files(tmp_path: Path) -> None:
    made = [path.relative_to(tmp_path).as_posix() for path in make_data(tmp_path, SEED)]
    assert made == [f"{split}/{name}" for split in SPLITS for name in NAMES.values()]
    assert sorted(made) == sorted(path.relative_to(DATA).as_posix() for path in DATA.rglob("*") if path.is_file())
    for name in made:
        assert (tmp_path / name).read_bytes() == (DATA / name).read_bytes(), name


def test_another_seed_gives_other_files(tmp_path: Path) -> None:
    for path in make_data(tmp_path, SEED + 1):
        assert path.read_bytes() != (DATA / path.relative_to(tmp_path)).read_bytes(), path.name


def test_the_corpus_is_deterministic_and_has_no_held_out_operands(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(CORPUS_ROWS, "train", 2000)
    monkeypatch.setitem(CORPUS_ROWS, "validation", 50)
    train, validation = make_corpus(tmp_path / "once", SEED)
    assert [path.read_bytes() for path in make_corpus(tmp_path / "again", SEED)] == [
        train.read_bytes(),
        validation.read_bytes(),
    ]
    for path, rows, is_held_out in ((train, 2000, False), (validation, 50, True)):
        pages = [json.loads(line)["text"] for line in path.read_text(encoding="utf-8").splitlines()]
        assert len(pages) == rows
        headed = [line.partition(": ")[0] for page in pages for line in page.splitlines() if re.match("[^.]+: ", line)]
        assert len(headed) > rows / 2
        assert {held_out(operand) for operand in headed} == {is_held_out}


@pytest.mark.parametrize("kind", sorted(OPERANDS))
def test_an_operand_belongs_to_one_split(kind: str) -> None:
    rng = random.Random(0)
    train = {make_operand(kind, rng, validation=False) for _ in range(3000)}
    validation = {make_operand(kind, rng, validation=True) for _ in range(300)}
    assert not train & validation
    assert not (train | validation) & SENTENCE_WORDS
    assert all(re.fullmatch(SHAPES[kind], operand) for operand in train | validation)


def test_the_committed_splits_share_no_operand() -> None:
    operands = {
        split: {operand for request, _ in exchanges(split) for _, operand in readings(request)} for split in SPLITS
    }
    assert len(operands["train"]) > 1000
    assert len(operands["validation"]) > 150
    assert not operands["train"] & operands["validation"]
    documents = {split: {row["text"] for row in read_rows(split, "text")} for split in SPLITS}
    assert not documents["train"] & documents["validation"]


@pytest.mark.parametrize("split", SPLITS)
def test_no_row_is_repeated_in_any_format(split: str) -> None:
    texts = [texts_of(row) for kind in NAMES for row in read_rows(split, kind)]
    assert len(texts) == len(set(texts)) == sum(ROWS[split].values())
    assert texts_of({"instruction": "Spell it.", "input": "abo", "output": "a-b-o"}) == ("Spell it.\n\nabo", "a-b-o")
    assert texts_of({"instruction": "Spell abo.", "input": "", "output": "a-b-o"}) == ("Spell abo.", "a-b-o")


@pytest.mark.parametrize("split", SPLITS)
def test_every_request_is_unambiguous_and_its_answer_is_right(split: str) -> None:
    for request, answer in exchanges(split):
        ((task, operand),) = readings(request)
        assert answer == TASKS[task].solve(operand), request


def test_answers_of_each_task_by_hand() -> None:
    by_hand = {
        "reverse": ("tamo", "omat"),
        "capitals": ("tamo", "TAMO"),
        "twice": ("tamo", "tamo tamo"),
        "first": ("tamo", "t"),
        "last": ("tamo", "o"),
        "length": ("tamo", "4"),
        "spell": ("tamo", "t-a-m-o"),
        "next": ("4099", "4100"),
        "sort": ("5095", "0559"),
        "sum": ("19 and 3", "22"),
        "larger": ("19 and 3", "19"),
        "smaller": ("19 and 3", "3"),
    }
    assert {name: (operand, TASKS[name].solve(operand)) for name, (operand, _) in by_hand.items()} == by_hand
    assert by_hand.keys() == TASKS.keys()


@pytest.mark.parametrize("split", SPLITS)
def test_rows_have_the_declared_format(split: str) -> None:
    assert {kind: len(read_rows(split, kind)) for kind in NAMES} == ROWS[split]
    alpaca, chat = read_rows(split, "alpaca"), read_rows(split, "chat")
    assert {tuple(row) for row in alpaca} == {("instruction", "input", "output")}
    assert {bool(row["input"]) for row in alpaca} == {True, False}
    assert {tuple(row) for row in chat} == {("messages",)}
    roles = {tuple(message["role"] for message in row["messages"]) for row in chat}
    turn = ("user", "assistant")
    assert roles == {system + turn * count for system in ((), ("system",)) for count in (1, 2, 3)}
    assert {tuple(row) for row in read_rows(split, "qa")} == {("question", "answer")}
    assert all(row["text"].strip() == row["text"] != "" for row in read_rows(split, "text"))
    values = [value for kind in ("alpaca", "qa") for row in read_rows(split, kind) for value in row.values()]
    assert all(isinstance(value, str) for value in values)


def test_sizes() -> None:
    assert sum(path.stat().st_size for path in DATA.rglob("*") if path.is_file()) < 1.5e6
    assert sum(path.stat().st_size for path in MODEL.iterdir()) < 4e6


def test_the_tokenizer_is_the_committed_one(tmp_path: Path) -> None:
    make_tokenizer(tmp_path)
    names = sorted(path.name for path in tmp_path.iterdir())
    assert names == ["chat_template.jinja", "tokenizer.json", "tokenizer_config.json"]
    for name in names:
        assert (tmp_path / name).read_bytes() == (MODEL / name).read_bytes(), name


@pytest.mark.parametrize("split", SPLITS)
def test_the_tokenizer_round_trips_every_text(tokenizer: Any, split: str) -> None:
    texts = [text for pair in exchanges(split) for text in pair]
    texts += [row["text"] for row in read_rows(split, "text")]
    texts += [message["content"] for row in read_rows(split, "chat") for message in row["messages"]]
    for text, ids in zip(texts, tokenizer(texts)["input_ids"], strict=True):
        assert tokenizer.decode(ids) == text
        assert not set(ids) & set(tokenizer.all_special_ids)


def test_the_tokenizer_reads_operands_letter_by_letter_and_any_text(tokenizer: Any) -> None:
    pieces = [tokenizer.decode(token) for token in tokenizer("Reverse the word tamo.")["input_ids"]]
    assert pieces == ["Reverse", " the", " word", " ", "t", "a", "m", "o", "."]
    for text in ("Grüße, 世界!\n\t\U0001f600", "  two  spaces ", "THE The the", "a\u0301"):
        assert tokenizer.decode(tokenizer(text)["input_ids"]) == text


def test_the_chat_template_ends_each_turn_with_the_eos(tokenizer: Any) -> None:
    messages = [{"role": "user", "content": "Spell tamo."}, {"role": "assistant", "content": "t-a-m-o"}]
    prompt = "<|im_start|>user\nSpell tamo.<|im_end|>\n<|im_start|>assistant\n"
    assert tokenizer.apply_chat_template(messages[:1], tokenize=False, add_generation_prompt=True) == prompt
    whole = tokenizer.apply_chat_template(messages, tokenize=False)
    assert whole == prompt + "t-a-m-o<|im_end|>\n"
    assert tokenizer(whole)["input_ids"].count(tokenizer.eos_token_id) == 2
    assert (tokenizer.eos_token, tokenizer.pad_token) == ("<|im_end|>", "<|endoftext|>")


def test_the_model_is_the_one_that_the_recipe_makes(tokenizer: Any) -> None:
    recipe = yaml.safe_load((ROOT / "configs" / "pretrain_tiny.yaml").read_text(encoding="utf-8"))
    config = json.loads((MODEL / "config.json").read_text(encoding="utf-8"))
    assert {name: config[name] for name in recipe["from_scratch"]} == recipe["from_scratch"]
    assert config["vocab_size"] == len(tokenizer)
    assert config["eos_token_id"] == tokenizer.eos_token_id


def test_the_sample_config_names_what_is_shipped() -> None:
    sample = yaml.safe_load((ROOT / "sample_config.yaml").read_text(encoding="utf-8"))
    assert ROOT / sample["model_name_or_path"] == MODEL
    assert ROOT / sample["train_file"] == DATA / "train"
    assert ROOT / sample["validation_file"] == DATA / "validation"
    assert sample["exact_match_samples"] == 200


@pytest.mark.slow
def test_the_sample_config_trains_the_tasks(tmp_path: Path) -> None:
    command = [sys.executable, "sft_main.py", "--config_file", "sample_config.yaml", "--output_dir", str(tmp_path)]
    # The whole run takes one to two minutes; the limit is for a machine that is busy with other things.
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=600)
    assert run.returncode == 0, run.stderr[-2000:]
    results = json.loads((tmp_path / "logs" / "eval_results.json").read_text(encoding="utf-8"))
    assert results["exact_match_before"] < 0.05
    assert results["exact_match_after"] > 0.8
