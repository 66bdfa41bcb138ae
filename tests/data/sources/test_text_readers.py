"""Rows of JSON, JSON Lines, CSV, TSV and text files, with their lines, and all ways to break such a file."""

from __future__ import annotations

import csv
import io
import json
import logging
from pathlib import Path

import pytest

from sft.data.sources.files import read_files
from sft.data.sources.text_readers import data_extension
from tests.data.sources.samples import CONTENTS, JSONL, ROWS, error, read, write


@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "a.csv", "a.tsv", "a.txt"])
@pytest.mark.parametrize("ends", ["\n", "\r\n"])
@pytest.mark.parametrize("bom", [b"", b"\xef\xbb\xbf"])
def test_byte_order_marks_and_windows_line_ends_are_not_part_of_the_rows(tmp_path, name, ends, bom):
    content = {"a.txt": "Hi?\nYes\n", "a.csv": "question\nHi?\n3\n", "a.tsv": "question\tn\nHi?\t1\n"}.get(name)
    text = content if content is not None else str(CONTENTS[name])
    plain = [row.data for row in read(tmp_path / f"plain_{name}", text)]
    rows = read(tmp_path / name, bom + text.replace("\n", ends).encode())
    assert [row.data for row in rows] == plain
    assert [row.line for row in rows] == [row.line for row in read(tmp_path / f"plain_{name}")]


@pytest.mark.parametrize("name", ["a.jsonl", "a.txt"])
def test_a_line_that_is_not_wanted_is_not_even_decoded(tmp_path, name):
    path = write(tmp_path / name, b'{broken \xe9\n{"a": 1}\n\n{"a": 2}\n')
    (row,) = read_files([path], lambda index: index == 2)
    assert (row.index, row.line, row.lost) == (2, 4, None)
    with pytest.raises(StopIteration):
        next(iter(read_files([path], lambda _: False)))


def test_lines_of_text_keep_their_spaces_and_blank_lines_are_skipped(tmp_path):
    rows = read(tmp_path / "a.txt", "one\n\n  two\u2028still two\n \t\nthree")
    assert [(row.line, row.data) for row in rows] == [
        (1, {"text": "one"}),
        (3, {"text": "  two\u2028still two"}),
        (5, {"text": "three"}),
    ]


def test_json_lines_in_a_json_file(tmp_path):
    assert [row.data for row in read(tmp_path / "a.json", JSONL)] == ROWS
    rows = read(tmp_path / "b.json", JSONL + "{broken\n" + JSONL)
    assert [row.line for row in rows if row.lost] == [4]
    assert len(rows) == 7


def test_one_object_is_one_row_and_an_object_around_a_list_is_its_rows(tmp_path):
    assert [row.data for row in read(tmp_path / "a.json", json.dumps(ROWS[0]))] == [ROWS[0]]
    assert [row.data for row in read(tmp_path / "b.json", json.dumps({"data": ROWS}, indent=1))] == ROWS


@pytest.mark.parametrize(
    "row",
    [
        {"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Yes"}]},
        {"conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Yes"}]},
        {"text": ["a"]},
        {"data": []},
    ],
)
def test_a_single_conversation_is_a_row_and_not_a_list_of_rows(tmp_path, row):
    assert [r.data for r in read(tmp_path / "a.json", json.dumps(row))] == [row]


@pytest.mark.parametrize("name", ["a.jsonl", "a.json"])
def test_a_list_of_messages_is_a_conversation(tmp_path, name):
    first = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Yes"}]
    second = [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "No"}]
    lines = [json.dumps(first), json.dumps(second), "[]", json.dumps([*first, "Hi"])]
    content = "\n".join(lines) if name == "a.jsonl" else f"[{', '.join(lines)}]"
    rows = read(tmp_path / name, content)
    assert [row.data for row in rows] == [{"messages": first}, {"messages": second}, None, None]
    assert [row.lost[1].split(":")[0] for row in rows if row.lost] == ["expected an object with keys, found list"] * 2


def test_a_value_that_is_not_an_object_is_one_lost_row(tmp_path):
    rows = read(tmp_path / "a.json", json.dumps([ROWS[0], "text", 3, None, [ROWS[1]]]))
    assert [row.lost and row.lost[0] for row in rows] == [None, *["bad_schema"] * 4]
    assert rows[1].lost == ("bad_schema", "expected an object with keys, found str: 'text'")
    assert rows[1].line == 2


