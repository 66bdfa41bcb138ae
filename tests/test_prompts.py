"""Prompt files: the shapes that are read, and each mistake with its line."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from sft.errors import UserError
from sft.prompts import read_prompts


def user(text: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": text}]


def test_text_files_have_one_prompt_a_line(tmp_path: Path) -> None:
    path = tmp_path / "p.txt"
    path.write_text("\ufeffone\n\ntwo {x}\r\n", encoding="utf-8")
    assert read_prompts(path) == [user("one"), user("two {x}")]


@pytest.mark.parametrize("suffix", [".jsonl", ".json"])
def test_rows_in_the_shapes_of_training(tmp_path: Path, suffix: str) -> None:
    rows = [
        {"prompt": "a"},
        {"question": "b", "answer": "c"},
        {"instruction": "d", "input": "e", "output": "f"},
        {"instruction": "d", "input": "", "system": "s"},
        {"messages": [*user("g"), {"role": "assistant", "content": "h"}]},
        {"messages": [*user("g"), {"role": "assistant", "content": "h"}, *user("i")]},
        "j",
    ]
    path = tmp_path / f"p{suffix}"
    path.write_text(json.dumps(rows) if suffix == ".json" else "".join(json.dumps(row) + "\n" for row in rows))
    assert read_prompts(path) == [
        user("a"),
        user("b"),
        user("d\n\ne"),
        [{"role": "system", "content": "s"}, *user("d")],
        user("g"),
        [*user("g"), {"role": "assistant", "content": "h"}, *user("i")],
        user("j"),
    ]


def test_all_wrong_rows_are_reported_with_their_lines(tmp_path: Path) -> None:
    path = tmp_path / "p.jsonl"
    path.write_text('{"prompt": "ok"}\n{"text": "x"}\n\n{"prompt": 3}\n{"messages": [{"role": "user"}]}\n[1]\n')
    with pytest.raises(UserError) as caught:
        read_prompts(path)
    assert [(p.file, p.line) for p in caught.value.problems] == [(str(path), n) for n in (2, 4, 5, 6)]
    assert "it has text" in caught.value.problems[0].message


def test_broken_json_lines_are_all_reported(tmp_path: Path) -> None:
    path = tmp_path / "p.jsonl"
    path.write_text('{"prompt": "ok"}\n{oops\n\n]\n')
    with pytest.raises(UserError) as caught:
        read_prompts(path)
    assert [p.line for p in caught.value.problems] == [2, 4]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("p.txt", "\n \n", "holds no prompt"),
        ("p.json", "{", "not valid JSON"),
        ("p.json", "{}", "not a list"),
        ("p.csv", "a,b", "unknown kind of file"),
        ("p.jsonl", '{"messages": [{"role": "assistant", "content": "x"}]}', "something to answer"),
        ("p.jsonl", '{"messages": [{"role": "robot", "content": "x"}]}', "role 'robot'"),
    ],
)
def test_other_mistakes(tmp_path: Path, name: str, content: str, message: str) -> None:
    (tmp_path / name).write_text(content)
    with pytest.raises(UserError, match=message):
        read_prompts(tmp_path / name)


def test_a_missing_file(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="cannot read it"):
        read_prompts(tmp_path / "nowhere.txt")
