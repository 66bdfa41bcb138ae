"""Messages of the chat habits in use: OpenAI's `role`/`content`/`tool_calls` and ShareGPT's `from`/`value`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from sft.conversation import Conversation, Message, RowLost, kind_of, parse_json

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


def read_messages(value: list[Any]) -> Conversation:
    """A list of messages in the common form. Raises `RowLost` for one that is none."""
    if not value:
        raise RowLost("bad_schema", "messages: the list is empty")
    messages: list[Message] = []
    trainable: list[bool] = []
    for number, item in enumerate(value):
        if not isinstance(item, Mapping):
            raise RowLost("bad_schema", f"message {number}: expected an object, found {kind_of(item)}")
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
        raise RowLost("bad_schema", f"message {number} ({role}): content is {kind_of(content)}, expected text")
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
    parsed = parse_json(value, what) if isinstance(value, str) else value
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
            arguments = parse_json(arguments, f"{what}: arguments")
        named = {"name": function["name"], "arguments": {} if arguments is None else arguments}
        result.append({**({"id": call["id"]} if call.get("id") else {}), "type": "function", "function": named})
    return result


def read_tools(value: Any) -> list[dict[str, Any]] | None:
    """Tools given as a list or as its JSON text, as JSON schemas. Raises `RowLost`."""
    if isinstance(value, str):
        value = parse_json(value, "tools") if value.strip() else None
    if not value:
        return None
    if not isinstance(value, list) or not all(isinstance(tool, Mapping) for tool in value):
        raise RowLost("bad_schema", f"tools: expected a list of objects, found {kind_of(value)}")
    return [dict(t) if "function" in t else {"type": "function", "function": dict(t)} for t in value]
