"""Messages of OpenAI's and ShareGPT's formats, with tool calls and training flags."""

from __future__ import annotations

import json

import pytest

from sft.data.sources.files import read_files
from tests.data.formats.rows import assistant, conversation, lost, system, user


def test_messages_with_every_role():
    messages = [
        {"role": "developer", "content": "Be brief"},
        user("Hi"),
        assistant("Hello"),
        {"role": "tool", "content": "3", "name": "look", "tool_call_id": "a1"},
        assistant("Three", reasoning_content="counted"),
    ]
    content = conversation({"messages": messages, "id": 3})
    assert content.messages == messages
    assert content.trainable == [False, False, True, False, True]
    assert (content.format, content.tools) == ("chat", None)


def test_sharegpt_with_calls_observations_tools_and_a_system_text():
    turns = [
        ("human", "How many?"),
        ("function_call", '{"name": "count", "arguments": {"of": "apples"}}'),
        ("observation", "3"),
        ("gpt", "Three"),
    ]
    row = {
        "system": "Be brief",
        "tools": '[{"name": "count", "parameters": {}}]',
        "conversations": [{"from": who, "value": said} for who, said in turns],
    }
    content = conversation(row)
    call = {"type": "function", "function": {"name": "count", "arguments": {"of": "apples"}}}
    assert content.messages == [
        system("Be brief"),
        user("How many?"),
        assistant("", tool_calls=[call]),
        {"role": "tool", "content": "3"},
        assistant("Three"),
    ]
    assert content.trainable == [False, False, True, False, True]
    assert content.tools == [{"type": "function", "function": {"name": "count", "parameters": {}}}]


@pytest.mark.parametrize(
    "value",
    [
        {"name": "count", "arguments": '{"of": 1}'},
        '{"name": "count", "arguments": "{\\"of\\": 1}"}',
        [{"name": "count", "arguments": {"of": 1}}],
        '[{"name": "count", "arguments": {"of": 1}}]',
    ],
)
def test_the_ways_in_which_sharegpt_writes_a_call(value):
    turns = [{"from": "human", "value": "Hi"}, {"from": "function_call", "value": value}]
    (_, call) = conversation({"conversations": turns}).messages
    assert call["tool_calls"] == [{"type": "function", "function": {"name": "count", "arguments": {"of": 1}}}]


def test_arguments_of_openai_calls_become_objects_as_templates_expect():
    calls = [
        {"id": "a1", "type": "function", "function": {"name": "look", "arguments": '{"at": [1, 2]}'}},
        {"type": "function", "function": {"name": "wait", "arguments": None}},
        {"function": {"name": "say", "arguments": "aloud"}},
    ]
    messages = [user("Hi"), {"role": "assistant", "content": None, "tool_calls": calls}]
    for given_calls in (calls, json.dumps(calls)):
        content = conversation({"messages": [messages[0], {**messages[1], "tool_calls": given_calls}]})
        assert content.messages[1] == assistant(
            "",
            tool_calls=[
                {"id": "a1", "type": "function", "function": {"name": "look", "arguments": {"at": [1, 2]}}},
                {"type": "function", "function": {"name": "wait", "arguments": {}}},
                {"type": "function", "function": {"name": "say", "arguments": "aloud"}},
            ],
        )


@pytest.mark.parametrize("written", [list, json.dumps])
@pytest.mark.parametrize("content", [{"content": None}, {"content": ""}, {}])
def test_openais_older_calls_are_read_as_the_newer_ones(written, content):
    schema = {"name": "look", "parameters": {"type": "object", "properties": {"at": {"type": "string"}}}}
    called = {"name": "look", "arguments": '{"at": "the sky"}'}
    old = {
        "messages": [
            user("Is it blue?"),
            {"role": "assistant", **content, "function_call": called},
            {"role": "function", "name": "look", "content": "grey"},
            # A table gives each message the keys of all.
            {"role": "assistant", "content": "No", "function_call": None, "name": None},
        ],
        "functions": written([schema]),
    }
    new = {
        "messages": [
            user("Is it blue?"),
            {"role": "assistant", "content": None, "tool_calls": [{"type": "function", "function": called}]},
            {"role": "tool", "name": "look", "content": "grey"},
            assistant("No"),
        ],
        "tools": written([{"type": "function", "function": schema}]),
    }
    assert conversation(old) == conversation(new)
    found = conversation(old)
    assert found.messages[1]["tool_calls"][0]["function"] == {"name": "look", "arguments": {"at": "the sky"}}
    assert (found.trainable, found.tools) == ([False, True, False, True], [{"type": "function", "function": schema}])


