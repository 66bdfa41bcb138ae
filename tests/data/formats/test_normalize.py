"""Rows of every shape brought into one form; and a reason, never a traceback, for each that cannot be."""

from __future__ import annotations

import datetime
import json
from typing import Any

import pytest
import yaml
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from sft.data.formats.conversation import Conversation, RowLost, Text
from sft.data.formats.normalize import QUESTION_ANSWER_KEYS, detect, normalize, rename_columns
from sft.data.sources.files import read_files


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


# Alpaca


@pytest.mark.parametrize(
    ("row", "messages"),
    [
        ({"instruction": "Add", "output": "5"}, [user("Add"), assistant("5")]),
        ({"instruction": "Add", "input": "", "output": "5"}, [user("Add"), assistant("5")]),
        ({"instruction": "Add", "input": None, "output": "5"}, [user("Add"), assistant("5")]),
        ({"instruction": "Add", "input": "2 3", "output": "5"}, [user("Add\n\n2 3"), assistant("5")]),
        ({"instruction": "", "input": "2 + 3", "output": "5"}, [user("2 + 3"), assistant("5")]),
        ({"instruction": " Add ", "input": " 2 ", "output": " 5\n"}, [user(" Add \n\n 2 "), assistant(" 5\n")]),
        ({"instruction": "Add", "output": 5}, [user("Add"), assistant("5")]),
        ({"instruction": "Add", "output": 2.5}, [user("Add"), assistant("2.5")]),
        ({"instruction": "Add", "output": "5", "text": "Add: 5"}, [user("Add"), assistant("5")]),
        (
            {"instruction": "Add", "output": "5", "system": "Be brief", "history": [["Hi", "Hello"], ("So?", "Yes")]},
            [
                system("Be brief"),
                user("Hi"),
                assistant("Hello"),
                user("So?"),
                assistant("Yes"),
                user("Add"),
                assistant("5"),
            ],
        ),
        ({"instruction": "Add", "output": "5", "system": "", "history": None}, [user("Add"), assistant("5")]),
        ({"instruction": "Add", "output": "5", "system": None, "history": ""}, [user("Add"), assistant("5")]),
    ],
)
def test_alpaca(row, messages):
    content = conversation(row)
    assert content.messages == messages
    assert content.trainable == [m["role"] == "assistant" for m in messages]
    assert (content.format, content.tools) == ("alpaca", None)


@pytest.mark.parametrize(
    ("change", "reason", "message"),
    [
        ({"output": ""}, "empty_answer", "output is empty"),
        ({"output": " \n"}, "empty_answer", "output is empty"),
        ({"output": None}, "empty_answer", "output is empty"),
        ({"output": None, "text": "Add: "}, "empty_answer", "output is empty"),
        ({"output": ["5"]}, "bad_schema", "output: expected text, found list"),
        ({"output": True}, "bad_schema", "output: expected text, found bool"),
        ({"output": float("nan")}, "bad_schema", "output: expected text, found nan"),
        ({"instruction": None}, "bad_schema", "instruction: expected text, found NoneType"),
        ({"instruction": {"a": 1}}, "bad_schema", "instruction: expected text, found dict"),
        ({"input": ["a"]}, "bad_schema", "input: expected text, found list"),
        ({"system": 1.5j}, "bad_schema", "system: expected text, found complex"),
        ({"history": "Hi"}, "bad_schema", "history: expected a list of pairs, found str"),
        ({"history": [["Hi"]]}, "bad_schema", "history: expected pairs of question and answer, found \"['Hi']\""),
        ({"history": [["Hi", None]]}, "empty_answer", "history is empty"),
        ({"history": [["Hi", ""]]}, "empty_answer", "history is empty"),
        ({"history": [[None, "Hi"]]}, "bad_schema", "history: expected text, found null"),
    ],
)
def test_alpaca_rows_that_are_lost(change, reason, message):
    found = lost({"instruction": "Add", "output": "5", **change})
    assert found == (reason, message.replace("NoneType", "null"))


# Question and answer


