"""JSON without the one thing that Python's reader passes over in silence: a key that stands twice in an object."""

from __future__ import annotations

import json
from collections.abc import Iterable
from typing import Any


class DuplicateKey(ValueError):
    """An object has the same key twice; which of its values was meant cannot be known."""

    def __init__(self, key: str) -> None:
        super().__init__(f"the key {key[:60]!r} stands twice in one object")


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    made = dict(pairs)
    if len(made) != len(pairs):
        keys = [key for key, _ in pairs]
        raise DuplicateKey(next(key for key in keys if keys.count(key) > 1))
    return made


DECODER = json.JSONDecoder(object_pairs_hook=_object)
_scan = DECODER.scan_once  # type: ignore[attr-defined]  # json's documentation leaves it out


def loads(text: str) -> Any:
    """The value of JSON text.

    Raises:
        ValueError: `json.JSONDecodeError`, `DuplicateKey`, or a number of thousands of digits.
        RecursionError: thousands of brackets.
    """
    try:
        value, end = _scan(text, 0)  # without the search for blanks around the value, a third of the time of a row
        if end == len(text):
            return value
    except StopIteration:  # blanks in front, or no JSON
        pass
    return DECODER.decode(text)


def is_messages(value: Iterable[Any]) -> bool:
    """Whether all are messages, by OpenAI's keys or ShareGPT's."""
    keys = ({"role", "content"}, {"role", "tool_calls"}, {"role", "function_call"}, {"from", "value"})
    return all(isinstance(item, dict) and any(both <= item.keys() for both in keys) for item in value)


def kind_of(value: Any) -> str:
    """A value's type as a message names it."""
    return "null" if value is None else type(value).__name__


def shown(value: Any) -> str:
    """The beginning of a value as a message shows it."""
    try:
        return repr(str(value)[:60])
    except (RecursionError, ValueError):  # nested too deeply to be written, a number of thousands of digits
        return kind_of(value)
