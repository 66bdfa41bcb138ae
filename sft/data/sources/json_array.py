"""The values of a JSON array one by one, from a window on its text: the array is never held in memory."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from typing import Any, TextIO

from sft.data.json_values import DECODER, DuplicateKey

_WINDOW = 1 << 18  # characters read at a time, and doubled for a value that is longer
_MARGIN = 16  # characters: no word or number sign of JSON, cut anywhere, is longer
_comma = re.compile(r"[ \t\n\r]*,[ \t\n\r]*")
_blanks = re.compile(r"[ \t\n\r]*")
_PLAIN = json.JSONDecoder()


class _Window:
    """A piece of the text, its place in the whole, and a position in it."""

    def __init__(self, stream: TextIO) -> None:
        self.stream, self.text, self.at = stream, "", 0
        self.line, self.column = 1, 0  # of the first character of `text`: lines before it count from 1, columns from 0
        self.is_last = False

    def extend(self) -> None:
        """Lets go of what was read and adds more, twice as much when nothing could be let go of."""
        passed = self.text[: self.at]
        feeds = passed.count("\n")
        self.line += feeds
        self.column = len(passed) - passed.rfind("\n") - 1 if feeds else self.column + len(passed)
        rest = self.text[self.at :]
        more = self.stream.read(max(_WINDOW, len(rest)))
        self.text, self.at, self.is_last = rest + more, 0, not more

    def next_character(self) -> str:
        """The next one that is no blank, which stays; empty at the end."""
        while True:
            self.at = _blanks.match(self.text, self.at).end()  # type: ignore[union-attr]
            if self.at < len(self.text) or self.is_last:
                return self.text[self.at : self.at + 1]
            self.extend()

    def take(self) -> tuple[Any, DuplicateKey | None]:
        """The value at the position, and the reason why it is none; the position moves behind it."""
        decoder, twice = DECODER, None
        while True:
            try:
                value, end = decoder.raw_decode(self.text, self.at)
            except DuplicateKey as error:
                decoder, twice = _PLAIN, error  # which finds the value's end
                continue
            except json.JSONDecodeError as error:
                if self.is_last or not self._may_go_on(error):
                    raise self.located(error.msg, error.pos) from None
                self.extend()
                continue
            if end > len(self.text) - _MARGIN and not self.is_last:  # a number may go on: 1 is 1.5, 1e is 1e9
                self.extend()
                continue
            self.at = end
            return value, twice

    def _may_go_on(self, error: json.JSONDecodeError) -> bool:
        return error.msg.startswith("Unterminated string") or error.pos >= len(self.text) - _MARGIN

    def located(self, message: str, at: int) -> json.JSONDecodeError:
        """The error, with its line and column in the whole text."""
        error = json.JSONDecodeError(message, self.text, at)
        error.colno += self.column if error.lineno == 1 else 0
        error.lineno += self.line - 1
        return error


def array_values(stream: TextIO) -> Iterator[tuple[Any, DuplicateKey | None]]:
    """The values of the array that `stream` holds, each with the reason why it is none or None.

    A value that is cut at the end of the window is read again with more text, so that the cost stays linear.

    Raises:
        json.JSONDecodeError: with the line and column in the whole text.
        ValueError: a number of thousands of digits.
        RecursionError: thousands of brackets.
    """
    window = _Window(stream)
    assert window.next_character() == "["
    window.at += 1
    if window.next_character() == "]":
        window.at += 1
    else:
        while True:
            yield window.take()
            comma = _comma.match(window.text, window.at)
            if comma and comma.end() < len(window.text):  # nearly always; else the window may end here
                window.at = comma.end()
                continue
            character = window.next_character()
            if character not in (",", "]"):
                raise window.located("Expecting ',' delimiter", window.at)
            window.at += 1
            if character == "]":
                break
            window.next_character()
    if window.next_character():
        raise window.located("Extra data", window.at)
