"""The verb `generate`: a file of prompts answered in one go, or a chat; both from the folder of a trained model."""

from __future__ import annotations

import json
import logging
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from sft.data.formats.conversation import Conversation, Message
from sft.data.formats.normalize import with_system
from sft.errors import Problem, UserError
from sft.inference.chat import talk
from sft.inference.generate import GREEDY, Sampling, generate_replies
from sft.inference.prompts import read_prompts
from sft.model.tokenizer import remembered_system_prompt
from sft.model.trained import load_trained

__all__ = ["Sampling", "chat", "generate_replies", "run_batch"]
logger = logging.getLogger("sft")


def _row(conversation: Conversation, reply: str) -> dict[str, Any]:
    messages = conversation.messages
    alone = len(messages) == 1 and messages[0]["role"] == "user"
    asked: dict[str, Any] = {"prompt": messages[0]["content"]} if alone else {"messages": messages}
    tools = {"tools": conversation.tools} if conversation.tools else {}
    return {**asked, **tools, "response": reply}


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
    *,
    system: str | None = None,
    trust_remote_code: bool = False,
) -> list[dict[str, Any]]:
    """Answer every prompt of a file and write one JSON line for each: `prompt` (or `messages`, `tools`) and `response`.

    Prompts are read before the model is loaded, and a place to write is made sure of, so that a mistake costs nothing.

    Args:
        out: the file; None writes to stdout.
        system: put before every conversation that has no system message of its own. None is what the model was trained
            behind, an empty text nothing.
        trust_remote_code: run the code that the model's folder or its base brings along.

    Returns:
        What was written.

    Raises:
        UserError: a prompt, the model, or the place to write is wrong.
    """
    conversations = read_prompts(prompts_file)
    path = None if out is None else Path(out).expanduser()
    if path is not None and path.is_dir():
        raise UserError(Problem(f"{str(path)!r} is a folder", "Name a file.", key="--output"))
    model, tokenizer = load_trained(model_dir, merge_for_speed=True, trust_remote_code=trust_remote_code)
    system = _system(tokenizer, system)
    conversations = [with_system(conversation, system) for conversation in conversations]
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


def _system(tokenizer: Any, asked: str | None) -> str | None:
    """The system prompt that was asked for, else that of the training, which is said aloud."""
    if asked is not None:
        return asked or None
    trained = remembered_system_prompt(tokenizer)
    if trained:
        logger.info("System prompt, as in training: %r (--system TEXT gives another, --system '' none)", trained)
    return trained


def chat(
    model_dir: str | Path,
    sampling: Sampling = GREEDY,
    *,
    system: str | None = None,
    trust_remote_code: bool = False,
) -> list[Message]:
    """Talk with a trained model in the terminal until /quit or the end of the input; returns the conversation.

    Args:
        system, trust_remote_code: as for `run_batch`.

    Raises:
        UserError: the folder holds no model.
    """
    model, tokenizer = load_trained(model_dir, merge_for_speed=True, trust_remote_code=trust_remote_code)
    return talk(model, tokenizer, sampling, system=_system(tokenizer, system))
