"""From a row of any supported shape to one form: a conversation, or a text.

`normalize` detects the shape of each row on its own (SPEC's four formats) and never guesses: a row that fits none, or
fits one with a value of the wrong type, raises `RowLost` with the reason that the ledger counts.
"""

from __future__ import annotations

import json
import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

Message = dict[str, Any]

QUESTION_ANSWER_KEYS = (
    ("question", "answer"),
    ("input", "output"),
    ("prompt", "completion"),
    ("prompt", "response"),
    ("problem", "solution"),
    ("instruction", "response"),
    ("question", "answers"),
)
_SHAPES: tuple[tuple[str, tuple[str, ...]], ...] = (
    ("chat", ("messages",)),
    ("chat", ("conversations",)),
    ("alpaca", ("instruction", "output")),
    *(("qa", pair) for pair in QUESTION_ANSWER_KEYS),
    ("text", ("text",)),
)
_SHAREGPT_ROLES = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "chatgpt": "assistant",
    "bing": "assistant",
    "bard": "assistant",
    "system": "system",
    "function_call": "function_call",
    "observation": "tool",
    "tool": "tool",
    "function": "tool",
}
_ROLES = ("system", "developer", "user", "assistant", "tool", "function")
_PASSED_ON = ("tool_calls", "tool_call_id", "name", "reasoning_content", "thinking")


class RowLost(Exception):
    """A row that cannot be trained: `reason` is what the ledger counts, `message` says why."""

    def __init__(self, reason: str, message: str) -> None:
        self.reason = reason
        self.message = message
        super().__init__(f"{reason}: {message}")


@dataclass(frozen=True, slots=True)
class Conversation:
    """Messages as a chat template takes them, and which of them may be trained.

    Attributes:
        format: the shape that was detected.
        messages: `{"role", "content", ...}` in order.
        trainable: for each message, whether its author lets it be trained (assistant turns only).
        tools: JSON schemas of the tools that the model may call.
    """

    format: str
    messages: list[Message]
    trainable: list[bool]
    tools: list[dict[str, Any]] | None = None


@dataclass(frozen=True, slots=True)
class Text:
    """A document that is trained whole."""

    text: str
    format: str = "text"


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
        columns: our name → the row's name; a dotted path reaches into nested mappings.
        system_prompt: put in front of a conversation that has no system message of its own.

    Raises:
        RowLost: `bad_schema` or `empty_answer`.
    """
    row = rename_columns(row, columns) if columns else row
    shape, keys = detect(row, format, mapped=columns or ())
    if shape == "text":
        return Text(_text(row, "text"))
    conversation = _BUILDERS[shape](row, keys)
    if system_prompt and conversation.messages[0]["role"] not in ("system", "developer"):
        conversation = Conversation(
            conversation.format,
            [{"role": "system", "content": system_prompt}, *conversation.messages],
            [False, *conversation.trainable],
            conversation.tools,
        )
    if not any(m["role"] == "assistant" for m in conversation.messages):
        raise RowLost("no_trained_token", "the conversation has no assistant turn")
    return conversation


def rename_columns(row: Mapping[str, Any], columns: Mapping[str, str]) -> dict[str, Any]:
    """The row with `columns`' names added. Raises `RowLost` when a mapped column is not in the row."""
    renamed = dict(row)
    for ours, theirs in columns.items():
        value: Any = row
        for part in [theirs] if theirs in row else theirs.split("."):
            if not isinstance(value, Mapping) or part not in value:
                raise RowLost("bad_schema", f"columns maps {ours} to {theirs!r}, which the row lacks: {_keys(row)}")
            value = value[part]
        renamed[ours] = value
    return renamed


def detect(row: Mapping[str, Any], format: str = "auto", mapped: Collection[str] = ()) -> tuple[str, tuple[str, ...]]:
    """The row's shape (`chat`, `alpaca`, `qa` or `text`) and the keys that show it.

    Where several shapes fit, the one counts that the user's `mapped` names belong to, then the one whose keys hold
    values (a table gives each row the columns of all), then the first of `_SHAPES`.

    Raises:
        RowLost: `bad_schema` when the row has the keys of none, or not those of `format`.
    """
    fitting = [
        (shape, keys) for shape, keys in _SHAPES if format in ("auto", shape) and all(key in row for key in keys)
    ]
    if not fitting:
        what = "fits no known format" if format == "auto" else f"is not of the format {format}"
        raise RowLost("bad_schema", f"{what}: {_keys(row)}")
    return max(fitting, key=lambda fit: (sum(key in mapped for key in fit[1]), _fullness(row, fit)))


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


