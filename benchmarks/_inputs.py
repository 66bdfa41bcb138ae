"""The inputs of the benchmarks: chats, a tokenizer of realistic size, rendered texts, document lengths."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from itertools import accumulate, islice
from pathlib import Path
from typing import Any

import numpy as np

VOCABULARY = 32_000
# Splits text into words like the tokenizers of GPT-4 and Llama 3: contractions, letters, 1 to 3 digits, signs, blanks.
SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_WORDS = 20_000  # of the generated text, with frequencies by Zipf's law


def build_tokenizer(folder: Path, source: Path, rows: list[dict[str, str]]) -> None:
    """Trains a byte-level BPE of 32,000 entries with ChatML's control tokens, and saves it with its template.

    It is trained on `rows`, and on the text files next to the folder of `source` where there are any.
    """
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

    from examples.tokenizer import CONTROL_TOKENS, with_chat_template

    backend = Tokenizer(models.BPE())
    split = pre_tokenizers.Split(Regex(SPLIT), "isolated")
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.pre_tokenizer = pre_tokenizers.Sequence([split, byte_level])
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=list(CONTROL_TOKENS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    names = ("wiki_demo.txt", "alpaca_en_demo.json", "c4_demo.jsonl")
    texts = [file for name in names if (file := source.parent.parent / "formats" / name).is_file()]
    corpus = [text for row in rows for text in row.values()] + [file.read_text(encoding="utf-8") for file in texts]
    backend.train_from_iterator(corpus, trainer)
    with_chat_template(backend).save_pretrained(folder)


def name_source(source: Path) -> str:
    """Returns the name of the data for the report."""
    return source.parent.name if source.is_file() else "generated text"


def read_questions(file: Path | None) -> list[dict[str, str]]:
    """Reads rows of `question` and `answer` from `file`; without it, generates 7,473 with lengths like gsm8k's."""
    if file is not None and file.is_file():
        with file.open(encoding="utf-8") as lines:
            return [{key: row[key] for key in ("question", "answer")} for row in map(json.loads, lines)]
    return list(islice(_generated_questions(), 7473))


def _generated_questions() -> Iterator[dict[str, str]]:
    rng = random.Random(0)
    letters = "etaoinshrdlucmfwygpbvk"
    words = ["".join(rng.choices(letters, range(22, 0, -1), k=rng.randint(2, 9))) for _ in range(_WORDS)]
    running = list(accumulate(1 / rank for rank in range(1, _WORDS + 1)))
    while True:
        row = {}
        for key, mean in (("question", 45), ("answer", 52)):  # gsm8k's mean numbers of words
            count = max(5, round(rng.lognormvariate(0, 0.4) * mean))
            text = rng.choices(words, cum_weights=running, k=count)
            row[key] = " ".join(str(rng.randint(1, 500)) if rng.random() < 0.12 else word for word in text) + "."
        yield row


def write_chats(file: Path, questions: list[dict[str, str]], rows: int, distinct: bool = False) -> None:
    """Writes `rows` chats of one question and one answer, repeating `questions` in order.

    Args:
        distinct: each repeat gets other digits and a number in front, so no row is repeated.
    """
    with file.open("w", encoding="utf-8") as stream:
        for at in range(rows):
            row = questions[at % len(questions)]
            question, answer = row["question"], row["answer"]
            repeat = at // len(questions)
            if distinct and repeat:
                other = str.maketrans("0123456789", "".join(str((digit + repeat) % 10) for digit in range(10)))
                question, answer = f"{repeat}. {question.translate(other)}", answer.translate(other)
            messages = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
            stream.write(json.dumps({"messages": messages}, ensure_ascii=False) + "\n")


def write_rendered(file: Path, chats: Path, tokenizer: Any) -> None:
    """Writes each row of `chats` as rendered by the chat template, one JSON string per line."""
    with chats.open(encoding="utf-8") as lines, file.open("w", encoding="utf-8") as stream:
        for line in lines:
            text = tokenizer.apply_chat_template(json.loads(line)["messages"], tokenize=False)
            stream.write(json.dumps(text, ensure_ascii=False) + "\n")


def log_normal_lengths(count: int, mean: float, limit: int) -> np.ndarray:
    """Draws document lengths like those of chat data: (count,) int64 in 1..limit, log-normal with sigma 0.7."""
    sigma = 0.7
    drawn = np.random.default_rng(0).lognormal(np.log(mean) - sigma**2 / 2, sigma, count)
    return np.clip(np.rint(drawn), 1, limit).astype(np.int64)
