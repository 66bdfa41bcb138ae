"""Prompts for generation from a file: a text file with one a line, or JSON rows in the shapes that training takes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from sft.errors import Problem, UserError

Message = dict[str, Any]
QUESTION_KEYS = ("prompt", "question", "problem", "input")
ROLES = ("system", "user", "assistant", "tool")


class _Wrong(ValueError):
    """One row is wrong; the caller knows where it stands."""


def _text(row: dict[str, Any], key: str) -> str:
    value = row[key]
    if not isinstance(value, str) or not value.strip():
        raise _Wrong(f"`{key}` is {value!r}, not a text")
    return value


def _from_messages(value: Any) -> list[Message]:
    if not isinstance(value, list) or not value:
        raise _Wrong(f"`messages` is {value!r:.80}, not a list of messages")
    for number, message in enumerate(value):
        if not isinstance(message, dict) or not isinstance(message.get("content"), str):
            raise _Wrong(f"message {number} has no text in `content`")
        if message.get("role") not in ROLES:
            raise _Wrong(f"message {number} has the role {message.get('role')!r}, not one of {', '.join(ROLES)}")
    if value[-1]["role"] == "assistant":  # a training row: its answer is what is asked for
        value = value[:-1]
    if not value or value[-1]["role"] not in ("user", "tool"):
        raise _Wrong("the conversation does not end with something to answer")
    return value


def _conversation(row: Any) -> list[Message]:
    if isinstance(row, str):
        return [{"role": "user", "content": _text({"prompt": row}, "prompt")}]
    if not isinstance(row, dict):
        raise _Wrong(f"a prompt is a text or an object, not {type(row).__name__}")
    if "messages" in row:
        return _from_messages(row["messages"])
    if "instruction" in row:
        question = _text(row, "instruction")
        if row.get("input"):
            question += "\n\n" + _text(row, "input")
    else:
        key = next((key for key in QUESTION_KEYS if key in row), None)
        if key is None:
            known = ", ".join(("messages", "instruction", *QUESTION_KEYS))
            raise _Wrong(f"none of {known} is in it; it has {', '.join(map(str, row)) or 'no key'}")
        question = _text(row, key)
    system = [{"role": "system", "content": _text(row, "system")}] if row.get("system") else []
    return [*system, {"role": "user", "content": question}]


def _rows(path: Path, text: str) -> list[tuple[int | None, Any]]:
    """Each row with its line, where the format has lines."""
    if path.suffix == ".txt":
        return [(n, line) for n, line in enumerate(text.splitlines(), 1) if line.strip()]
    if path.suffix == ".json":
        try:
            loaded = json.loads(text)
        except ValueError as error:
            line = getattr(error, "lineno", None)
            raise UserError(Problem(f"not valid JSON: {error}", file=str(path), line=line)) from error
        if not isinstance(loaded, list):
            raise UserError(Problem("not a list of prompts", file=str(path)))
        return [(None, row) for row in loaded]
    if path.suffix != ".jsonl":
        raise UserError(Problem(f"unknown kind of file: {path.suffix!r}", "Use .txt, .jsonl or .json.", file=str(path)))
    rows: list[tuple[int | None, Any]] = []
    problems = []
    for number, line in enumerate(text.splitlines(), 1):
        if line.strip():
            try:
                rows.append((number, json.loads(line)))
            except ValueError as error:
                problems.append(Problem(f"not valid JSON: {error}", file=str(path), line=number))
    if problems:
        raise UserError(*problems)
    return rows


def read_prompts(path: str | Path) -> list[list[Message]]:
    """The conversations to answer, in the order of the file.

    A .txt file has one question a line. Rows of .jsonl and .json have `messages`, `instruction` (with `input`),
    `prompt`, `question`, `problem` or `input`, and may have `system`; a conversation that ends with an answer is asked
    without it, so that a training file can be used as it is.

    Raises:
        UserError: the file is missing, empty, of an unknown kind, or has rows that are none of these: all at once, each
            with its line.
    """
    path = Path(path).expanduser()
    try:
        text = path.read_text(encoding="utf-8-sig")
    except OSError as error:
        raise UserError(Problem(f"cannot read it: {error.strerror}", key="--prompts", file=str(path))) from error
    except UnicodeDecodeError as error:
        raise UserError(Problem(f"not UTF-8: {error.reason}", key="--prompts", file=str(path))) from error
    conversations, problems = [], []
    for index, (line, row) in enumerate(_rows(path, text)):
        try:
            conversations.append(_conversation(row))
        except _Wrong as error:
            where = "" if line is not None else f"row {index}: "
            problems.append(Problem(where + str(error), file=str(path), line=line))
    if problems:
        raise UserError(*problems)
    if not conversations:
        raise UserError(Problem("holds no prompt", key="--prompts", file=str(path)))
    return conversations
