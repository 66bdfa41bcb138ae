"""The verb `generate`: a file of prompts answered in one go, or a chat; both from the folder of a trained model."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from sft.chat import talk
from sft.errors import Problem, UserError
from sft.prompts import read_prompts
from sft.replies import GREEDY, ExactMatch, Message, Sampling, exact_match, generate_replies
from sft.trained_models import load_trained

__all__ = ["ExactMatch", "Sampling", "chat", "exact_match", "generate_replies", "run_batch"]


def _row(conversation: list[Message], reply: str) -> dict[str, Any]:
    alone = len(conversation) == 1 and conversation[0]["role"] == "user"
    asked = {"prompt": conversation[0]["content"]} if alone else {"messages": conversation}
    return {**asked, "response": reply}


def _write(rows: Sequence[dict[str, Any]], out: Path | None) -> None:
    text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    if out is None:
        sys.stdout.write(text)
        return
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(text, encoding="utf-8")


def run_batch(
    model_dir: str | Path,
    prompts_file: str | Path,
    out: str | Path | None,
    sampling: Sampling = GREEDY,
    batch_size: int = 8,
) -> list[dict[str, Any]]:
    """Answer every prompt of a file and write one JSON line for each: `prompt` (or `messages`) and `response`.

    Prompts are read before the model is loaded, and a place to write is made sure of, so that a mistake costs nothing.

    Args:
        out: the file; None writes to stdout.

    Returns:
        What was written.

    Raises:
        UserError: a prompt, the model, or the place to write is wrong.
    """
    conversations = read_prompts(prompts_file)
    path = None if out is None else Path(out).expanduser()
    if path is not None and path.is_dir():
        raise UserError(Problem(f"{str(path)!r} is a folder", "Name a file.", key="--output"))
    model, tokenizer = load_trained(model_dir, merge_for_speed=True)
    from rich.console import Console
    from rich.progress import Progress

    with Progress(console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task("Answering", total=len(conversations))
        replies = generate_replies(
            model,
            tokenizer,
            conversations,
            sampling,
            batch_size=batch_size,
            on_progress=lambda done: progress.advance(task, done),
        )
    rows = [_row(conversation, reply) for conversation, reply in zip(conversations, replies, strict=True)]
    _write(rows, path)
    return rows


def chat(model_dir: str | Path, sampling: Sampling = GREEDY) -> list[Message]:
    """Talk with a trained model in the terminal until /quit or the end of the input; returns the conversation.

    Raises:
        UserError: the folder holds no model.
    """
    model, tokenizer = load_trained(model_dir, merge_for_speed=True)
    return talk(model, tokenizer, sampling)