def test_invalid_older_calls():
    reason, message = lost({"messages": [user("Hi"), {"role": "assistant", "content": None, "function_call": {}}]})
    assert (reason, message) == ("bad_schema", "message 1 (assistant): content is null, expected text")
    reason, message = lost({"messages": [user("Hi"), {"role": "assistant", "function_call": {"arguments": "{}"}}]})
    assert (reason, message.partition(" name: ")[0]) == ("bad_schema", "message 1: function_call: a call without a")
    reason, message = lost({"messages": [user("Hi"), assistant("Yes")], "functions": 3})
    assert (reason, message) == ("bad_schema", "functions: expected a list of objects, found int")


@pytest.mark.parametrize(
    ("flags", "trained"),
    [
        ({}, True),
        ({"weight": 1}, True),
        ({"weight": 0}, False),
        ({"weight": 1.0, "train": True}, True),
        ({"weight": 0.0}, False),
        ({"train": False}, False),
        ({"train": 0}, False),
        ({"train": 1}, True),
        ({"train": True, "weight": 0}, False),
        ({"weight": None, "train": None}, True),
    ],
)
def test_weights_and_train_flags(flags, trained):
    content = conversation({"messages": [user("Hi"), assistant("Yes", **flags)]})
    assert content.trainable == [False, trained]
    assert content.messages[1] == assistant("Yes")


def test_a_table_of_both_formats_has_nulls_for_the_keys_of_the_other():
    nothing = dict.fromkeys(("role", "content", "from", "value", "tool_calls", "name", "weight", "train"))
    openai = [nothing | user("Hi"), nothing | assistant("Yes")]
    sharegpt = [nothing | {"from": "human", "value": "Hi"}, nothing | {"from": "gpt", "value": "Yes"}]
    for messages in (openai, sharegpt):
        content = conversation({"messages": messages})
        assert content.messages == [user("Hi"), assistant("Yes")]
        assert content.trainable == [False, True]


@pytest.mark.parametrize("key", ["reasoning_content", "thinking", "name", "tool_call_id"])
def test_other_keys_that_templates_render_are_kept_as_text(key):
    for value, expected in (("a b", {key: "a b"}), (7, {key: "7"}), (None, {}), ("", {})):
        messages = [user("Hi"), assistant("Yes", **{key: value})]
        assert conversation({"messages": messages}).messages[1] == assistant("Yes", **expected)
    found = lost({"messages": [user("Hi"), assistant("Yes", **{key: ["a"]})]})
    assert found == ("bad_schema", f"message 1: {key}: expected text, found list")


def test_a_reply_that_is_a_call_alone_has_no_content():
    calls = [{"function": {"name": "look", "arguments": "{}"}}]
    for content in (None, "", " "):
        item = {"role": "assistant", "content": content, "tool_calls": calls}
        (_, reply) = conversation({"messages": [user("Hi"), item]}).messages
        assert (reply["content"], len(reply["tool_calls"])) == (content or "", 1)
    assert lost({"messages": [user("Hi"), {**item, "tool_calls": []}]})[0] == "empty_answer"


def test_calls_need_no_content_beside_them():
    calls = [{"id": "c1", "type": "function", "function": {"name": "count", "arguments": '{"of": 1}'}}]
    bare, null = ({"role": "assistant", "tool_calls": calls, **more} for more in ({}, {"content": None}))
    assert conversation({"messages": [user("Hi"), bare]}) == conversation({"messages": [user("Hi"), null]})
    assert conversation({"messages": [user("Hi"), bare]}).messages[1]["content"] == ""
    assert lost({"messages": [user("Hi"), {"role": "assistant", "tool_calls": []}]})[0] == "bad_schema"


def test_an_invalid_flag_is_found_in_any_message():
    found = lost({"messages": [{**user("Hi"), "weight": 2}, assistant("Yes")]})
    assert found == ("bad_schema", "message 0: expected weight 0 or 1 and train true or false")


def test_content_in_parts_that_are_texts():
    assert conversation({"messages": [{"role": "user", "content": ["a", {"text": "b"}]}, assistant("Yes")]}).messages[
        0
    ] == user("ab")


@pytest.mark.parametrize("depth", range(850, 1000, 7))
def test_values_nested_as_deeply_as_json_reads_them_are_lost_with_a_reason(depth):
    nested = "[" * depth + "]" * depth
    for row in ({"messages": f"[{nested}]"}, {"messages": [{"from": "function_call", "value": nested}]}):
        reason, message = lost(row)
        assert reason == "bad_schema"
        assert len(message) < 200


def test_content_in_parts_and_conversations_written_as_json_text():
    parts = [{"type": "text", "text": "Hello "}, {"type": "text", "text": "there"}]
    messages = [user("Hi"), {"role": "assistant", "content": parts}]
    for value in (messages, json.dumps(messages)):
        assert conversation({"messages": value}).messages == [user("Hi"), assistant("Hello there")]


def test_a_system_text_beside_the_messages_does_not_double_one_inside():
    row = {"system": "outer", "messages": [system("inner"), user("Hi"), assistant("Yes")]}
    assert conversation(row).messages == row["messages"]


