"""Reads messages in the two chat formats: OpenAI's `role`/`content`/`tool_calls` and ShareGPT's `from`/`value`.

OpenAI's older function calls (`function_call`, the role `function`, `functions`) are converted to tool calls.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from sft.data.formats.conversation import Conversation, Message, RowLost, as_text, parse_json
from sft.data.json_values import kind_of, shown

_SHAREGPT_ROLES = {
    **dict.fromkeys(("human", "user"), "user"),
    **dict.fromkeys(("gpt", "assistant", "chatgpt", "bing", "bard"), "assistant"),
    **dict.fromkeys(("observation", "tool", "function"), "tool"),
    **{role: role for role in ("system", "function_call")},
}
_ROLES = {role: role for role in ("system", "developer", "user", "assistant", "tool")} | {"function": "tool"}
_EXTRA_KEYS = ("tool_call_id", "name", "reasoning_content", "thinking")


def read_messages(value: list[Any]) -> Conversation:
    """Converts a list of messages to the common form. Raises `RowLost` for an invalid message."""
    if not value:
        raise RowLost("bad_schema", "messages: the list is empty")
    messages: list[Message] = []
    trainable: list[bool] = []
    for number, item in enumerate(value):
        if not isinstance(item, dict):
            raise RowLost("bad_schema", f"message {number}: expected an object, found {kind_of(item)}")
        message = _read_message(item, number)
        messages.append(message)
        # A message with two keys has only a role and a content, and nothing that forbids training.
        allowed = len(item) == 2 or _allows_training(item, number)
        trainable.append(allowed and message["role"] == "assistant")
    return Conversation("chat", messages, trainable)


def _read_message(item: dict[str, Any], number: int) -> Message:
    role = _read_role(item, number)
    content = item.get("content")
    if content is None:
        content = item.get("value")
    if role == "function_call":
        calls = _read_tool_calls(content, f"message {number}: {role}")
        return {"role": "assistant", "content": "", "tool_calls": calls}
    # Two keys are a role and a content; but OpenAI omits the content beside tool calls.
    extras = _read_extras(item, number) if len(item) > 2 or content is None else {}
    if content is None and "tool_calls" in extras:
        content = ""
    if isinstance(content, list):  # OpenAI's content parts
        content = "".join(_read_part(part, number) for part in content)
    if not isinstance(content, str):
        raise RowLost("bad_schema", f"message {number} ({role}): content is {kind_of(content)}, expected text")
    if role == "assistant" and "tool_calls" not in extras and (not content or content.isspace()):
        raise RowLost("empty_answer", f"message {number}: the assistant's message is empty")
    return {"role": role, "content": content, **extras}


def _read_role(item: dict[str, Any], number: int) -> str:
    """Returns the role as templates call it; in a table of both formats the other format's key is null."""
    name = item.get("role")
    roles = _ROLES
    if name is None:
        name, roles = item.get("from"), _SHAREGPT_ROLES
    role = roles.get(name) if isinstance(name, str) else None
    if role is None:
        raise RowLost("bad_schema", f"message {number}: unknown role {shown(name)}")
    return role


def _read_extras(item: dict[str, Any], number: int) -> dict[str, Any]:
    """Returns what a message has besides its content and templates can render."""
    extras: dict[str, Any] = {}
    key = "tool_calls" if item.get("tool_calls") else "function_call"
    if item.get(key):
        extras["tool_calls"] = _read_tool_calls(item[key], f"message {number}: {key}")
    for key in _EXTRA_KEYS:
        if item.get(key) not in (None, ""):
            extras[key] = as_text(item[key], f"message {number}: {key}")
    return extras


def _read_part(part: Any, number: int) -> str:
    if isinstance(part, str):
        return part
    if isinstance(part, dict) and isinstance(part.get("text"), str):
        return part["text"]
    raise RowLost("bad_schema", f"message {number}: a content part that is not text: {shown(part)}")


def _allows_training(item: dict[str, Any], number: int) -> bool:
    weight, train = item.get("weight"), item.get("train")
    if weight not in (None, 0, 1) or train not in (None, True, False):
        raise RowLost("bad_schema", f"message {number}: expected weight 0 or 1 and train true or false")
    return weight != 0 and train != False  # noqa: E712 (a table may write it as 0)


def _read_tool_calls(value: Any, what: str) -> list[dict[str, Any]]:
    """Converts calls in OpenAI's form or ShareGPT's (JSON text, an object, or a list of them) to OpenAI's form.

    OpenAI writes a call's arguments as JSON text; templates expect an object, which is also what servers pass.
    """
    parsed = parse_json(value, what) if isinstance(value, str) else value
    calls = parsed if isinstance(parsed, list) else [parsed]
    if not calls:
        raise RowLost("bad_schema", f"{what}: the list is empty")
    result = []
    for call in calls:
        function = call.get("function", call) if isinstance(call, dict) else None
        if not isinstance(function, dict) or not isinstance(function.get("name"), str):
            raise RowLost("bad_schema", f"{what}: a call without a name: {shown(call)}")
        arguments = function.get("arguments", {})
        if isinstance(arguments, str) and arguments.lstrip().startswith("{"):
            arguments = parse_json(arguments, f"{what}: arguments")
        named = {"name": function["name"], "arguments": {} if arguments is None else arguments}
        result.append({**({"id": call["id"]} if call.get("id") else {}), "type": "function", "function": named})
    return result


def read_tools(row: Mapping[str, Any]) -> list[dict[str, Any]] | None:
    """Returns the JSON schemas of a row's `tools` or `functions`, a list or its JSON text. Raises `RowLost`."""
    return _read_schemas(row.get("tools"), "tools") or _read_schemas(row.get("functions"), "functions")


def _read_schemas(value: Any, key: str) -> list[dict[str, Any]] | None:
    if isinstance(value, str):
        value = parse_json(value, key) if value.strip() else None
    if not value:
        return None
    if not isinstance(value, list) or not all(isinstance(tool, dict) for tool in value):
        raise RowLost("bad_schema", f"{key}: expected a list of objects, found {kind_of(value)}")
    return [dict(t) if "function" in t else {"type": "function", "function": dict(t)} for t in value]
