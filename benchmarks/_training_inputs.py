"""The inputs of the training benchmarks: chats in the format of each contestant, model folders, workers' arguments."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks._inputs import build_tokenizer, name_source, read_questions
from benchmarks._models import Shape, save_model


@dataclass(frozen=True)
class Contestant:
    """A worker of `_train_contestants`, its own settings and arguments, and the packages that it needs."""

    name: str
    worker: str
    needs: tuple[str, ...] = ()
    settings: dict[str, Any] = field(default_factory=dict)
    extra: dict[str, Any] = field(default_factory=dict)

    def arguments(self, model: Path, rows: Path, mean_length: float, **given: Any) -> dict[str, Any]:
        """Returns the worker's arguments, `given` ones included; `rows` is the file of chats without its suffix."""
        defaults = {"dtype": "bfloat16", "save": False, "lora": False, "quantized": False, "cut_cross_entropy": False}
        files = {"model": str(model), "chats": f"{rows}.jsonl", "pairs": f"{rows}.pairs.jsonl"}
        return {**files, "mean_length": mean_length, "settings": self.settings, **defaults, **given, **self.extra}


def write_pairs(chats: Path, pairs: Path, questions: list[dict[str, str]], rows: int, joined: int = 1) -> None:
    """Writes `rows` chats in two formats, repeating `questions` in order.

    Args:
        chats: gets `messages` of one question and one answer.
        pairs: gets the same as `prompt` and `completion`, of which TRL trains the completion only.
        joined: questions per row, for long rows.
    """
    with chats.open("w", encoding="utf-8") as one, pairs.open("w", encoding="utf-8") as other:
        for row in range(rows):
            asked = [questions[(row * joined + n) % len(questions)] for n in range(joined)]
            question = {"role": "user", "content": "\n".join(item["question"] for item in asked)}
            answer = {"role": "assistant", "content": "\n".join(item["answer"] for item in asked)}
            one.write(json.dumps({"messages": [question, answer]}, ensure_ascii=False) + "\n")
            other.write(json.dumps({"prompt": [question], "completion": [answer]}, ensure_ascii=False) + "\n")


def mean_length(chats: Path, tokenizer: Any, sampled: int = 1000) -> float:
    """Returns the mean tokens of a row, rendered by the template, over the first `sampled` rows."""
    with chats.open(encoding="utf-8") as lines:
        messages = [json.loads(line)["messages"] for line, _ in zip(lines, range(sampled), strict=False)]
    texts = [tokenizer.apply_chat_template(row, tokenize=False) for row in messages]
    return sum(map(len, tokenizer(texts, add_special_tokens=False)["input_ids"])) / len(texts)


def inputs(arguments: dict[str, Any]) -> dict[str, Any]:
    """Makes the tokenizer, the model folders and the files of rows.

    Args:
        arguments: `work`, `source`; `shapes` by the names of their folders; `files`: for each name its `rows` and
            how many questions are `joined` in each.

    Returns:
        `tokenizer`, `data`, and `means`: mean tokens of a row, by file name.
    """
    from transformers import AutoTokenizer

    work, source = Path(arguments["work"]), Path(arguments["source"])
    questions = read_questions(source)
    folder = work / "tokenizer"
    build_tokenizer(folder, source, questions)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    means = {}
    for name, of_it in arguments["files"].items():
        chats = work / f"{name}.jsonl"
        write_pairs(chats, work / f"{name}.pairs.jsonl", questions, **of_it)
        means[name] = mean_length(chats, tokenizer)
    for name, shape in arguments["shapes"].items():
        save_model(work / name, Shape(**shape), str(folder))
    return {"tokenizer": str(folder), "data": name_source(source), "means": means}


def model_on_device(arguments: dict[str, Any]) -> dict[str, Any]:
    """Initializes a large model on the device, in bfloat16, and saves it: seconds instead of minutes."""
    folder, shape = Path(arguments["folder"]), Shape(**arguments["shape"])
    save_model(folder, shape, arguments["tokenizer"], arguments["device"], "bfloat16")
    return {}
