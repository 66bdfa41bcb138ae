"""The one form that every row is brought into: a conversation, or a text. And what becomes of a row that has none."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from sft.data.json_values import kind_of, loads

Message = dict[str, Any]


class RowLost(Exception):
    """A row that cannot be trained: `reason` is what the ledger counts, `message` says why."""

    def __init__(self, reason: str, message: str) -> None:
        self.reason = reason
        self.message = message
        super().__init__(f"{reason}: {message}")


@dataclass(frozen=True, slots=True)
class Conversation:
    """Messages as a chat template takes them, and which of them may be trained.

    Attributes:
        format: the shape that was detected.
        messages: `{"role", "content", ...}` in order.
        trainable: for each message, whether its author lets it be trained (assistant turns only).
        tools: JSON schemas of the tools that the model may call.
    """

    format: str
    messages: list[Message]
    trainable: list[bool]
    tools: list[dict[str, Any]] | None = None

    @property
    def ends_with_answer(self) -> bool:
        """Whether the last message is the assistant's, in words: a call of a tool can be written in many ways."""
        last = self.messages[-1] if self.messages else {}
        return last.get("role") == "assistant" and isinstance(last.get("content"), str) and not last.get("tool_calls")


@dataclass(frozen=True, slots=True)
class Text:
    """A document that is trained whole."""

    text: str
    format: str = "text"


def as_text(value: Any, key: str) -> str:
    """The text of a value that is one, or a number. Raises `RowLost` for anything else."""
    if isinstance(value, str):
        return value
    if isinstance(value, int) and not isinstance(value, bool):
        return str(value)
    if isinstance(value, float) and math.isfinite(value):
        return json.dumps(value)
    found = value if isinstance(value, float) else kind_of(value)  # NaN is how tables write a value that is missing
    raise RowLost("bad_schema", f"{key}: expected text, found {found}")


def parse_json(text: str, what: str) -> Any:
    """The value of JSON text. Raises `RowLost`, which names `what` it stands in."""
    try:
        return loads(text)
    except (ValueError, RecursionError) as error:
        raise RowLost("bad_schema", f"{what}: not JSON: {error}") from None


def require_characters(text: str) -> None:
    """Raises `RowLost` for half of a surrogate pair, which JSON can write and no tokenizer takes."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise RowLost("bad_encoding", f"{text[error.start]!r} is half of a surrogate pair, and no character") from None


def keys_of(row: Mapping[str, Any]) -> str:
    """A row's keys as a message names them."""
    keys = ", ".join(str(key)[:60] for key in list(row)[:20])
    keys = keys.encode("utf-8", "backslashreplace").decode()  # half of a surrogate pair could not be printed
    return f"its keys are {keys or 'none'}" + (f" and {len(row) - 20} more" if len(row) > 20 else "")
