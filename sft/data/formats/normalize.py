"""From a row of any supported shape to one form: a conversation, or a text.

`normalize` detects the shape of each row on its own (SPEC's four formats) and never guesses: a row that fits none, or
fits one with a value of the wrong type, raises `RowLost` with the reason that the ledger counts.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from functools import lru_cache
from typing import Any

from sft.data.formats.column_hints import advice
from sft.data.formats.conversation import Conversation, Message, RowLost, Text, as_text, keys_of, parse_json
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
"""Keys of all shapes but chat's. Its messages and tools may be JSON text; here that would be taken for the text."""
_SHAPES: tuple[tuple[str, tuple[str, ...]], ...] = (
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
    """Brings one row into the common form.

    Args:
        row: the source's mapping.
        format: `auto`, or the one format that each row must have.
        columns: our name → the row's name; a dotted path reaches into nested mappings, a number into a list.
        system_prompt: put in front of a conversation that has no system message of its own.

    Raises:
        RowLost: `bad_schema` or `empty_answer`.
    """
    row = rename_columns(row, columns) if columns else row
    shape, keys = detect(row, format, mapped=columns or ())
    if shape == "text":
        return Text(_text(row, "text"))
    conversation = with_system(_BUILDERS[shape](row, keys), system_prompt)
    if "assistant" not in [message["role"] for message in conversation.messages]:
        raise RowLost("no_trained_token", "the conversation has no assistant turn")
    return conversation


def question(row: Mapping[str, Any]) -> Conversation:
    """What a row asks: the messages that stand before its last answer in training, whether it has one or not.

    A row with an answer is read as `normalize` reads it; one without by the key of its question alone.

    Raises:
        RowLost: `bad_schema` or `empty_answer`, as in training, or `no_question` for a text and for a conversation that
            ends with nothing to answer.
    """
    shape, keys = _asking_shape(row)
    tools = None
    if shape == "chat":
        conversation = _chat(row, keys)
        messages, tools = conversation.messages, conversation.tools
        while messages and messages[-1]["role"] == "assistant":
            messages = messages[:-1]
    elif isinstance(row[keys[0]], list):
        messages, tools = read_messages(row[keys[0]]).messages, read_tools(row)
    else:
        messages = _before_answer(row, keys[0])
    if not messages or messages[-1]["role"] not in ("user", "tool") or not messages[-1]["content"].strip():
        raise RowLost("no_question", "it does not end with something to answer")
    return Conversation(shape, messages, [False] * len(messages), tools)


def _asking_shape(row: Mapping[str, Any]) -> tuple[str, tuple[str, ...]]:
    """The shape in which training would read the row, texts aside, or the one that its question's key begins."""
    whole = [fit for fit in _fitting(tuple(row), "auto") if fit[0] != "text"]
    if whole:
        return max(whole, key=lambda fit: _fullness(row, fit))
    begun = [(shape, keys[:1]) for shape, keys in _SHAPES if shape != "text" and keys[0] in row]
    if not begun:
        known = ", ".join(dict.fromkeys(keys[0] for shape, keys in _SHAPES if shape != "text"))
        raise RowLost("no_question", f"none of {known} is in it; {keys_of(row)}")
    return max(begun, key=lambda fit: _has(row, fit[1][0]))


def with_system(conversation: Conversation, system_prompt: str | None) -> Conversation:
    """The conversation behind a system prompt, where there is one and the conversation has none of its own."""
    if not system_prompt or conversation.messages[0]["role"] in ("system", "developer"):
        return conversation
    return Conversation(
        conversation.format,
        [{"role": "system", "content": system_prompt}, *conversation.messages],
        [False, *conversation.trainable],
        conversation.tools,
    )


def rename_columns(row: Mapping[str, Any], columns: Mapping[str, str]) -> dict[str, Any]:
    """The row with `columns`' names added. Raises `RowLost` when a mapped column is not in the row."""
    renamed = dict(row)
    for ours, theirs in columns.items():
        value: Any = row
        for part in [theirs] if theirs in row else theirs.split("."):
            if isinstance(value, Mapping) and part in value:
                value = value[part]
            elif isinstance(value, list) and part.isdecimal() and int(part) < len(value):
                value = value[int(part)]
            else:
                raise RowLost("bad_schema", f"columns maps {ours} to {theirs!r}, which the row lacks: {keys_of(row)}")
        renamed[ours] = value
    return renamed


def detect(row: Mapping[str, Any], format: str = "auto", mapped: Collection[str] = ()) -> tuple[str, tuple[str, ...]]:
    """The row's shape (`chat`, `alpaca`, `qa` or `text`) and the keys that show it.

    Where several shapes fit, the one counts that the user's `mapped` names belong to, then the one whose keys hold
    values (a table gives each row the columns of all), then the first of `_SHAPES`.

    Raises:
        RowLost: `bad_schema` when the row has the keys of none, or not those of `format`.
    """
    fitting = _fitting(tuple(row), format)
    if not fitting:
        if format == "auto":
            raise RowLost("bad_schema", f"fits no known format: {keys_of(row)}; {advice(row)}")
        raise RowLost("bad_schema", f"is not of the format {format}: {keys_of(row)}")
    if len(fitting) == 1:
        return fitting[0]
    return max(fitting, key=lambda fit: (sum(key in mapped for key in fit[1]), _fullness(row, fit)))


@lru_cache(maxsize=1024)
def _fitting(names: tuple[str, ...], format: str) -> list[tuple[str, tuple[str, ...]]]:
    """The shapes whose keys are among `names`; kept, as most rows of a source have the same names."""
    return [(shape, keys) for shape, keys in _SHAPES if format in ("auto", shape) and all(key in names for key in keys)]


def _fullness(row: Mapping[str, Any], fit: tuple[str, tuple[str, ...]]) -> int:
    """2 for a shape that the row fills, 1 for one that it begins (a question without its answer), 0 for empty columns.

    A `text` counts as begun: some data sets hold each question and answer once more as one text.
    """
    shape, keys = fit
    if shape == "text":
        return int(_has(row, "text"))
    if _has(row, keys[-1]) and row[keys[0]] is not None:
        return 2
    return int(any(_has(row, key) for key in keys))


def _exchange(row: Mapping[str, Any], keys: Sequence[str], format: str) -> Conversation:
    question_key, answer_key = keys
    messages = _before_answer(row, question_key)
    messages.append({"role": "assistant", "content": _answer(row[answer_key], answer_key)})
    return Conversation(format, messages, [m["role"] == "assistant" for m in messages])


def _before_answer(row: Mapping[str, Any], question_key: str) -> list[Message]:
    """What the model is shown of a row with one question, and what it is asked behind."""
    messages: list[Message] = []
    if _has(row, "system"):
        messages.append({"role": "system", "content": _text(row, "system")})
    question = _text(row, question_key)
    if question_key == "instruction":  # Dolly gives the passage after its instruction; so do Alpaca and its descendants
        messages += _history(row)
        question = _joined(question, *(_text(row, key) for key in ("context", "input") if _has(row, key)))
    elif _has(row, "context"):  # SQuAD asks after the passage
        question = _joined(_text(row, "context"), question)
    return [*messages, {"role": "user", "content": question}]


def _history(row: Mapping[str, Any]) -> list[Message]:
    history = row.get("history") or []
    if not isinstance(history, list):
        raise RowLost("bad_schema", f"history: expected a list of pairs, found {kind_of(history)}")
    messages: list[Message] = []
    for pair in history:
        if not isinstance(pair, list | tuple) or len(pair) != 2:
            raise RowLost("bad_schema", f"history: expected pairs of question and answer, found {shown(pair)}")
        messages += [
            {"role": "user", "content": as_text(pair[0], "history")},
            {"role": "assistant", "content": _answer(pair[1], "history")},
        ]
    return messages


def _alpaca(row: Mapping[str, Any], keys: Sequence[str]) -> Conversation:
    return _exchange(row, keys, "alpaca")


def _qa(row: Mapping[str, Any], keys: Sequence[str]) -> Conversation:
    question_key, answer_key = keys
    if isinstance(row[question_key], list) or (isinstance(row[answer_key], list) and answer_key != "answers"):
        return _prompt_completion_messages(row, question_key, answer_key)
    return _exchange(row, keys, "qa")


def _joined(*parts: str) -> str:
    """The parts that hold anything, with a blank line between them; the first one where none does."""
    return "\n\n".join(part for part in parts if part.strip()) or parts[0]


def _prompt_completion_messages(row: Mapping[str, Any], question_key: str, answer_key: str) -> Conversation:
    """A prompt and a completion that are lists of messages: only the completion is trained."""
    prompt, completion = row[question_key], row[answer_key]
    if isinstance(completion, str):
        completion = [{"role": "assistant", "content": completion}]
    if not isinstance(prompt, list) or not isinstance(completion, list):
        raise RowLost("bad_schema", f"{question_key} and {answer_key}: expected two texts or two lists of messages")
    before, after = read_messages(prompt), read_messages(completion)
    trainable = [False] * len(before.messages) + after.trainable
    return Conversation("qa", before.messages + after.messages, trainable, read_tools(row))


def _chat(row: Mapping[str, Any], keys: Sequence[str]) -> Conversation:
    value = row[keys[0]]
    if isinstance(value, str):
        value = parse_json(value, keys[0])
    if not isinstance(value, list):
        raise RowLost("bad_schema", f"{keys[0]}: expected a list, found {kind_of(value)}")
    conversation = read_messages(value)
    messages, trainable = conversation.messages, conversation.trainable
    if _has(row, "system") and messages and messages[0]["role"] != "system":
        messages.insert(0, {"role": "system", "content": _text(row, "system")})
        trainable.insert(0, False)
    return Conversation("chat", messages, trainable, read_tools(row))


def _answer(value: Any, key: str) -> str:
    """The answer's text; SQuAD nests it as `{"text": [...]}` or `[{"text": ...}]` and the first one counts."""
    text = value if isinstance(value, str) else _nested_answer(value, key)
    if not text or text.isspace():
        raise RowLost("empty_answer", f"{key} is empty")
    return text


def _nested_answer(value: Any, key: str) -> str:
    is_nested = isinstance(value, dict) and "text" in value
    if is_nested:
        value = value["text"]
    if isinstance(value, list) and (is_nested or key == "answers"):
        value = value[0] if value else ""
    if isinstance(value, dict) and "text" in value:
        value = value["text"]
    return "" if value is None else as_text(value, key)


def _text(row: Mapping[str, Any], key: str) -> str:
    if key not in row:
        raise RowLost("bad_schema", f"{key} is missing: {keys_of(row)}")
    text = as_text(row[key], key)
    if key == "text" and (not text or text.isspace()):
        raise RowLost("empty_answer", "the text is empty")
    return text


def _has(row: Mapping[str, Any], key: str) -> bool:
    return row.get(key) not in (None, "")


_BUILDERS = {"alpaca": _alpaca, "qa": _qa, "chat": _chat}
