"""Suggests a `columns:` setting for a row that fits no format, made from the row's own keys."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from itertools import chain
from typing import Any

from sft.data.json_values import is_messages

_QUESTIONS = ("question", "prompt", "query", "instruction", "request", "problem", "input", "user", "human", "q")
_ANSWERS = (
    *("chosen", "answer", "response", "completion", "output", "solution", "reply", "target", "assistant", "bot"),
    *("gold", "a"),
)
_TEXTS = ("content", "body", "document", "article", "passage", "story", "code")
_METADATA_WORDS = frozenset({"id", "ids", "index", "type", "length", "score", "rating", "rejected", "date", "url"})
"""Words of names that describe a question or an answer (`question_id`), or mark the answer not to train."""


def suggest_columns(row: Mapping[str, Any]) -> str:
    """Says how to make such rows readable, as the end of a message."""
    if is_messages([row]):
        return 'it is one message: a row is a whole conversation, {"messages": [...]}'
    lists = [key for key, value in row.items() if isinstance(value, list) and value and isinstance(key, str)]
    conversations = [key for key in lists if is_messages(row[key])]
    if conversations:
        return _suggest_message_columns(row, conversations)
    objects = [key for key in lists if all(isinstance(value, dict) for value in row[key])]
    if len(objects) == 1 and len(row) == 1:
        return f"the rows are under {objects[0][:60]!a}: write each one on a line of its own"
    strings = [key for key, value in row.items() if isinstance(value, str) and isinstance(key, str)]
    texts = [key for key in strings if not _METADATA_WORDS.intersection(_split_words(key))]
    question, answer, text = (_find_name(texts, words) for words in (_QUESTIONS, _ANSWERS, _TEXTS))
    if question is None and answer is None and (text is not None or len(texts) == 1):
        return _write_columns(text=text or texts[0])
    if len(texts) == 2 and (question is None or answer is None):
        first, second = texts
        question, answer = (first, second) if answer != first and question != second else (second, first)
    return _write_columns(question=question, answer=answer)


def _suggest_message_columns(row: Mapping[str, Any], names: list[str]) -> str:
    """Suggests columns for a row with lists of messages under `names`."""
    answer = _find_name(names, _ANSWERS) or names[0]
    starts_with_answer = row[answer][0].get("role", row[answer][0].get("from")) in ("assistant", "gpt")
    question = _find_name(names, _QUESTIONS) if starts_with_answer else None
    return _write_columns(messages=answer) if question is None else _write_columns(question=question, answer=answer)


def _find_name(names: list[str], words: tuple[str, ...]) -> str | None:
    """Finds the name that is one of `words` (the earliest counts), or else one that contains it (`prompt_text`)."""
    equal = (name for word in words for name in names if name.lower() == word)
    containing = (name for word in words for name in names if len(word) > 1 and word in _split_words(name))
    return next(chain(equal, containing), None)


def _split_words(name: str) -> list[str]:
    return re.split(r"[^a-z]+", name.lower())


def _write_columns(**ours: str | None) -> str:
    pairs = ", ".join(f"{name}: {'...' if theirs is None else _as_yaml(theirs)}" for name, theirs in ours.items())
    return f"name your columns with `columns: {{{pairs}}}`"


def _as_yaml(name: str) -> str:
    return name if re.fullmatch(r"[A-Za-z_]([\w .-]*\w)?", name, re.ASCII) else json.dumps(name)
