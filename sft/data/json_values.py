"""Reads JSON and rejects what Python's reader accepts silently: a key that appears twice in one object.

Also answers the questions about parsed values that readers of files and of rows share.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from typing import Any

_MESSAGE_KEYS = ({"role", "content"}, {"role", "tool_calls"}, {"role", "function_call"}, {"from", "value"})


class DuplicateKey(ValueError):
    """Raised for an object with the same key twice: nobody can know which of its values was meant."""

    def __init__(self, key: str) -> None:
        super().__init__(f"the key {key[:60]!r} appears twice in one object")


def _build_object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    built = dict(pairs)
    if len(built) != len(pairs):
        keys = [key for key, _ in pairs]
        raise DuplicateKey(next(key for key in keys if keys.count(key) > 1))
    return built


DECODER = json.JSONDecoder(object_pairs_hook=_build_object)
_scan = DECODER.scan_once  # type: ignore[attr-defined]  # undocumented


def loads(text: str) -> Any:
    """Parses JSON text.

    Raises:
        ValueError: `json.JSONDecodeError`, `DuplicateKey`, or a number with thousands of digits.
        RecursionError: thousands of nested brackets.
    """
    try:
        value, end = _scan(text, 0)  # skipping the search for blanks around the value saves a third of a row's time
        if end == len(text):
            return value
    except StopIteration:  # leading blanks, or not JSON
        pass
    return DECODER.decode(text)


def is_messages(value: Iterable[Any]) -> bool:
    """Tells whether all items are messages, with OpenAI's keys or ShareGPT's."""
    return all(isinstance(item, dict) and any(keys <= item.keys() for keys in _MESSAGE_KEYS) for item in value)


def kind_of(value: Any) -> str:
    """Names a value's type for a message."""
    return "null" if value is None else type(value).__name__


def shown(value: Any) -> str:
    """Quotes the beginning of a value for a message."""
    try:
        return repr(str(value)[:60])
    except (RecursionError, ValueError):  # nested too deeply to print, or a number with thousands of digits
        return kind_of(value)
