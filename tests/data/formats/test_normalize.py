"""Rows of every shape converted to the common form; and a reason, never a traceback, for each that cannot be."""

from __future__ import annotations

import datetime
from typing import Any

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from sft.data.formats.conversation import RowLost, Text
from sft.data.formats.normalize import QUESTION_ANSWER_KEYS, detect_shape, normalize, rename_columns
from sft.data.sources.files import read_files
from tests.data.formats.rows import any_rows, assistant, conversation, lost, row_keys, system, user


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
def test_an_unanswerable_squad_question_is_an_empty_answer(answers):
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


def test_text():
    assert normalize({"text": " a\nb ", "url": "x"}) == Text(" a\nb ", "text")
    assert lost({"text": " \n"}) == ("empty_answer", "the text is empty")
    assert lost({"text": None}) == ("bad_schema", "text: expected text, found null")
    assert lost({"text": ["a"]}) == ("bad_schema", "text: expected text, found list")


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
def test_a_table_of_several_formats_has_nulls_in_the_columns_of_the_others(nothing, filled, format, answer):
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
def test_the_shape_that_columns_name_takes_precedence(columns, messages):
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


def test_the_system_prompt_is_prepended_to_conversations_without_one():
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


@given(
    any_rows,
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
def test_any_row_is_normalized_or_lost_with_a_reason(row, format, columns, system_prompt):
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


@given(any_rows)
@settings(max_examples=50, deadline=None, suppress_health_check=[HealthCheck.too_slow])
def test_a_row_of_a_detected_format_is_the_same_row_when_that_format_is_asked_for(row):
    try:
        shape, _ = detect_shape(row)
        content = normalize(row)
    except RowLost:
        return
    assert normalize(row, shape) == content
    assert content.format == shape


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