def _alpaca(row: Mapping[str, Any], keys: Sequence[str]) -> Conversation:
    messages: list[Message] = []
    if _has(row, "system"):
        messages.append({"role": "system", "content": _text(row, "system")})
    history = row.get("history") or []
    if not isinstance(history, list):
        raise RowLost("bad_schema", f"history: expected a list of pairs, found {_kind(history)}")
    for pair in history:
        if not isinstance(pair, list | tuple) or len(pair) != 2:
            raise RowLost("bad_schema", f"history: expected pairs of question and answer, found {str(pair)[:60]!r}")
        messages += [
            {"role": "user", "content": _as_text(pair[0], "history")},
            {"role": "assistant", "content": _answer(pair[1], "history")},
        ]
    question_key, answer_key = keys
    question = _text(row, question_key)
    if _has(row, "input"):
        question = f"{question}\n\n{_text(row, 'input')}" if question.strip() else _text(row, "input")
    messages += [
        {"role": "user", "content": question},
        {"role": "assistant", "content": _answer(row[answer_key], answer_key)},
    ]
    return Conversation("alpaca", messages, [m["role"] == "assistant" for m in messages])


def _qa(row: Mapping[str, Any], keys: Sequence[str]) -> Conversation:
    question_key, answer_key = keys
    if isinstance(row[question_key], list) or (isinstance(row[answer_key], list) and answer_key != "answers"):
        return _prompt_completion_messages(row, question_key, answer_key)
    question = _text(row, question_key)
    if _has(row, "context"):
        # SQuAD asks after the passage; Dolly gives the passage after its instruction.
        parts = [question, _text(row, "context")]
        question = "\n\n".join(parts if question_key == "instruction" else reversed(parts))
    messages: list[Message] = []
    if _has(row, "system"):
        messages.append({"role": "system", "content": _text(row, "system")})
    messages += [
        {"role": "user", "content": question},
        {"role": "assistant", "content": _answer(row[answer_key], answer_key)},
    ]
    return Conversation("qa", messages, [m["role"] == "assistant" for m in messages])


def _prompt_completion_messages(row: Mapping[str, Any], question_key: str, answer_key: str) -> Conversation:
    """A prompt and a completion that are lists of messages: only the completion is trained."""
    prompt, completion = row[question_key], row[answer_key]
    if isinstance(completion, str):
        completion = [{"role": "assistant", "content": completion}]
    if not isinstance(prompt, list) or not isinstance(completion, list):
        raise RowLost("bad_schema", f"{question_key} and {answer_key}: expected two texts or two lists of messages")
    before, after = _messages(prompt), _messages(completion)
    trainable = [False] * len(before.messages) + after.trainable
    return Conversation("qa", before.messages + after.messages, trainable, _tools(row.get("tools")))


def _chat(row: Mapping[str, Any], keys: Sequence[str]) -> Conversation:
    value = row[keys[0]]
    if isinstance(value, str):
        value = _parse_json(value, keys[0])
    if not isinstance(value, list):
        raise RowLost("bad_schema", f"{keys[0]}: expected a list, found {_kind(value)}")
    conversation = _messages(value)
    messages, trainable = conversation.messages, conversation.trainable
    if _has(row, "system") and messages and messages[0]["role"] != "system":
        messages.insert(0, {"role": "system", "content": _text(row, "system")})
        trainable.insert(0, False)
    return Conversation("chat", messages, trainable, _tools(row.get("tools")))


def _messages(value: list[Any]) -> Conversation:
    if not value:
        raise RowLost("bad_schema", "messages: the list is empty")
    messages: list[Message] = []
    trainable: list[bool] = []
    for number, item in enumerate(value):
        if not isinstance(item, Mapping):
            raise RowLost("bad_schema", f"message {number}: expected an object, found {_kind(item)}")
        message = _message(item, number)
        messages.append(message)
        trainable.append(message["role"] == "assistant" and _wants_training(item, number))
    return Conversation("chat", messages, trainable)


def _message(item: Mapping[str, Any], number: int) -> Message:
    raw_role = item.get("role", item.get("from"))
    if "role" in item:
        role = raw_role if raw_role in _ROLES else None
    else:
        role = _SHAREGPT_ROLES.get(raw_role) if isinstance(raw_role, str) else None
    if role is None:
        raise RowLost("bad_schema", f"message {number}: unknown role {str(raw_role)[:60]!r}")
    content = item["content"] if "content" in item else item.get("value")
    if role == "function_call":
        return {"role": "assistant", "content": "", "tool_calls": _tool_calls(content, f"message {number}: {role}")}
    extras = {key: item[key] for key in _PASSED_ON if item.get(key)}
    if "tool_calls" in extras:
        extras["tool_calls"] = _tool_calls(extras["tool_calls"], f"message {number}: tool_calls")
    if content is None and "tool_calls" in extras:
        content = ""
    if isinstance(content, list):  # OpenAI's content parts
        content = "".join(_part_text(part, number) for part in content)
    if not isinstance(content, str):
        raise RowLost("bad_schema", f"message {number} ({role}): content is {_kind(content)}, expected text")
    if role == "assistant" and not content.strip() and "tool_calls" not in extras:
        raise RowLost("empty_answer", f"message {number}: the assistant says nothing")
    return {"role": role, "content": content, **extras}


