"""Escapes control tokens that were typed into a message: they are content, not structure.

`<|im_end|>` in a user's message would end the turn when the text is tokenized. Before a conversation is rendered, one
character of each such text is replaced by a private use character (a mark). Afterwards the character is restored, and
the span is reported for encoding as plain text. Positions never move.

A text that ends with the beginning of a control token (`<|im_`) is marked there as well: the template may write the
next text, which has the rest, directly after it.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedTokenizerBase

from sft.data.formats.conversation import Message, RowLost

Span = tuple[int, int]
_FIRST_MARK = 0xF0000  # Unicode's second private use plane: 65,534 characters without a meaning
_MARKS = re.compile("[\U000f0000-\U000ffffd]")
_ESCAPED_MARK = re.compile(r"\\(U000f|udb[89a-f])", re.IGNORECASE)  # as Python's repr and JSON's ASCII write them
_MARKUP = re.compile(r"[<\[‹＜].*[>\]›＞]", re.DOTALL)


@dataclass(frozen=True, slots=True)
class _Token:
    text: str
    at: int  # index of the character that is replaced
    mark: str

    @property
    def escaped(self) -> str:
        return self.text[: self.at] + self.mark + self.text[self.at + 1 :]


class ControlTokens:
    """The control tokens of one tokenizer and its template.

    An added token is one of them if it is flagged special, if the template writes it, or if it looks like markup
    (`<think>`, `[INST]`). In assistant messages only special tokens and the end token count: models are meant to write
    `<think>` or `<tool_call>` themselves. Other added tokens are ordinary words.

    Args:
        tokenizer: its added tokens are considered.
        written: what its template writes: its source, and conversations that it rendered.
        end_token: the token that ends an answer.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, written: str, end_token: str) -> None:
        added = [t for t in tokenizer.added_tokens_decoder.values() if t.content and not t.content.isspace()]
        special = {t.content for t in added if t.special} | {end_token}
        control = special | {t.content for t in added if t.content in written or _MARKUP.fullmatch(t.content)}
        ordered = sorted(control, key=lambda text: (-len(text), text))
        self._tokens = {
            text: _Token(text, min(1, len(text) - 1), chr(_FIRST_MARK + number)) for number, text in enumerate(ordered)
        }
        self._by_mark = {token.mark: token for token in self._tokens.values()}
        self._in_all = _compile_any(control)
        self._in_answers = _compile_any(special)
        self._prefixes = {text[:end] for text in control for end in range(1, len(text))}
        self._longest_prefix = max(map(len, self._prefixes), default=0)
        firsts = sorted({text[0] for text in self._prefixes})
        self._first_marks = {first: chr(_FIRST_MARK + len(ordered) + number) for number, first in enumerate(firsts)}
        self._characters = {mark: token.text[token.at] for mark, token in self._by_mark.items()}
        self._characters |= {mark: first for first, mark in self._first_marks.items()}

    def find(self, messages: list[Message], tools: Any) -> str | None:
        """Returns the first control token typed in the conversation, or None."""
        for message in messages:
            pattern = self._pattern(message)
            if match := pattern.search(message["content"]):
                return match[0]
            if len(message) > 2 and (found := _search(pattern, _content(message))):
                return found
        return _search(self._in_all, tools) if tools else None

    def ends_inside(self, messages: list[Message]) -> bool:
        """Tells whether a message ends inside a control token, whose rest may begin the next message."""
        return any(self._find_prefix(message["content"]) is not None for message in messages)

    def _find_prefix(self, text: str) -> int | None:
        """Returns where the earliest beginning of a control token at the end of `text` starts, or None."""
        tail = text[-self._longest_prefix :] if self._longest_prefix else ""
        if self._first_marks.keys().isdisjoint(tail):  # true of nearly all texts
            return None
        starts = (at for at in range(len(tail)) if tail[at] in self._first_marks and tail[at:] in self._prefixes)
        at = next(starts, None)
        return None if at is None else len(text) - len(tail) + at

    def escape(self, messages: list[Message], tools: Any) -> tuple[list[Message], Any]:
        """Marks the typed control tokens in a copy of the conversation; each text keeps its length.

        Raises:
            RowLost: `bad_schema` when the text itself contains a private use character, which would look like a mark.
        """
        if found := _search(_MARKS, [messages, tools]):
            raise RowLost("bad_schema", f"contains a control token and the private use character U+{ord(found):X}")
        escaped = [{**m, **self._replace(self._pattern(m), _content(m))} for m in messages]
        return escaped, self._replace(self._in_all, tools)

    def unescape(self, text: str) -> tuple[str, list[Span]]:
        """Restores the characters of a rendered text and returns the spans to be encoded as plain text.

        Raises:
            RowLost: `template_mismatch` when the template wrote a mark as an escape sequence.
        """
        if _ESCAPED_MARK.search(text):
            raise RowLost("template_mismatch", "the chat template escapes a text that contains a control token")
        inert: list[Span] = []
        restored = _MARKS.sub(lambda mark: self._characters[mark[0]], text)
        for mark in _MARKS.finditer(text):
            token = self._by_mark.get(mark[0])
            if token is None:  # the mark of a beginning
                completed = self._in_all.match(restored, mark.start())
                inert += [completed.span()] if completed else []
            else:
                start = mark.start() - token.at
                if text.startswith(token.escaped, start):  # a token that the template cut apart is harmless text
                    inert.append((start, start + len(token.text)))
        return restored, sorted(inert)

    def _pattern(self, message: Message) -> re.Pattern[str]:
        return self._in_answers if message["role"] == "assistant" else self._in_all

    def _replace(self, pattern: re.Pattern[str], value: Any) -> Any:
        if isinstance(value, str):
            escaped = pattern.sub(lambda match: self._tokens[match[0]].escaped, value)
            at = self._find_prefix(escaped)
            return escaped if at is None else escaped[:at] + self._first_marks[escaped[at]] + escaped[at + 1 :]
        if isinstance(value, dict):
            return {self._replace(pattern, key): self._replace(pattern, inner) for key, inner in value.items()}
        if isinstance(value, list):
            return [self._replace(pattern, inner) for inner in value]
        return value


def _content(message: Message) -> dict[str, Any]:
    """Returns all of a message except its role, which the pipeline sets."""
    return {key: value for key, value in message.items() if key != "role"}


def _compile_any(texts: set[str]) -> re.Pattern[str]:
    longest_first = sorted(texts, key=len, reverse=True)
    return re.compile("|".join(map(re.escape, longest_first)) or "(?!)")


def _search(pattern: re.Pattern[str], value: Any) -> str | None:
    """Returns the first match in a text, or in the keys and values of nested objects and lists."""
    if isinstance(value, str):
        match = pattern.search(value)
        return match[0] if match else None
    if isinstance(value, dict):
        value = [*value, *value.values()]
    if not isinstance(value, list):
        return None
    return next((found for part in value if (found := _search(pattern, part))), None)