@pytest.mark.parametrize(("question", "answer"), QUESTION_ANSWER_KEYS)
def test_every_pair_of_question_and_answer(question, answer):
    content = conversation({question: "Hi?", answer: "Yes", "id": 7, "extra": None})
    assert content.messages == [user("Hi?"), assistant("Yes")]
    assert (content.format, content.trainable) == ("qa", [False, True])


@pytest.mark.parametrize(
    ("row", "messages"),
    [
        ({"instruction": "Who?", "context": "A text.", "response": "Me"}, [user("Who?\n\nA text."), assistant("Me")]),
        ({"instruction": "Who?", "context": "", "response": "Me"}, [user("Who?"), assistant("Me")]),
        ({"instruction": "Add", "input": "2 3", "response": "5"}, [user("Add\n\n2 3"), assistant("5")]),
        ({"instruction": "", "context": "Add 2 3", "response": "5"}, [user("Add 2 3"), assistant("5")]),
        ({"question": "Who?", "context": "A text.", "answer": "Me"}, [user("A text.\n\nWho?"), assistant("Me")]),
        (
            {"question": "Who?", "answer": "Me", "system": "Be brief"},
            [system("Be brief"), user("Who?"), assistant("Me")],
        ),
        ({"question": 3, "answer": 4}, [user("3"), assistant("4")]),
        ({"question": "a", "answer": "b", "prompt": "c", "completion": "d"}, [user("a"), assistant("b")]),
    ],
)
def test_question_and_answer_with_context_and_system(row, messages):
    assert conversation(row).messages == messages


@pytest.mark.parametrize(
    "answers",
    [
        {"text": ["Paris", "the city of Paris"], "answer_start": [1, 2]},
        {"text": "Paris"},
        [{"text": "Paris", "answer_start": 1}, {"text": "Lutetia", "answer_start": 9}],
        ["Paris", "Lutetia"],
        "Paris",
    ],
)
def test_the_first_of_squads_nested_answers_counts(answers):
    row = {"id": "1", "title": "France", "context": "Paris is the capital.", "question": "Which?", "answers": answers}
    assert conversation(row).messages == [user("Paris is the capital.\n\nWhich?"), assistant("Paris")]


@pytest.mark.parametrize("answers", [{"text": [], "answer_start": []}, [], {"text": [""]}, {"text": None}, None])
def test_a_question_that_squad_calls_unanswerable_is_an_empty_answer(answers):
    assert lost({"question": "Which?", "answers": answers}) == ("empty_answer", "answers is empty")


def test_a_prompt_and_a_completion_of_messages_train_the_completion_alone():
    prompt = [system("Be brief"), user("Hi"), assistant("Hello"), user("So?")]
    content = conversation({"prompt": prompt, "completion": [assistant("Yes")], "tools": [{"name": "look"}]})
    assert content.messages == [*prompt, assistant("Yes")]
    assert content.trainable == [False, False, False, False, True]
    assert content.tools == [{"type": "function", "function": {"name": "look"}}]
    assert conversation({"prompt": prompt, "completion": "Yes"}).messages == content.messages


@pytest.mark.parametrize(
    ("row", "reason", "message"),
    [
        ({"question": None, "answer": "a"}, "bad_schema", "question: expected text, found null"),
        ({"question": "q", "answer": None}, "empty_answer", "answer is empty"),
        ({"question": "q", "answer": {"value": 1}}, "bad_schema", "answer: expected text, found dict"),
        ({"question": "q", "answer": ["a", "b"]}, "bad_schema", "expected two texts or two lists of messages"),
        ({"prompt": [user("Hi")], "completion": 3}, "bad_schema", "expected two texts or two lists of messages"),
        ({"prompt": "Hi", "completion": [assistant("Yes")]}, "bad_schema", "expected two texts or two lists"),
        ({"prompt": ["Hi"], "completion": ["Yes"]}, "bad_schema", "message 0: expected an object, found str"),
        ({"prompt": [], "completion": "Yes"}, "bad_schema", "messages: the list is empty"),
        ({"question": "q", "answer": datetime.date(2026, 1, 1)}, "bad_schema", "answer: expected text, found date"),
    ],
)
def test_questions_and_answers_that_are_lost(row, reason, message):
    found = lost(row)
    assert found[0] == reason
    assert message in found[1]


