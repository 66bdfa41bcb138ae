"""Answers a file of prompts with a trained model, one JSON line per prompt."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import Progress

from sft.data.formats.conversation import Conversation
from sft.data.formats.normalize import with_system
from sft.errors import Problem, UserError
from sft.inference.generate import GREEDY, Sampling, generate_replies
from sft.inference.prompts import choose_system_prompt, read_prompts
from sft.model.trained_models import load_trained


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
    """Answers every prompt of a file and writes one JSON line for each: `prompt` (or `messages`, `tools`), `response`.

    The prompts are read and the output path is checked before the model is loaded.

    Args:
        out: the file; None writes to stdout.
        system: the system prompt of conversations that have none of their own: None is the one of the training, an
            empty text is none.
        trust_remote_code: run the code in the folder of the model or of its base.

    Returns:
        The rows written.

    Raises:
        UserError: a prompt, the model, or the output path is wrong.
    """
    prompts = read_prompts(prompts_file)
    path = None if out is None else Path(out).expanduser()
    if path is not None and path.is_dir():
        raise UserError(Problem(f"{str(path)!r} is a folder", "Name a file.", key="--output"))
    model, tokenizer = load_trained(model_dir, merge_for_speed=True, trust_remote_code=trust_remote_code)
    system = choose_system_prompt(tokenizer, system)
    prompts = [with_system(prompt, system) for prompt in prompts]
    with Progress(console=Console(stderr=True), transient=True) as progress:
        advance = partial(progress.advance, progress.add_task("Answering", total=len(prompts)))
        replies = generate_replies(model, tokenizer, prompts, sampling, batch_size=batch_size, on_progress=advance)
    rows = [_make_row(prompt, reply) for prompt, reply in zip(prompts, replies, strict=True)]
    _write(rows, path)
    return rows


def _make_row(conversation: Conversation, reply: str) -> dict[str, Any]:
    messages = conversation.messages
    is_single_question = len(messages) == 1 and messages[0]["role"] == "user"
    prompt: dict[str, Any] = {"prompt": messages[0]["content"]} if is_single_question else {"messages": messages}
    tools = {"tools": conversation.tools} if conversation.tools else {}
    return {**prompt, **tools, "response": reply}


def _write(rows: Sequence[dict[str, Any]], out: Path | None) -> None:
    text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    if out is None:
        sys.stdout.write(text)
        return
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(text, encoding="utf-8")
