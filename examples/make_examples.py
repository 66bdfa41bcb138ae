"""Makes the example data, the tokenizer and the pretraining corpus from one seed.

    .venv/bin/python -m examples.make_examples           # data/ and the tokenizer in tiny_llama/, which are committed
    .venv/bin/python -m examples.make_examples --corpus  # also the corpus that configs/pretrain_tiny.yaml trains on

The same seed gives the same bytes on every machine. Run it from the repository's root.
"""

from __future__ import annotations

import argparse
import csv
import json
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from examples.tasks import SYSTEM_PROMPTS, TASKS, Task, list_sentences, make_entry, make_operand, make_page
from examples.tokenizer import build_tokenizer

HERE = Path(__file__).resolve().parent
CORPUS = HERE.parent / "outputs" / "pretrain_corpus"
SEED = 7
MAX_LENGTH = 512  # positions of the example model
ROWS = {
    "train": {"alpaca": 1000, "chat": 1000, "qa": 1000, "text": 300},
    "validation": {"alpaca": 80, "chat": 80, "qa": 80, "text": 40},
}
FILES = {"alpaca": "alpaca.json", "chat": "chat.jsonl", "qa": "qa.csv", "text": "text.txt"}
CORPUS_ROWS = {"train": 58_000, "validation": 200}

Row = dict[str, Any]


def draw_problems(rng: random.Random, validation: bool) -> Iterator[tuple[Task, str, str]]:
    """Yields (task, operand, answer) without end, in shuffled rounds of all tasks, each equally often."""
    while True:
        for task in rng.sample(list(TASKS.values()), k=len(TASKS)):
            operand = make_operand(task.kind, rng, validation)
            yield task, operand, task.solve(operand)


def alpaca_row(problems: Iterator[tuple[Task, str, str]], rng: random.Random) -> Row:
    """Returns `instruction`, `input`, `output`; in a third of the rows without input, the operand in `instruction`."""
    task, operand, answer = next(problems)
    if rng.random() < 1 / 3:
        return {"instruction": rng.choice(task.orders).format(x=operand), "input": "", "output": answer}
    return {"instruction": rng.choice(task.instructions), "input": operand, "output": answer}


def chat_row(problems: Iterator[tuple[Task, str, str]], rng: random.Random) -> Row:
    """Returns `messages` of one to three turns, a third of them after a system prompt."""
    messages = []
    if rng.random() < 1 / 3:
        messages.append({"role": "system", "content": rng.choice(SYSTEM_PROMPTS)})
    for _ in range(rng.choices((1, 2, 3), weights=(6, 3, 1))[0]):
        task, operand, answer = next(problems)
        messages.append({"role": "user", "content": rng.choice(task.orders + task.questions).format(x=operand)})
        messages.append({"role": "assistant", "content": answer})
    return {"messages": messages}


def qa_row(problems: Iterator[tuple[Task, str, str]], rng: random.Random) -> Row:
    """Returns `question` and `answer`."""
    task, operand, answer = next(problems)
    return {"question": rng.choice(task.questions).format(x=operand), "answer": answer}


def texts_of(row: Row) -> tuple[str, ...]:
    """Returns the texts of a row as the model reads them, to compare rows of different formats."""
    if "messages" in row:
        return tuple(message["content"] for message in row["messages"])
    if row.get("input"):
        return f"{row['instruction']}\n\n{row['input']}", row["output"]
    return tuple(text for text in row.values() if text)


def make_rows(kind: str, count: int, rng: random.Random, validation: bool, seen: set[tuple[str, ...]]) -> list[Row]:
    """Makes `count` rows of the format `kind` whose texts are not in `seen`, and adds them to it."""
    problems = draw_problems(rng, validation)
    makers = {
        "alpaca": lambda: alpaca_row(problems, rng),
        "chat": lambda: chat_row(problems, rng),
        "qa": lambda: qa_row(problems, rng),
        "text": lambda: {"text": make_entry(rng, validation)},
    }
    rows: list[Row] = []
    while len(rows) < count:
        row = makers[kind]()
        if texts_of(row) not in seen:
            seen.add(texts_of(row))
            rows.append(row)
    return rows


def write_rows(path: Path, rows: list[Row]) -> None:
    """Writes rows in the format of the suffix, one a line: JSON array, JSON Lines, CSV with a header, plain text."""
    if path.suffix == ".csv":
        with path.open("w", encoding="utf-8", newline="") as file:
            writer = csv.DictWriter(file, fieldnames=list(rows[0]), lineterminator="\n")
            writer.writeheader()
            writer.writerows(rows)
        return
    lines = [row["text"] if path.suffix == ".txt" else json.dumps(row) for row in rows]
    text = "[\n" + ",\n".join(lines) + "\n]" if path.suffix == ".json" else "\n".join(lines)
    path.write_text(text + "\n", encoding="utf-8")


def make_data(folder: Path, seed: int) -> list[Path]:
    """Writes four files each to `train/` and `validation/`, and returns their paths."""
    written = []
    for split, counts in ROWS.items():
        (folder / split).mkdir(parents=True, exist_ok=True)
        seen: set[tuple[str, ...]] = set()
        for kind, count in counts.items():
            path = folder / split / FILES[kind]
            rng = random.Random(f"{seed} {split} {kind}")
            write_rows(path, make_rows(kind, count, rng, split == "validation", seen))
            written.append(path)
    return written


def make_tokenizer(folder: Path) -> None:
    """Writes the tokenizer in Hugging Face layout; it depends on the sentences, not on the seed."""
    build_tokenizer(list_sentences(), MAX_LENGTH).save_pretrained(folder)


def make_corpus(folder: Path, seed: int) -> list[Path]:
    """Writes the plain-text corpus, one document per row, and returns the paths of its two splits."""
    folder.mkdir(parents=True, exist_ok=True)
    written = []
    for split, count in CORPUS_ROWS.items():
        rng = random.Random(f"{seed} {split} corpus")
        path = folder / f"{split}.jsonl"
        write_rows(path, [{"text": make_page(rng, split == "validation")} for _ in range(count)])
        written.append(path)
    return written


def main() -> None:
    """Writes the files that the command line asks for."""
    parser = argparse.ArgumentParser(description="Make the example data and tokenizer, and the pretraining corpus.")
    parser.add_argument("--seed", type=int, default=SEED)
    parser.add_argument("--data", type=Path, default=HERE / "data", help="where the example data goes")
    parser.add_argument("--tokenizer", type=Path, default=HERE / "tiny_llama", help="where the tokenizer goes")
    parser.add_argument(
        "--corpus", type=Path, nargs="?", const=CORPUS, help=f"also write the corpus, to {CORPUS} unless named"
    )
    options = parser.parse_args()
    written = make_data(options.data, options.seed)
    make_tokenizer(options.tokenizer)
    written += make_corpus(options.corpus, options.seed) if options.corpus else []
    for path in written:
        print(f"{path}  {path.stat().st_size / 1e6:.2f} MB")


if __name__ == "__main__":
    main()
