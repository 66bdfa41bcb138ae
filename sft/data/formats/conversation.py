"""The common form of all rows, `Conversation` or `Text`, and `RowLost` for a row that has neither."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from sft.data.json_values import kind_of, loads

Message = dict[str, Any]


class RowLost(Exception):
    """Raised for a row that cannot be trained: `reason` is what the ledger counts, `message` says why."""

    def __init__(self, reason: str, message: str) -> None:
        self.reason = reason
        self.message = message
        super().__init__(f"{reason}: {message}")


@dataclass(frozen=True, slots=True)
class Conversation:
    """Messages as chat templates expect them, and which of them may be trained.

    Attributes:
        format: the shape that was detected.
        messages: `{"role", "content", ...}` in order.
        trainable: for each message, whether the data allows to train it (assistant turns only).
        tools: JSON schemas of the tools that the model may call.
    """

    format: str
    messages: list[Message]
    trainable: list[bool]
    tools: list[dict[str, Any]] | None = None

    @property
    def ends_with_answer(self) -> bool:
        """Whether the last message is an assistant's text; not a tool call, which can be written in many ways."""
        last = self.messages[-1] if self.messages else {}
        return last.get("role") == "assistant" and isinstance(last.get("content"), str) and not last.get("tool_calls")


@dataclass(frozen=True, slots=True)
class Text:
    """A document that is trained whole."""

    text: str
    format: str = "text"


def as_text(value: Any, key: str) -> str:
    """Returns a text as it is and a number as text. Raises `RowLost` for anything else."""
    if isinstance(value, str):
        return value
    if isinstance(value, int) and not isinstance(value, bool):
        return str(value)
    if isinstance(value, float) and math.isfinite(value):
        return json.dumps(value)
    found = value if isinstance(value, float) else kind_of(value)  # tables write NaN for a missing value
    raise RowLost("bad_schema", f"{key}: expected text, found {found}")


def parse_json(text: str, what: str) -> Any:
    """Parses JSON text. Raises `RowLost`, whose message names `what` was parsed."""
    try:
        return loads(text)
    except (ValueError, RecursionError) as error:
        raise RowLost("bad_schema", f"{what}: not JSON: {error}") from None


def require_valid_unicode(text: str) -> None:
    """Raises `RowLost` for half of a surrogate pair, which JSON can contain and no tokenizer accepts."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise RowLost("bad_encoding", f"{text[error.start]!r} is half of a surrogate pair, not a character") from None


def list_keys(row: Mapping[str, Any]) -> str:
    """Lists a row's keys for a message."""
    keys = ", ".join(str(key)[:60] for key in list(row)[:20])
    keys = keys.encode("utf-8", "backslashreplace").decode()  # half of a surrogate pair cannot be printed
    return f"its keys are {keys or 'none'}" + (f" and {len(row) - 20} more" if len(row) > 20 else "")
