"""Parses a JSON array value by value through a window on its text; the array is never held in memory."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from typing import Any, TextIO

from sft.data.json_values import DECODER, DuplicateKey

WINDOW_SIZE = 1 << 18  # characters read at a time; doubled for a longer value
_MARGIN = 16  # characters; longer than any JSON literal or part of a number that the window may cut
_COMMA = re.compile(r"[ \t\n\r]*,[ \t\n\r]*")
_BLANKS = re.compile(r"[ \t\n\r]*")
_LENIENT_DECODER = json.JSONDecoder()


class _Window:
    """A piece of the text, its place in the whole text, and the current position."""

    def __init__(self, stream: TextIO, size: int) -> None:
        self.stream, self.size, self.text, self.at = stream, size, "", 0
        self.line, self.column = 1, 0  # of the first character of `text`: lines count from 1, columns from 0
        self.is_last = False

    def extend(self) -> None:
        """Drops what was parsed and reads more; doubles the window when nothing could be dropped."""
        parsed = self.text[: self.at]
        newlines = parsed.count("\n")
        self.line += newlines
        self.column = len(parsed) - parsed.rfind("\n") - 1 if newlines else self.column + len(parsed)
        rest = self.text[self.at :]
        more = self.stream.read(max(self.size, len(rest)))
        self.text, self.at, self.is_last = rest + more, 0, not more

    def peek(self) -> str:
        """Skips blanks and returns the next character without consuming it; empty at the end."""
        while True:
            self.at = _BLANKS.match(self.text, self.at).end()  # type: ignore[union-attr]
            if self.at < len(self.text) or self.is_last:
                return self.text[self.at : self.at + 1]
            self.extend()

    def read_value(self) -> tuple[Any, DuplicateKey | None]:
        """Parses the value at the position and moves past it; returns it with its duplicate key, if it has one."""
        decoder, duplicate = DECODER, None
        while True:
            try:
                value, end = decoder.raw_decode(self.text, self.at)
            except DuplicateKey as error:
                decoder, duplicate = _LENIENT_DECODER, error  # to find the value's end
                continue
            except json.JSONDecodeError as error:
                if self.is_last or not self._is_cut(error):
                    raise self.error(error.msg, error.pos) from None
                self.extend()
                continue
            if end > len(self.text) - _MARGIN and not self.is_last:  # a number may continue: 1 is 1.5, 1e is 1e9
                self.extend()
                continue
            self.at = end
            return value, duplicate

    def _is_cut(self, error: json.JSONDecodeError) -> bool:
        """Tells whether the end of the window may have caused the error."""
        return error.msg.startswith("Unterminated string") or error.pos >= len(self.text) - _MARGIN

    def error(self, message: str, at: int) -> json.JSONDecodeError:
        """Makes an error with its line and column in the whole text."""
        error = json.JSONDecodeError(message, self.text, at)
        error.colno += self.column if error.lineno == 1 else 0
        error.lineno += self.line - 1
        return error


def array_values(stream: TextIO, window_size: int = WINDOW_SIZE) -> Iterator[tuple[Any, DuplicateKey | None]]:
    """Yields the values of the array in `stream`, each with its duplicate key (such a value is invalid) or None.

    A value that the window cuts is parsed again with more text; the window doubles, which keeps the cost linear.

    Raises:
        json.JSONDecodeError: with the line and column in the whole text.
        ValueError: a number with thousands of digits.
        RecursionError: thousands of nested brackets.
    """
    window = _Window(stream, window_size)
    assert window.peek() == "["
    window.at += 1
    character = window.peek()
    while character != "]":
        yield window.read_value()
        comma = _COMMA.match(window.text, window.at)
        if comma and comma.end() < len(window.text):  # nearly always; otherwise the window may end here
            window.at = comma.end()
            continue
        character = window.peek()
        if character == ",":
            window.at += 1
            window.peek()
        elif character != "]":
            raise window.error("Expecting ',' delimiter", window.at)
    window.at += 1
    if window.peek():
        raise window.error("Extra data", window.at)
