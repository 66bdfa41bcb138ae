"""Control tokens that somebody typed into a message: text to be read, not structure to be obeyed.

`<|im_end|>` in a user's message would end the turn as soon as the tokenizer met it. So before a conversation is
rendered each such text gets one of its characters replaced by a private one, which no tokenizer knows; afterwards the
character is put back, and the encoder is told to encode those characters as plain text. Positions never move.

A text that ends with the beginning of one (`<|im_`) is marked there as well: the template may write another text right
behind it that has the rest.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedTokenizerBase

from sft.data.formats.conversation import Message, RowLost

Span = tuple[int, int]
_FIRST_MARK = 0xF0000  # Unicode's second private use plane: 65,534 characters that mean nothing to anybody
_MARKS = re.compile("[\U000f0000-\U000ffffd]")
_ESCAPED_MARK = re.compile(r"\\(U000f|udb[89a-f])", re.IGNORECASE)  # as Python's repr and JSON's ASCII write them
_MARKUP = re.compile(r"[<\[‹＜].*[>\]›＞]", re.DOTALL)


@dataclass(frozen=True, slots=True)
class _Token:
    text: str
    at: int  # which character is replaced
    mark: str

    @property
    def hidden(self) -> str:
        return self.text[: self.at] + self.mark + self.text[self.at + 1 :]


class ControlTokens:
    """The control tokens of one tokenizer and its template.

    A token is one of them when it is flagged special, when the template writes it, or when it is written like one
    (`<think>`, `[INST]`). In the assistant's own messages only the first kind and the end token are: models are meant
    to write `<think>` or `<tool_call>` themselves. Other added tokens are words that somebody taught the tokenizer.

    Args:
        tokenizer: whose added tokens are looked at.
        written: what its template writes: its source, and conversations that it rendered.
        end_token: what ends an answer.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, written: str, end_token: str) -> None:
        added = [t for t in tokenizer.added_tokens_decoder.values() if t.content and not t.content.isspace()]
        special = {t.content for t in added if t.special} | {end_token}
        all_of_them = special | {t.content for t in added if t.content in written or _MARKUP.fullmatch(t.content)}
        ordered = sorted(all_of_them, key=lambda text: (-len(text), text))
        self._tokens = {
            text: _Token(text, min(1, len(text) - 1), chr(_FIRST_MARK + number)) for number, text in enumerate(ordered)
        }
        self._by_mark = {token.mark: token for token in self._tokens.values()}
        self._in_all = _any_of(all_of_them)
        self._in_answers = _any_of(special)
        self._begun = {text[:end] for text in all_of_them for end in range(1, len(text))}
        self._longest = max(map(len, self._begun), default=0)
        firsts = sorted({text[0] for text in self._begun})
        self._first_marks = {first: chr(_FIRST_MARK + len(ordered) + number) for number, first in enumerate(firsts)}
        self._firsts = {mark: first for first, mark in self._first_marks.items()}

    def find(self, messages: list[Message], tools: Any) -> str | None:
        """The first control token that is typed in the conversation; None when there is none."""
        for message in messages:
            pattern = self._in_answers if message["role"] == "assistant" else self._in_all
            if match := pattern.search(message["content"]):
                return match[0]
            if len(message) > 2 and (found := _search(pattern, _content(message))):
                return found
        return _search(self._in_all, tools) if tools else None

    def begins(self, messages: list[Message]) -> bool:
        """Whether a message ends with the beginning of a control token, whose rest may stand in the next."""
        return any(self._beginning(message["content"]) is not None for message in messages)

    def _beginning(self, text: str) -> int | None:
        """Where the beginning of a control token stands at the end of `text`, the earliest one; None without."""
        tail = text[-self._longest :] if self._longest else ""
        if self._first_marks.keys().isdisjoint(tail):  # true of nearly all texts
            return None
        starts = (at for at in range(len(tail)) if tail[at] in self._first_marks and tail[at:] in self._begun)
        at = next(starts, None)
        return None if at is None else len(text) - len(tail) + at

    def hide(self, messages: list[Message], tools: Any) -> tuple[list[Message], Any]:
        """The same conversation with the typed control tokens marked; each text keeps its length.

        Raises:
            RowLost: `bad_schema` when the text has a private character of its own, which would be taken for a mark.
        """
        if found := _search(_MARKS, [messages, tools]):
            raise RowLost("bad_schema", f"control tokens beside the private use character U+{ord(found):X}")
        hidden = [{**m, **self._replace(self._pattern(m), _content(m))} for m in messages]
        return hidden, self._replace(self._in_all, tools)

    def reveal(self, text: str) -> tuple[str, list[Span]]:
        """The rendered text with its characters put back, and the spans to be encoded as plain text.

        Raises:
            RowLost: `template_mismatch` when the template has escaped a marked character, so that it is lost.
        """
        if _ESCAPED_MARK.search(text):
            raise RowLost("template_mismatch", "the chat template escapes a text that holds a control token")
        inert: list[Span] = []
        pieces: list[str] = []
        begun: list[int] = []
        last = 0
        for match in _MARKS.finditer(text):
            if match[0] in self._firsts:
                pieces += [text[last : match.start()], self._firsts[match[0]]]
                last = match.end()
                begun.append(match.start())
                continue
            token = self._by_mark[match[0]]
            pieces += [text[last : match.start()], token.text[token.at]]
            last = match.end()
            start = match.start() - token.at
            if text.startswith(token.hidden, start):  # a template that cuts a token apart leaves harmless text
                inert.append((start, start + len(token.text)))
        revealed = "".join([*pieces, text[last:]])
        whole = (self._in_all.match(revealed, start) for start in begun)
        return revealed, sorted([*inert, *(match.span() for match in whole if match)])

    def _pattern(self, message: Message) -> re.Pattern[str]:
        return self._in_answers if message["role"] == "assistant" else self._in_all

    def _replace(self, pattern: re.Pattern[str], value: Any) -> Any:
        if isinstance(value, str):
            hidden = pattern.sub(lambda match: self._tokens[match[0]].hidden, value)
            at = self._beginning(hidden)
            return hidden if at is None else hidden[:at] + self._first_marks[hidden[at]] + hidden[at + 1 :]
        if isinstance(value, dict):
            return {self._replace(pattern, key): self._replace(pattern, inner) for key, inner in value.items()}
        if isinstance(value, list):
            return [self._replace(pattern, inner) for inner in value]
        return value


def _content(message: Message) -> dict[str, Any]:
    """All of a message that a user writes; its role is the pipeline's."""
    return {key: value for key, value in message.items() if key != "role"}


def _any_of(texts: set[str]) -> re.Pattern[str]:
    longest_first = sorted(texts, key=len, reverse=True)
    return re.compile("|".join(map(re.escape, longest_first)) or "(?!)")


def _search(pattern: re.Pattern[str], value: Any) -> str | None:
    if isinstance(value, str):
        match = pattern.search(value)
        return match[0] if match else None
    if isinstance(value, dict):
        value = [*value, *value.values()]
    return (
        next((found for part in value if (found := _search(pattern, part))), None) if isinstance(value, list) else None
    )
