"""Converts a row of any supported shape to the common form: a conversation, or a text.

`normalize` detects the shape of each row on its own (chat, alpaca, qa or text) and never guesses: a row that fits none,
or has a value of the wrong type, raises `RowLost` with the reason that the ledger counts.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import replace
from functools import lru_cache, partial
from typing import Any

from sft.data.formats.column_hints import suggest_columns
from sft.data.formats.conversation import Conversation, Message, RowLost, Text, as_text, list_keys, parse_json
from sft.data.formats.messages import read_messages, read_tools
from sft.data.json_values import kind_of, shown

QUESTION_ANSWER_KEYS = (
    ("question", "answer"),
    ("input", "output"),
    ("prompt", "completion"),
    ("prompt", "response"),
    ("problem", "solution"),
    ("instruction", "response"),
    ("question", "answers"),
)
EXCHANGE_KEYS = frozenset({"output", "system", "context", "history", "text", *sum(QUESTION_ANSWER_KEYS, ())})
"""Keys of all shapes except chat. Messages and tools may be JSON text; under these keys it would be read as text."""
Shape = tuple[str, tuple[str, ...]]
"""A format, and the keys of the row that show it."""
_SHAPES: tuple[Shape, ...] = (
    ("chat", ("messages",)),
    ("chat", ("conversations",)),
    ("alpaca", ("instruction", "output")),
    *(("qa", pair) for pair in QUESTION_ANSWER_KEYS),
    ("text", ("text",)),
)


def normalize(
    row: Mapping[str, Any],
    format: str = "auto",
    columns: Mapping[str, str] | None = None,
    system_prompt: str | None = None,
) -> Conversation | Text:
    """Converts one row to the common form.

    Args:
        format: `auto`, or the format that each row must have.
        columns: our name → the row's name; a dotted path reaches into nested objects, a number into a list.
        system_prompt: the system message of conversations that have none.

    Raises:
        RowLost: `bad_schema`, `empty_answer` or `no_trained_token`.
    """
    row = rename_columns(row, columns) if columns else row
    shape, keys = detect_shape(row, format, mapped=columns or ())
    if shape == "text":
        return Text(_read_text(row, "text"))
    conversation = with_system(_READERS[shape](row, keys), system_prompt)
    if "assistant" not in [message["role"] for message in conversation.messages]:
        raise RowLost("no_trained_token", "the conversation has no assistant turn")
    return conversation


def read_question(row: Mapping[str, Any]) -> Conversation:
    """Returns the prompt of a row: the messages before its last answer, as in training, with or without an answer.

    A row with an answer is read as `normalize` reads it; one without only needs the key of a question.

    Raises:
        RowLost: `bad_schema` or `empty_answer`, as in training, or `no_question` for a text and for a conversation that
            does not end with something to answer.
    """
    shape, keys = _detect_question_shape(row)
    tools = None
    if shape == "chat":
        conversation = _read_chat(row, keys)
        messages, tools = conversation.messages, conversation.tools
        while messages and messages[-1]["role"] == "assistant":
            messages = messages[:-1]
    elif isinstance(row[keys[0]], list):
        messages, tools = read_messages(row[keys[0]]).messages, read_tools(row)
    else:
        messages = _read_prompt(row, keys[0])
    if not messages or messages[-1]["role"] not in ("user", "tool") or not messages[-1]["content"].strip():
        raise RowLost("no_question", "it does not end with something to answer")
    return Conversation(shape, messages, [False] * len(messages), tools)


def _detect_question_shape(row: Mapping[str, Any]) -> Shape:
    """Returns the shape in which training would read the row, except text, or one whose question the row has."""
    complete = [fit for fit in _matching_shapes(tuple(row), "auto") if fit[0] != "text"]
    if complete:
        return max(complete, key=lambda fit: _rank_fullness(row, fit))
    begun = [(shape, keys[:1]) for shape, keys in _SHAPES if shape != "text" and keys[0] in row]
    if not begun:
        known = ", ".join(dict.fromkeys(keys[0] for shape, keys in _SHAPES if shape != "text"))
        raise RowLost("no_question", f"none of {known} is in it; {list_keys(row)}")
    return max(begun, key=lambda fit: _has(row, fit[1][0]))


def with_system(conversation: Conversation, system_prompt: str | None) -> Conversation:
    """Prepends the system prompt, if there is one and the conversation has no system message."""
    if not system_prompt or conversation.messages[0]["role"] in ("system", "developer"):
        return conversation
    messages = [{"role": "system", "content": system_prompt}, *conversation.messages]
    return replace(conversation, messages=messages, trainable=[False, *conversation.trainable])


def rename_columns(row: Mapping[str, Any], columns: Mapping[str, str]) -> dict[str, Any]:
    """Adds the names of `columns` to a copy of the row. Raises `RowLost` when the row lacks a mapped column."""
    renamed = dict(row)
    for ours, theirs in columns.items():
        value: Any = row
        for part in [theirs] if theirs in row else theirs.split("."):
            if isinstance(value, Mapping) and part in value:
                value = value[part]
            elif isinstance(value, list) and part.isdecimal() and int(part) < len(value):
                value = value[int(part)]
            else:
                raise RowLost("bad_schema", f"columns maps {ours} to {theirs!r}, which the row lacks: {list_keys(row)}")
        renamed[ours] = value
    return renamed


def detect_shape(row: Mapping[str, Any], format: str = "auto", mapped: Collection[str] = ()) -> Shape:
    """Detects the row's format (`chat`, `alpaca`, `qa` or `text`) and the keys that show it.

    If several shapes fit, the one with most of the user's `mapped` names wins, then the one whose keys have values (a
    table gives each row the columns of all), then the first in `_SHAPES`.

    Raises:
        RowLost: `bad_schema` when the row has the keys of no shape, or not those of `format`.
    """
    matching = _matching_shapes(tuple(row), format)
    if not matching:
        if format == "auto":
            raise RowLost("bad_schema", f"fits no known format: {list_keys(row)}; {suggest_columns(row)}")
        raise RowLost("bad_schema", f"is not of the format {format}: {list_keys(row)}")
    if len(matching) == 1:
        return matching[0]
    return max(matching, key=lambda fit: (sum(key in mapped for key in fit[1]), _rank_fullness(row, fit)))


@lru_cache(maxsize=1024)
def _matching_shapes(names: tuple[str, ...], format: str) -> list[Shape]:
    """Lists the shapes whose keys are among `names`; cached, because most rows of a source have the same names."""
    return [(shape, keys) for shape, keys in _SHAPES if format in ("auto", shape) and all(key in names for key in keys)]


def _rank_fullness(row: Mapping[str, Any], fit: Shape) -> int:
    """Returns 2 if all keys of the shape have values, 1 if some have (a question without an answer), 0 if none has.

    A `text` ranks 1: some data sets repeat each question and answer as one text.
    """
    shape, keys = fit
    if shape == "text":
        return int(_has(row, "text"))
    if _has(row, keys[-1]) and row[keys[0]] is not None:
        return 2
    return int(any(_has(row, key) for key in keys))


def _read_exchange(row: Mapping[str, Any], keys: Sequence[str], format: str) -> Conversation:
    question_key, answer_key = keys
    messages = _read_prompt(row, question_key)
    messages.append({"role": "assistant", "content": _read_answer(row[answer_key], answer_key)})
    return Conversation(format, messages, [m["role"] == "assistant" for m in messages])


def _read_prompt(row: Mapping[str, Any], question_key: str) -> list[Message]:
    """Returns the messages before the answer of a row with one question."""
    messages: list[Message] = []
    if _has(row, "system"):
        messages.append({"role": "system", "content": _read_text(row, "system")})
    question = _read_text(row, question_key)
    if question_key == "instruction":  # Dolly, Alpaca and its descendants have the passage after the instruction
        messages += _read_history(row)
        question = _join(question, *(_read_text(row, key) for key in ("context", "input") if _has(row, key)))
    elif _has(row, "context"):  # SQuAD has the question after the passage
        question = _join(_read_text(row, "context"), question)
    return [*messages, {"role": "user", "content": question}]


def _read_history(row: Mapping[str, Any]) -> list[Message]:
    history = row.get("history") or []
    if not isinstance(history, list):
        raise RowLost("bad_schema", f"history: expected a list of pairs, found {kind_of(history)}")
    messages: list[Message] = []
    for pair in history:
        if not isinstance(pair, list | tuple) or len(pair) != 2:
            raise RowLost("bad_schema", f"history: expected pairs of question and answer, found {shown(pair)}")
        messages += [
            {"role": "user", "content": as_text(pair[0], "history")},
            {"role": "assistant", "content": _read_answer(pair[1], "history")},
        ]
    return messages


def _read_qa(row: Mapping[str, Any], keys: Sequence[str]) -> Conversation:
    question_key, answer_key = keys
    if isinstance(row[question_key], list) or (isinstance(row[answer_key], list) and answer_key != "answers"):
        return _read_prompt_completion(row, question_key, answer_key)
    return _read_exchange(row, keys, "qa")


def _join(*parts: str) -> str:
    """Joins the parts that are not blank with an empty line between them; returns the first if all are blank."""
    return "\n\n".join(part for part in parts if part.strip()) or parts[0]


def _read_prompt_completion(row: Mapping[str, Any], question_key: str, answer_key: str) -> Conversation:
    """Reads a prompt and a completion that are lists of messages; only the completion is trained."""
    prompt, completion = row[question_key], row[answer_key]
    if isinstance(completion, str):
        completion = [{"role": "assistant", "content": completion}]
    if not isinstance(prompt, list) or not isinstance(completion, list):
        raise RowLost("bad_schema", f"{question_key} and {answer_key}: expected two texts or two lists of messages")
    before, after = read_messages(prompt), read_messages(completion)
    trainable = [False] * len(before.messages) + after.trainable
    return Conversation("qa", before.messages + after.messages, trainable, read_tools(row))


def _read_chat(row: Mapping[str, Any], keys: Sequence[str]) -> Conversation:
    value = row[keys[0]]
    if isinstance(value, str):
        value = parse_json(value, keys[0])
    if not isinstance(value, list):
        raise RowLost("bad_schema", f"{keys[0]}: expected a list, found {kind_of(value)}")
    conversation = read_messages(value)
    messages, trainable = conversation.messages, conversation.trainable
    if _has(row, "system") and messages and messages[0]["role"] != "system":
        messages.insert(0, {"role": "system", "content": _read_text(row, "system")})
        trainable.insert(0, False)
    return Conversation("chat", messages, trainable, read_tools(row))


def _read_answer(value: Any, key: str) -> str:
    """Returns the answer's text; SQuAD nests it as `{"text": [...]}` or `[{"text": ...}]`, and the first one counts."""
    text = value if isinstance(value, str) else _read_nested_answer(value, key)
    if not text or text.isspace():
        raise RowLost("empty_answer", f"{key} is empty")
    return text


def _read_nested_answer(value: Any, key: str) -> str:
    is_nested = isinstance(value, dict) and "text" in value
    if is_nested:
        value = value["text"]
    if isinstance(value, list) and (is_nested or key == "answers"):
        value = value[0] if value else ""
    if isinstance(value, dict) and "text" in value:
        value = value["text"]
    return "" if value is None else as_text(value, key)


def _read_text(row: Mapping[str, Any], key: str) -> str:
    if key not in row:
        raise RowLost("bad_schema", f"{key} is missing: {list_keys(row)}")
    text = as_text(row[key], key)
    if key == "text" and (not text or text.isspace()):
        raise RowLost("empty_answer", "the text is empty")
    return text


def _has(row: Mapping[str, Any], key: str) -> bool:
    return row.get(key) not in (None, "")


_READERS: dict[str, Callable[[Mapping[str, Any], Sequence[str]], Conversation]] = {
    "alpaca": partial(_read_exchange, format="alpaca"),
    "qa": _read_qa,
    "chat": _read_chat,
}