# Chat


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


def test_openais_calls_have_their_arguments_as_an_object_as_templates_take_them():
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


def test_older_calls_that_are_none():
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


def test_a_table_of_both_habits_leaves_the_keys_of_the_other_empty():
    nothing = dict.fromkeys(("role", "content", "from", "value", "tool_calls", "name", "weight", "train"))
    openai = [nothing | user("Hi"), nothing | assistant("Yes")]
    sharegpt = [nothing | {"from": "human", "value": "Hi"}, nothing | {"from": "gpt", "value": "Yes"}]
    for messages in (openai, sharegpt):
        content = conversation({"messages": messages})
        assert content.messages == [user("Hi"), assistant("Yes")]
        assert content.trainable == [False, True]


@pytest.mark.parametrize("key", ["reasoning_content", "thinking", "name", "tool_call_id"])
def test_what_templates_know_besides_the_content_is_handed_on_as_text(key):
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


def test_a_flag_that_is_none_is_found_in_whosever_message_it_stands():
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
        ([user("Hi"), assistant("  ")], "empty_answer", "message 1: the assistant says nothing"),
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


# Text


def test_text():
    assert normalize({"text": " a\nb ", "url": "x"}) == Text(" a\nb ", "text")
    assert lost({"text": " \n"}) == ("empty_answer", "the text is empty")
    assert lost({"text": None}) == ("bad_schema", "text: expected text, found null")
    assert lost({"text": ["a"]}) == ("bad_schema", "text: expected text, found list")


# Which shape a row has

NONE: dict[str, Any] = dict.fromkeys(
    ("messages", "conversations", "instruction", "input", "output", "question", "answer", "response", "text")
)


