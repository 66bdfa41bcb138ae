"""What to write for a row that fits no format: an example of `columns:`, made of the row's own keys where they tell."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any

from sft.data.json_values import is_messages

_QUESTIONS = ("question", "prompt", "query", "instruction", "request", "problem", "input", "user", "human", "q")
_ANSWERS = (
    *("chosen", "answer", "response", "completion", "output", "solution", "reply", "target", "assistant", "bot"),
    *("gold", "a"),
)
_TEXTS = ("content", "body", "document", "article", "passage", "story", "code")
_NO_TEXTS = frozenset({"id", "ids", "index", "type", "length", "score", "rating", "rejected", "date", "url"})
"""Words of names that tell something about a question or an answer (`question_id`), or the answer not to give."""


def advice(row: Mapping[str, Any]) -> str:
    """How to have such rows read, as a hint that ends a message."""
    if is_messages([row]):
        return 'it is one message: a row is a whole conversation, {"messages": [...]}'
    lists = [key for key, value in row.items() if isinstance(value, list) and value and isinstance(key, str)]
    conversations = [key for key in lists if is_messages(row[key])]
    if conversations:
        answer = _named(conversations, _ANSWERS) or conversations[0]
        begins_with_answer = row[answer][0].get("role", row[answer][0].get("from")) in ("assistant", "gpt")
        question = _named(conversations, _QUESTIONS) if begins_with_answer else None
        return _columns(messages=answer) if question is None else _columns(question=question, answer=answer)
    objects = [key for key in lists if all(isinstance(value, dict) for value in row[key])]
    if len(objects) == 1 and len(row) == 1:
        return f"the rows lie under {objects[0][:60]!a}: write each of them on a line of its own"
    strings = [key for key, value in row.items() if isinstance(value, str) and isinstance(key, str)]
    texts = [key for key in strings if not _NO_TEXTS.intersection(_words(key))]
    asked, given, text = (_named(texts, words) for words in (_QUESTIONS, _ANSWERS, _TEXTS))
    if asked is None and given is None and (text is not None or len(texts) == 1):
        return _columns(text=text or texts[0])
    if len(texts) == 2 and (asked is None or given is None):
        first, second = texts
        asked, given = (first, second) if given != first and asked != second else (second, first)
    return _columns(question=asked, answer=given)


def _named(names: list[str], words: tuple[str, ...]) -> str | None:
    """The name that is one of `words`, the earliest of them, or else the one that has it as a part (`prompt_text`)."""
    for word in words:
        whole = [name for name in names if name.lower() == word]
        if whole:
            return whole[0]
    for word in words:
        for name in names:
            if len(word) > 1 and word in _words(name):
                return name
    return None


def _words(name: str) -> list[str]:
    return re.split(r"[^a-z]+", name.lower())


def _columns(**ours: str | None) -> str:
    pairs = ", ".join(f"{name}: {'...' if theirs is None else _as_yaml(theirs)}" for name, theirs in ours.items())
    return f"name your columns with `columns: {{{pairs}}}`"


def _as_yaml(name: str) -> str:
    return name if re.fullmatch(r"[A-Za-z_]([\w .-]*\w)?", name, re.ASCII) else json.dumps(name)