@pytest.mark.parametrize(
    ("line", "reason", "message"),
    [
        ('{"a": 1', "bad_json", "Expecting ',' delimiter at column 8"),
        ("not json", "bad_json", "Expecting value at column 1: 'not json'"),
        ('[{"a": 1}]', "bad_schema", "found list"),
        ("null", "bad_schema", "found null"),
        ('{"a": "\\ud83', "bad_json", "Invalid"),
        ('{"a": ' + "9" * 5000 + "}", "bad_json", "4300"),
        ("[" * 100_000, "bad_json", "recursion"),
    ],
)
def test_a_bad_line_is_one_lost_row_with_its_line(tmp_path, line, reason, message):
    rows = read(tmp_path / "a.jsonl", f'{{"a": 1}}\n\n{line}\n{{"a": 2}}\n')
    assert [row.line for row in rows] == [1, 3, 4]
    assert [row.index for row in rows] == [0, 1, 2]
    assert [row.data for row in rows] == [{"a": 1}, None, {"a": 2}]
    assert rows[1].lost is not None
    assert rows[1].lost[0] == reason
    assert message in rows[1].lost[1]
    assert len(rows[1].lost[1]) < 300


def test_a_bad_byte_is_one_lost_row_with_its_line(tmp_path):
    rows = read(tmp_path / "a.jsonl", JSONL.encode() + b'{"a": "caf\xe9"}\n' + JSONL.encode())
    command = f"iconv -f windows-1252 -t utf-8 {tmp_path / 'a.jsonl'} > NEW.jsonl"
    hint = f"convert it, if it comes from Windows or is Latin-1: {command}"
    assert [(row.line, row.lost) for row in rows if row.lost] == [
        (4, ("bad_encoding", f"not UTF-8: invalid continuation byte at byte 10 of the line; {hint}"))
    ]
    assert len(rows) == 7
    (_, lost) = read(tmp_path / "a.txt", b"good\ncaf\xe9\n")
    assert (lost.line, lost.lost and lost.lost[0]) == (2, "bad_encoding")


@pytest.mark.parametrize(
    ("content", "message", "line"),
    [
        (json.dumps(ROWS, indent=1)[:-3], "not JSON: Expecting", 13),
        ('[{"a": 1},\n{"a": 2},\n{"a": }]', "not JSON: Expecting value at column 7", 3),
        ("[" * 100_000, "not JSON that can be read: maximum recursion", None),
        ('[{"a": ' + "9" * 5000 + "}]", "not JSON that can be read: Exceeds the limit", None),
        ('"text"', "expected a JSON array of rows, found str", None),
        ('[\n{"a": "é"}]'.encode("latin-1"), "not UTF-8: ", 2),
        ("\ufeff".encode("utf-16"), "not UTF-8: ", 1),
    ],
)
def test_a_json_file_that_cannot_be_read_as_a_whole_is_an_error(tmp_path, content, message, line):
    problem = error(tmp_path / "a.json", content)
    assert problem.message.startswith(message)
    assert problem.line == line


def test_a_duplicate_key_loses_only_its_row(tmp_path):
    bad = '{"a": 1, "b": {"c": 1, "d": 2, "c": 3}}'
    expected = [(None, None), (None, ("bad_json", "the key 'c' appears twice in one object")), (None, None)]
    for name, content in {
        "a.jsonl": f'{{"a": 1}}\n{bad}\n{{"a": 2}}\n',
        "a.json": f'[{{"a": 1}}, {bad}, {{"a": 2}}]',
        "b.json": f'{{"a": 1}}\n{bad}\n{{"a": 2}}\n',
    }.items():
        rows = read(tmp_path / name, content)
        assert [(None, row.lost) for row in rows] == expected
        assert [row.data for row in rows] == [{"a": 1}, None, {"a": 2}]
        assert [row.line for row in rows] == [1, 2, 3]
    first = read(tmp_path / "c.json", f'{bad}\n{{"a": 2}}\n')
    assert [row.lost and row.lost[0] for row in first] == ["bad_json", None]
    problem = error(tmp_path / "d.json", bad)
    assert problem.message == "not JSON that can be read: the key 'c' appears twice in one object"


def test_json_lines_in_a_json_file_whose_first_row_is_longer_than_the_head(tmp_path):
    long = {"a": "x" * 2_000_000}
    rows = read(tmp_path / "a.json", json.dumps(long) + '\n{"a": 1}\n')
    assert [row.data for row in rows] == [long, {"a": 1}]


@pytest.mark.parametrize("name", ["a.csv", "a.tsv"])
@pytest.mark.parametrize("delimiter", [";", "\t", "|"])
@pytest.mark.parametrize("quoting", [csv.QUOTE_ALL, csv.QUOTE_MINIMAL])
@pytest.mark.parametrize("ends", ["\n", "\r\n"])
def test_columns_separated_as_excel_does_in_other_languages(tmp_path, caplog, name, delimiter, quoting, ends):
    texts = [["question", "answer"], ['a, b; c\t"d" | e', "two\nlines"], ["", "x"], ["f", "g"]]
    stream = io.StringIO(newline="")
    csv.writer(stream, delimiter=delimiter, quoting=quoting, lineterminator=ends).writerows(texts)
    with caplog.at_level(logging.WARNING, logger="sft"):
        rows = read(tmp_path / name, stream.getvalue().encode())
        read(tmp_path / name)
    assert [row.data for row in rows] == [dict(zip(texts[0], text, strict=True)) for text in texts[1:]]
    assert [row.line for row in rows] == [2, 4, 5]
    said = f"{tmp_path / name}: reading it with {delimiter!r} as the column separator"
    assert caplog.messages == ([] if name == "a.tsv" and delimiter == "\t" else [said])