@pytest.mark.parametrize(
    ("messages", "reason", "message"),
    [
        ("[broken", "bad_schema", "messages: not JSON: "),
        ('{"role": "user"}', "bad_schema", "messages: expected a list, found dict"),
        ("9" * 5000, "bad_schema", "messages: not JSON: Exceeds the limit"),
        ("[" * 100_000, "bad_schema", "messages: not JSON: maximum recursion"),
        (3, "bad_schema", "messages: expected a list, found int"),
        ({"role": "user"}, "bad_schema", "messages: expected a list, found dict"),
        (None, "bad_schema", "messages: expected a list, found null"),
        ([], "bad_schema", "messages: the list is empty"),
        (["Hi"], "bad_schema", "message 0: expected an object, found str"),
        ([user("Hi"), None], "bad_schema", "message 1: expected an object, found null"),
        ([{"role": "wizard", "content": "Hi"}], "bad_schema", "message 0: unknown role 'wizard'"),
        ([{"role": ["user"], "content": "Hi"}], "bad_schema", "message 0: unknown role \"['user']\""),
        ([{"from": "alien", "value": "Hi"}], "bad_schema", "message 0: unknown role 'alien'"),
        ([{"from": {}, "value": "Hi"}], "bad_schema", "message 0: unknown role '{}'"),
        ([{"content": "Hi"}], "bad_schema", "message 0: unknown role 'None'"),
        ([{"role": "user"}], "bad_schema", "message 0 (user): content is null, expected text"),
        ([user("Hi"), assistant(None)], "bad_schema", "message 1 (assistant): content is null, expected text"),  # type: ignore[arg-type]
        ([{"role": "user", "content": 3}], "bad_schema", "message 0 (user): content is int, expected text"),
        (
            [{"role": "user", "content": [{"type": "image"}]}],
            "bad_schema",
            "message 0: a content part that is not text",
        ),
        ([user("Hi"), assistant("  ")], "empty_answer", "message 1: the assistant's message is empty"),
        ([user("Hi"), assistant("a", weight=0.5)], "bad_schema", "message 1: expected weight 0 or 1 and train true or"),
        ([user("Hi"), assistant("a", train="no")], "bad_schema", "message 1: expected weight 0 or 1 and train true or"),
        ([user("Hi")], "no_trained_token", "the conversation has no assistant turn"),
        (
            [user("Hi"), assistant("", tool_calls=[3])],
            "bad_schema",
            "message 1: tool_calls: a call without a name: '3'",
        ),
        ([user("Hi"), assistant("", tool_calls=[{"function": "f"}])], "bad_schema", "a call without a name"),
        ([user("Hi"), assistant("", tool_calls={"a": 1})], "bad_schema", "a call without a name"),
        ([user("Hi"), assistant("", tool_calls="{")], "bad_schema", "message 1: tool_calls: not JSON"),
        ([{"from": "function_call", "value": "look"}], "bad_schema", "message 0: function_call: not JSON"),
        ([{"from": "function_call", "value": "[]"}], "bad_schema", "message 0: function_call: the list is empty"),
        ([{"from": "function_call"}], "bad_schema", "message 0: function_call: a call without a name: 'None'"),
    ],
)
def test_conversations_that_are_lost(messages, reason, message):
    found = lost({"messages": messages})
    assert found[0] == reason
    assert found[1].startswith(message) or message in found[1]
    assert len(found[1]) < 300


@pytest.mark.parametrize("tools", [3, ["look"], {"name": "look"}, "look", "{}x"])
def test_tools_of_the_wrong_type(tools):
    reason, message = lost({"messages": [user("Hi"), assistant("Yes")], "tools": tools})
    assert (reason, message.split(":")[0]) == ("bad_schema", "tools")


@pytest.mark.parametrize("tools", [None, [], "", " ", "[]", "null"])
def test_no_tools(tools):
    assert conversation({"messages": [user("Hi"), assistant("Yes")], "tools": tools}).tools is None


def test_real_tool_calls_come_out_as_objects(shared_data):
    calls = tools = 0
    for row in read_files([shared_data / "formats/glaive_toolcall_en_demo.json"]):
        assert row.data is not None
        content = conversation(row.data)
        tools += len(content.tools or [])
        assert len(content.tools or []) == len(json.loads(row.data["tools"] or "[]"))
        for turn, given_turn in zip(content.messages, row.data["conversations"], strict=True):
            if given_turn["from"] == "function_call":
                said = json.loads(given_turn["value"])
                (call,) = turn["tool_calls"]
                assert call["function"] == {"name": said["name"], "arguments": said["arguments"]}
                calls += 1
            else:
                assert turn["content"] == given_turn["value"]
    assert (calls > 100, tools > 100) == (True, True)
