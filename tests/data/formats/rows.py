"""Messages, rows of any content, and what becomes of a row, for tests."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import strategies as st

from sft.data.formats.conversation import Conversation, RowLost
from sft.data.formats.normalize import QUESTION_ANSWER_KEYS, normalize


def user(content: str) -> dict[str, Any]:
    return {"role": "user", "content": content}


def assistant(content: str, **extras: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": content, **extras}


def system(content: str) -> dict[str, Any]:
    return {"role": "system", "content": content}


def conversation(row: dict[str, Any], **options: Any) -> Conversation:
    content = normalize(row, **options)
    assert isinstance(content, Conversation)
    return content


def lost(row: dict[str, Any], **options: Any) -> tuple[str, str]:
    with pytest.raises(RowLost) as caught:
        normalize(row, **options)
    return caught.value.reason, caught.value.message


scalars = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.floats(),
    st.text(max_size=6),
    st.just(""),
    st.just("[{"),
    st.just(10**400),
)

roles = st.sampled_from(["user", "assistant", "system", "tool", "human", "gpt", "function_call", "observation", "x"])

message_keys = [
    "role",
    "from",
    "content",
    "value",
    "tool_calls",
    "weight",
    "train",
    "name",
    "text",
    "function",
    "arguments",
]

values = st.recursive(
    st.one_of(scalars, roles),
    lambda inner: st.one_of(
        st.lists(inner, max_size=3),
        st.dictionaries(st.one_of(st.sampled_from(message_keys), st.text(max_size=3)), inner),
    ),
    max_leaves=12,
)

message = st.fixed_dictionaries(
    {},
    optional={"role": roles, "from": roles, **{key: values for key in message_keys if key not in ("role", "from")}},
)

row_keys = sorted(
    {key for pair in QUESTION_ANSWER_KEYS for key in pair} | {"output", "text", "system", "history", "context", "tools"}
)

any_rows = st.fixed_dictionaries(
    {},
    optional={
        **dict.fromkeys(row_keys, values),
        "messages": st.one_of(st.lists(message, max_size=4), values),
        "conversations": st.one_of(st.lists(message, max_size=4), values),
    },
)