@pytest.mark.parametrize(
    ("content", "rows"),
    [
        ("text\na; b\n", [{"text": "a; b"}]),
        ("a;b,c\n1;2,3\n", [{"a;b": "1;2", "c": "3"}]),
        ("sep=;\nquestion;answer\na;b\n", [{"question": "a", "answer": "b"}]),
        ("sep=,\nquestion,answer\na,b\n", [{"question": "a", "answer": "b"}]),
        ('"question, in short";"answer"\na;b\n', [{"question, in short": "a", "answer": "b"}]),
        ("a;b|c\n1;2|3\n", [{"a": "1", "b|c": "2|3"}]),
    ],
)
def test_the_header_alone_decides_the_delimiter(tmp_path, content, rows):
    assert [row.data for row in read(tmp_path / "a.csv", content)] == rows


def test_quoted_fields_hold_separators_quotes_and_line_feeds_and_rows_know_their_first_line(tmp_path):
    rows = read(tmp_path / "a.csv", 'a,b\n"x,\n""y""\n",1\n\n2,3\n   \n"4\n",5\n')
    assert [(row.line, row.data) for row in rows] == [
        (2, {"a": 'x,\n"y"\n', "b": "1"}),
        (6, {"a": "2", "b": "3"}),
        (8, {"a": "4\n", "b": "5"}),
    ]


def test_a_header_of_several_lines_moves_the_rows(tmp_path):
    rows = read(tmp_path / "a.csv", '\n"a\nb",c\n1,2\n')
    assert [(row.line, row.data) for row in rows] == [(4, {"a\nb": "1", "c": "2"})]


@pytest.mark.parametrize("separator", ["\u2028", "\u2029", "\x0c", "\x0b", "\x85", "\x1c"])
def test_separators_that_are_not_line_ends_stay_inside_their_field(tmp_path, separator):
    rows = read(tmp_path / "a.csv", f"a,b\none{separator}two,3\n4,5\n")
    assert [row.data for row in rows] == [{"a": f"one{separator}two", "b": "3"}, {"a": "4", "b": "5"}]
    assert [row.line for row in rows] == [2, 3]


def test_a_line_with_another_number_of_fields_is_one_lost_row(tmp_path):
    rows = read(tmp_path / "a.csv", "a,b\n1,2\n3\n4,5,6\n7,8\n,\n")
    assert [(row.line, row.lost) for row in rows if row.lost] == [
        (3, ("bad_schema", "1 fields, the header has 2 columns")),
        (4, ("bad_schema", "3 fields, the header has 2 columns")),
    ]
    assert [row.data for row in rows if row.data] == [
        {"a": "1", "b": "2"},
        {"a": "7", "b": "8"},
        {"a": "", "b": ""},
    ]


@pytest.mark.parametrize(
    ("content", "message", "line"),
    [
        ('a,b\n1,2\n"open,3\n4,5\n', "not CSV: unexpected end of data", 3),
        ('a,b\n1,2\n3,"4"5\n', "not CSV: ',' expected after '\"'", 3),
        ("a,b,a\n1,2,3\n", "two columns are called 'a'", 1),
        ("a,b\n1,2\ncafé,3\n".encode("latin-1"), "not UTF-8: ", 3),
    ],
)
def test_a_csv_file_that_cannot_be_parsed_is_an_error_with_the_line(tmp_path, content, message, line):
    problem = error(tmp_path / "a.csv", content)
    assert problem.message.startswith(message)
    assert problem.line == line


def test_a_field_may_be_longer_than_pythons_limit(tmp_path):
    (row,) = read(tmp_path / "a.csv", f"a,b\n{'x' * 200_000},1\n")
    assert row.data is not None
    assert len(row.data["a"]) == 200_000


def test_a_json_file_of_blanks_is_an_error(tmp_path):
    assert error(tmp_path / "a.json", " \n").message.startswith("not JSON")


@pytest.mark.parametrize(
    ("name", "extension"),
    [
        ("a.jsonl", ".jsonl"),
        ("a.JSONL", ".jsonl"),
        ("a.b.csv.GZ", ".csv"),
        ("a.parquet.zst", ".parquet"),
        ("a.gz", ""),
        ("README", ""),
        ("v1.5", ".5"),
    ],
)
def test_extensions(name, extension):
    assert data_extension(Path(name)) == extension
