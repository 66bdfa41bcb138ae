"""Prompt files: the row formats that are read, and the errors with their lines."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import pytest

from sft.data.formats.conversation import Conversation
from sft.data.formats.normalize import normalize
from sft.errors import UserError
from sft.inference.prompts import read_prompts
from tests.runs import write_rows

TOOL = {"type": "function", "function": {"name": "look", "parameters": {}}}


def user(text: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": text}]


def assistant(text: str) -> list[dict[str, str]]:
    return [{"role": "assistant", "content": text}]


def asked(path: Path) -> list[list[dict[str, str]]]:
    return [conversation.messages for conversation in read_prompts(path)]


ANSWERED = [
    ({"question": "b", "answer": "c"}, user("b")),
    ({"instruction": "d", "input": "e", "output": "f"}, user("d\n\ne")),
    ({"instruction": "d", "output": "f", "history": [["g", "h"]]}, [*user("g"), *assistant("h"), *user("d")]),
    ({"instruction": "Who is he?", "context": "Bob is a cat.", "response": "Bob"}, user("Who is he?\n\nBob is a cat.")),
    ({"context": "Bob is a cat.", "question": "Who?", "answers": {"text": ["Bob"]}}, user("Bob is a cat.\n\nWho?")),
    ({"conversations": [{"from": "human", "value": "g"}, {"from": "gpt", "value": "h"}]}, user("g")),
    ({"messages": [*user("g"), *assistant("h")], "system": "s"}, [{"role": "system", "content": "s"}, *user("g")]),
    ({"prompt": user("a"), "completion": assistant("b")}, user("a")),
    ({"input": "i", "output": "o", "prompt": ""}, user("i")),
]
UNANSWERED = [
    ({"prompt": "a"}, user("a")),
    ({"problem": "p", "id": 3}, user("p")),
    ({"instruction": "d", "input": "", "system": "s"}, [{"role": "system", "content": "s"}, *user("d")]),
    ({"instruction": "d", "context": "c"}, user("d\n\nc")),
    ({"question": "q", "context": "c"}, user("c\n\nq")),
    ({"messages": [*user("g"), *assistant("h"), *user("i")]}, [*user("g"), *assistant("h"), *user("i")]),
    ({"conversations": [{"from": "human", "value": "g"}]}, user("g")),
    ({"text": "T", "question": "q"}, user("q")),
]


def test_text_files_have_one_prompt_a_line(tmp_path: Path) -> None:
    path = tmp_path / "p.txt"
    path.write_text("\ufeffone\n\ntwo {x}\r\n", encoding="utf-8")
    assert asked(path) == [user("one"), user("two {x}")]


@pytest.mark.parametrize("suffix", [".jsonl", ".json"])
def test_rows_in_the_formats_of_training(tmp_path: Path, suffix: str) -> None:
    rows = [row for row, _ in ANSWERED + UNANSWERED]
    path = tmp_path / f"p{suffix}"
    path.write_text(json.dumps(rows) if suffix == ".json" else "".join(json.dumps(row) + "\n" for row in rows))
    assert asked(path) == [messages for _, messages in ANSWERED + UNANSWERED]


@pytest.mark.parametrize(("row", "messages"), ANSWERED)
def test_a_row_has_the_prompt_that_it_has_in_training(row: dict[str, object], messages: list[dict[str, str]]) -> None:
    conversation = normalize(row)
    assert isinstance(conversation, Conversation)
    assert conversation.messages[:-1] == messages


def test_tools_are_kept(tmp_path: Path) -> None:
    call = {"role": "assistant", "content": "", "tool_calls": [{"name": "look", "arguments": {}}]}
    found = {"role": "tool", "content": "a cat"}
    row = {"messages": [*user("g"), call, found, *assistant("h")], "tools": [TOOL]}
    (conversation,) = read_prompts(write_rows(tmp_path / "p.jsonl", [row]))
    assert conversation.tools == [TOOL]
    assert [message["role"] for message in conversation.messages] == ["user", "assistant", "tool"]


def test_tables_and_compressed_files_are_read_as_in_training(tmp_path: Path) -> None:
    (tmp_path / "p.csv").write_text('question,answer\n"a\nb",c\n')
    (tmp_path / "p.jsonl.gz").write_bytes(gzip.compress(b'{"prompt": "z"}\n'))
    assert asked(tmp_path / "p.csv") == [user("a\nb")]
    assert asked(tmp_path / "p.jsonl.gz") == [user("z")]


def test_all_wrong_rows_are_reported_with_their_lines(tmp_path: Path) -> None:
    path = tmp_path / "p.jsonl"
    lines = ['{"prompt": "ok"}', '{"text": "x"}', "", '{"prompt": [3]}', '{"messages": [{"role": "user"}]}', "[1]"]
    path.write_text("\n".join([*lines, "{oops", '{"prompt": " "}']))
    with pytest.raises(UserError) as caught:
        read_prompts(path)
    assert [(p.file, p.line) for p in caught.value.problems] == [(str(path), n) for n in (2, 4, 5, 6, 7, 8)]
    assert caught.value.problems[0].message == (
        "none of messages, conversations, instruction, question, input, prompt, problem is in it; its keys are text"
    )


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("p.txt", "\n \n", "holds no rows"),
        ("p.json", "{", "not JSON"),
        ("p.json", "{}", "none of messages"),
        ("p.doc", "a,b", "cannot tell the format"),
        ("p.jsonl", '{"messages": [{"role": "assistant", "content": "x"}]}', "something to answer"),
        ("p.jsonl", '{"messages": [{"role": "system", "content": "x"}]}', "something to answer"),
        ("p.jsonl", '{"messages": [{"role": "robot", "content": "x"}]}', "role 'robot'"),
    ],
)
def test_other_mistakes(tmp_path: Path, name: str, content: str, message: str) -> None:
    (tmp_path / name).write_text(content)
    with pytest.raises(UserError, match=message):
        read_prompts(tmp_path / name)


def test_a_missing_file(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no such file"):
        read_prompts(tmp_path / "nowhere.txt")