@pytest.mark.parametrize("nothing", [None, ""])
@pytest.mark.parametrize(
    ("filled", "format", "answer"),
    [
        ({"messages": [user("Hi"), assistant("1")]}, "chat", "1"),
        ({"conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "2"}]}, "chat", "2"),
        ({"instruction": "Hi", "output": "3"}, "alpaca", "3"),
        ({"instruction": "", "input": "Hi", "output": "3"}, "alpaca", "3"),
        ({"question": "Hi", "answer": "4"}, "qa", "4"),
        ({"instruction": "Hi", "response": "5"}, "qa", "5"),
        ({"text": "6"}, "text", "6"),
    ],
)
def test_a_table_of_several_formats_leaves_the_other_formats_columns_empty(nothing, filled, format, answer):
    content = normalize({**dict.fromkeys(NONE, nothing), **filled})
    assert content.format == format
    assert answer == (content.text if isinstance(content, Text) else content.messages[-1]["content"])


def test_a_row_without_its_answer_is_not_taken_for_the_text_beside_it():
    assert lost({**NONE, "instruction": "Hi", "text": "### Hi"}) == ("empty_answer", "output is empty")


def test_a_row_that_fits_no_format_is_lost_with_its_keys():
    advice = "name your columns with `columns: {question: ..., answer: ...}`"
    assert lost({"a": 1, "b": 2}) == ("bad_schema", f"fits no known format: its keys are a, b; {advice}")
    assert lost({}) == ("bad_schema", f"fits no known format: its keys are none; {advice}")
    assert lost({"output": 1}) == ("bad_schema", f"fits no known format: its keys are output; {advice}")
    assert lost({f"k{i}": 1 for i in range(500)})[1].endswith(f"k18, k19 and 480 more; {advice}")


MESSAGES = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Yes"}]


@pytest.mark.parametrize(
    ("row", "columns"),
    [
        ({"prompt": "Hi", "chosen": "Yes", "rejected": "No"}, {"question": "prompt", "answer": "chosen"}),
        ({"rejected": MESSAGES, "chosen": MESSAGES, "prompt": "Hi"}, {"messages": "chosen"}),
        ({"prompt": MESSAGES[:1], "chosen": MESSAGES[1:]}, {"question": "prompt", "answer": "chosen"}),
        ({"id": "7", "dialog": MESSAGES}, {"messages": "dialog"}),
        (
            {"question_id": "7", "Question": "Hi", "Best Answer": "Yes"},
            {"question": "Question", "answer": "Best Answer"},
        ),
        ({"target_text": "Yes", "input_text": "Hi", "n": 1}, {"question": "input_text", "answer": "target_text"}),
        ({"reply": "Yes", "they": "Hi"}, {"question": "they", "answer": "reply"}),
        ({"en": "Hi", "de": "Ja"}, {"question": "en", "answer": "de"}),
        ({"en: x": "Hi", "{é}": "Ja"}, {"question": "en: x", "answer": "{é}"}),
        ({"id": 1, "title": "a", "body": "b", "url": "c"}, {"text": "body"}),
        ({"line": "a", "number": 1}, {"text": "line"}),
    ],
)
def test_what_is_advised_for_a_row_that_fits_no_format_reads_it(row, columns):
    written = lost(row)[1].partition("; name your columns with `columns: ")[2].removesuffix("`")
    assert yaml.safe_load(written) == columns
    normalize(row, columns=columns)


def test_advice_where_columns_would_not_help():
    nested = "the rows lie under 'data': write each of them on a line of its own"
    assert lost({"data": [{"question": "Hi", "answer": "Yes"}]})[1].endswith(f"its keys are data; {nested}")
    message = 'it is one message: a row is a whole conversation, {"messages": [...]}'
    assert lost({"role": "user", "content": "Hi"})[1].endswith(message)
    assert lost({"prompt": "Hi", "c": 1, "id": "7"})[1].endswith("`columns: {question: prompt, answer: ...}`")


@pytest.mark.parametrize("format", ["alpaca", "chat", "qa", "text"])
def test_a_format_that_is_asked_for_is_the_only_one(format):
    rows: dict[str, dict[str, Any]] = {
        "alpaca": {"instruction": "Hi", "output": "Yes"},
        "chat": {"messages": [user("Hi"), assistant("Yes")]},
        "qa": {"question": "Hi", "answer": "Yes"},
        "text": {"text": "Yes"},
    }
    everything = {key: value for row in rows.values() for key, value in row.items()}
    assert normalize(everything, format) == normalize(rows[format])
    del rows[format]
    for row in rows.values():
        assert lost(row, format=format) == (
            "bad_schema",
            f"is not of the format {format}: its keys are {', '.join(row)}",
        )


# Columns and the system prompt


def test_columns_name_the_fields_by_dotted_paths_and_names_with_dots():
    row = {"data": {"q": {"text": "Hi"}, "a": "Yes"}, "x.y": "Be brief", "question": "other"}
    content = conversation(row, columns={"question": "data.q.text", "answer": "data.a", "system": "x.y"})
    assert content.messages == [system("Be brief"), user("Hi"), assistant("Yes")]
    assert row["question"] == "other"


@pytest.mark.parametrize(
    ("columns", "messages"),
    [
        ({"question": "q", "answer": "a"}, [user("Q"), assistant("A")]),
        ({"instruction": "q", "output": "a"}, [user("Q"), assistant("A")]),
        ({"answer": "a"}, [user("own"), assistant("A")]),
    ],
)
def test_the_shape_that_columns_name_comes_before_any_other(columns, messages):
    row = {"messages": [user("x"), assistant("y")], "question": "own", "answer": "own", "text": "z", "q": "Q", "a": "A"}
    assert conversation(row, columns=columns).messages == messages
    assert normalize(row, columns={"text": "q"}) == Text("Q")


def test_a_number_in_a_path_reaches_into_a_list():
    row = {"q": ["a", {"text": "Hi"}], "answers": {"text": ["Yes", "No"]}}
    columns = {"question": "q.1.text", "answer": "answers.text.0"}
    assert conversation(row, columns=columns).messages == [user("Hi"), assistant("Yes")]
    for theirs in ("q.2.text", "q.-1.text", "q.x"):
        assert lost(row, columns={"question": theirs, "answer": "answers.text.0"})[0] == "bad_schema"


@pytest.mark.parametrize("theirs", ["nowhere", "data.nowhere", "data.q.deeper", "text.x"])
def test_a_column_that_the_row_lacks_is_named(theirs):
    row = {"data": {"q": "Hi"}, "text": "x"}
    expected = ("bad_schema", f"columns maps question to {theirs!r}, which the row lacks: its keys are data, text")
    assert lost(row, columns={"question": theirs}) == expected


def test_renaming_leaves_the_row_as_it_was():
    row = {"a": 1}
    assert rename_columns(row, {"b": "a"}) == {"a": 1, "b": 1}
    assert row == {"a": 1}


def test_the_system_prompt_stands_before_conversations_that_have_none():
    ours = system("Be brief")
    chat = conversation({"messages": [user("Hi"), assistant("Yes")]}, system_prompt="Be brief")
    assert chat.messages == [ours, user("Hi"), assistant("Yes")]
    assert chat.trainable == [False, False, True]
    assert conversation({"question": "Hi", "answer": "Yes"}, system_prompt="Be brief").messages[0] == ours
    for role in ("system", "developer"):
        own = {"role": role, "content": ""}
        row = {"messages": [own, user("Hi"), assistant("Yes")]}
        assert conversation(row, system_prompt="Be brief").messages == row["messages"]
    assert normalize({"text": "a"}, system_prompt="Be brief") == Text("a")


# Anything at all

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
rows = st.fixed_dictionaries(
    {},
    optional={
        **dict.fromkeys(row_keys, values),
        "messages": st.one_of(st.lists(message, max_size=4), values),
        "conversations": st.one_of(st.lists(message, max_size=4), values),
    },
)


@given(
    rows,
    st.sampled_from(["auto", "alpaca", "chat", "qa", "text"]),
    st.one_of(
        st.none(),
        st.dictionaries(st.sampled_from(row_keys), st.sampled_from([*row_keys, "messages.0", "a.b"]), max_size=2),
    ),
    st.sampled_from([None, "Be brief"]),
)
@example({"instruction": "x"}, "alpaca", None, None)
@example({"output": 10**400, "instruction": 10**400}, "auto", None, None)
@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.too_slow])
def test_any_row_is_brought_into_the_form_or_lost_with_a_reason(row, format, columns, system_prompt):
    try:
        content = normalize(row, format, columns, system_prompt)
    except RowLost as error:
        reason, length = error.reason, len(error.message)
        assert reason in ("bad_schema", "empty_answer", "no_trained_token")
        assert 0 < length < 600
        return
    if isinstance(content, Text):
        assert content.text.strip()
        return
    assert len(content.messages) == len(content.trainable)
    assert any(m["role"] == "assistant" for m in content.messages)
    for turn, trained in zip(content.messages, content.trainable, strict=True):
        assert isinstance(turn["content"], str)
        assert turn["role"] == "assistant" or not trained
        assert turn["role"] != "assistant" or turn["content"].strip() or turn["tool_calls"]
        assert all(isinstance(call["function"]["name"], str) for call in turn.get("tool_calls", []))
    assert all(isinstance(tool["function"], object) for tool in content.tools or [])


@given(rows)
@settings(max_examples=50, deadline=None, suppress_health_check=[HealthCheck.too_slow])
def test_a_row_of_a_detected_format_is_the_same_row_when_that_format_is_asked_for(row):
    try:
        shape, _ = detect(row)
        content = normalize(row)
    except RowLost:
        return
    assert normalize(row, shape) == content
    assert content.format == shape


# Real rows


def test_real_files_load_with_nothing_but_their_path(shared_data):
    expected = {
        "formats/alpaca_en_demo.json": ("alpaca", 999),
        "formats/identity.json": ("alpaca", 91),
        "formats/glaive_toolcall_en_demo.json": ("chat", 300),
        "formats/dolly.json": ("qa", 12),
        "formats/c4_demo.jsonl": ("text", 300),
        "formats/wiki_demo.txt": ("text", 30),
        "gsm8k/train.jsonl": ("qa", 7473),
        "gsm8k/test.jsonl": ("qa", 1319),
    }
    for name, (format, count) in expected.items():
        contents = [normalize(row.data or {}) for row in read_files([shared_data / name])]
        assert {content.format for content in contents} == {format}, name
        assert len(contents) == count, name


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