def _part_text(part: Any, number: int) -> str:
    if isinstance(part, Mapping) and isinstance(part.get("text"), str):
        return part["text"]
    raise RowLost("bad_schema", f"message {number}: a content part that is not text: {str(part)[:60]!r}")


def _wants_training(item: Mapping[str, Any], number: int) -> bool:
    weight, train = item.get("weight"), item.get("train")
    if weight not in (None, 0, 1) or train not in (None, True, False):
        raise RowLost("bad_schema", f"message {number}: expected weight 0 or 1 and train true or false")
    return weight != 0 and train != False  # noqa: E712 (a table may write it as 0)


def _tool_calls(value: Any, what: str) -> list[dict[str, Any]]:
    """Calls in OpenAI's form or ShareGPT's (JSON text, an object, or a list of them), in OpenAI's form.

    OpenAI writes a call's arguments as JSON text; templates take them as an object, as servers hand them over.
    """
    parsed = _parse_json(value, what) if isinstance(value, str) else value
    calls = parsed if isinstance(parsed, list) else [parsed]
    if not calls:
        raise RowLost("bad_schema", f"{what}: the list is empty")
    result = []
    for call in calls:
        function = call.get("function", call) if isinstance(call, Mapping) else None
        if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
            raise RowLost("bad_schema", f"{what}: a call without a name: {str(call)[:60]!r}")
        arguments = function.get("arguments", {})
        if isinstance(arguments, str) and arguments.lstrip().startswith("{"):
            arguments = _parse_json(arguments, f"{what}: arguments")
        named = {"name": function["name"], "arguments": {} if arguments is None else arguments}
        result.append({**({"id": call["id"]} if call.get("id") else {}), "type": "function", "function": named})
    return result


def _tools(value: Any) -> list[dict[str, Any]] | None:
    if isinstance(value, str):
        value = _parse_json(value, "tools") if value.strip() else None
    if not value:
        return None
    if not isinstance(value, list) or not all(isinstance(tool, Mapping) for tool in value):
        raise RowLost("bad_schema", f"tools: expected a list of objects, found {_kind(value)}")
    return [dict(t) if "function" in t else {"type": "function", "function": dict(t)} for t in value]


def _answer(value: Any, key: str) -> str:
    """The answer's text; SQuAD nests it as `{"text": [...]}` or `[{"text": ...}]` and the first one counts."""
    is_nested = isinstance(value, Mapping) and "text" in value
    if is_nested:
        value = value["text"]
    if isinstance(value, list) and (is_nested or key == "answers"):
        value = value[0] if value else ""
    if isinstance(value, Mapping) and "text" in value:
        value = value["text"]
    text = "" if value is None else _as_text(value, key)
    if not text.strip():
        raise RowLost("empty_answer", f"{key} is empty")
    return text


def _text(row: Mapping[str, Any], key: str) -> str:
    if key not in row:
        raise RowLost("bad_schema", f"{key} is missing: {_keys(row)}")
    text = _as_text(row[key], key)
    if key == "text" and not text.strip():
        raise RowLost("empty_answer", "the text is empty")
    return text


def _as_text(value: Any, key: str) -> str:
    if isinstance(value, str):
        return value
    if isinstance(value, int) and not isinstance(value, bool):
        return str(value)
    if isinstance(value, float) and math.isfinite(value):
        return json.dumps(value)
    found = value if isinstance(value, float) else _kind(value)  # NaN is how tables write a value that is missing
    raise RowLost("bad_schema", f"{key}: expected text, found {found}")


def _parse_json(text: str, what: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:  # ValueError: JSONDecodeError, or a number of thousands of digits
        raise RowLost("bad_schema", f"{what}: not JSON: {error}") from None


def _has(row: Mapping[str, Any], key: str) -> bool:
    return row.get(key) not in (None, "")


def _kind(value: Any) -> str:
    return "null" if value is None else type(value).__name__


def _keys(row: Mapping[str, Any]) -> str:
    shown = ", ".join(str(key)[:60] for key in list(row)[:20])
    return f"its keys are {shown or 'none'}" + (f" and {len(row) - 20} more" if len(row) > 20 else "")


_BUILDERS = {"alpaca": _alpaca, "qa": _qa, "chat": _chat}
