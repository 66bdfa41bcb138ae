"""Every kind of file, read row by row with its place; and every way in which a file can be damaged."""

from __future__ import annotations

import csv
import gzip
import io
import json
import logging
import os
import shutil
import subprocess
import tracemalloc
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard

from sft.data.sources.file_io import conversion
from sft.data.sources.files import find_files, read_files, read_hub, read_saved
from sft.data.sources.row import Row
from sft.data.sources.text_readers import data_extension
from sft.errors import UserError

ROWS = [{"question": "Hi?", "answer": "Yes"}, {"question": "é🎉", "answer": "a\nb"}, {"question": "3", "answer": "No"}]
JSONL = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in ROWS)


def write(path: Path, content: str | bytes) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


def read(path: Path, content: str | bytes | None = None) -> list[Row]:
    """The rows of one file, which is written first when `content` is given."""
    if content is not None:
        write(path, content)
    return list(read_files([path]))


def error(path: Path, content: str | bytes) -> Any:
    """The one problem that reading a file of this content raises."""
    with pytest.raises(UserError) as caught:
        read(path, content)
    assert len(caught.value.problems) == 1
    assert caught.value.problems[0].file == str(path)
    return caught.value.problems[0]


def arrow_bytes(table: pa.Table, stream: bool) -> bytes:
    sink = pa.BufferOutputStream()
    make: Any = pa.ipc.new_stream if stream else pa.ipc.new_file
    with make(sink, table.schema) as writer:
        writer.write_table(table, max_chunksize=2)
    return sink.getvalue().to_pybytes()


def parquet_bytes(table: pa.Table) -> bytes:
    sink = pa.BufferOutputStream()
    pq.write_table(table, sink, row_group_size=2)
    return sink.getvalue().to_pybytes()


TABLE = pa.Table.from_pylist(ROWS)
CSV = 'question,answer\nHi?,Yes\né🎉,"a\nb"\n3,No\n'
CONTENTS: dict[str, Any] = {
    "a.jsonl": JSONL,
    "a.ndjson": JSONL,
    "a.json": json.dumps(ROWS),
    "a.csv": CSV,
    "a.tsv": CSV.replace(",", "\t"),
    "a.parquet": parquet_bytes(TABLE),
    "a.arrow": arrow_bytes(TABLE, stream=False),
    "b.arrow": arrow_bytes(TABLE, stream=True),
}
LINES = {"a.csv": [2, 3, 5], "a.tsv": [2, 3, 5]}
PACK: dict[str, Any] = {"": bytes, ".gz": gzip.compress, ".zst": zstandard.ZstdCompressor().compress}


@pytest.mark.parametrize("compression", PACK)
@pytest.mark.parametrize("name", CONTENTS)
def test_every_kind_of_file_gives_the_same_rows_with_their_places(tmp_path, name, compression):
    content = CONTENTS[name]
    raw = content if isinstance(content, bytes) else content.encode()
    path = tmp_path / (name + compression)
    rows = read(path, PACK[compression](raw))
    assert [row.data for row in rows] == ROWS
    assert [row.index for row in rows] == [0, 1, 2]
    assert [row.line for row in rows] == LINES.get(name, [1, 2, 3])
    assert {row.file for row in rows} == {str(path)}
    assert all(row.lost is None for row in rows)


@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "a.csv", "a.tsv", "a.txt"])
@pytest.mark.parametrize("ends", ["\n", "\r\n"])
@pytest.mark.parametrize("bom", [b"", b"\xef\xbb\xbf"])
def test_byte_order_marks_and_windows_line_ends_are_no_part_of_the_rows(tmp_path, name, ends, bom):
    content = {"a.txt": "Hi?\nYes\n", "a.csv": "question\nHi?\n3\n", "a.tsv": "question\tn\nHi?\t1\n"}.get(name)
    text = content if content is not None else str(CONTENTS[name])
    plain = [row.data for row in read(tmp_path / f"plain_{name}", text)]
    rows = read(tmp_path / name, bom + text.replace("\n", ends).encode())
    assert [row.data for row in rows] == plain
    assert [row.line for row in rows] == [row.line for row in read(tmp_path / f"plain_{name}")]


@pytest.mark.parametrize("compression", PACK)
@pytest.mark.parametrize("name", CONTENTS)
@pytest.mark.parametrize("picked", [[0], [1, 4], [2, 3], [5], [], [0, 1, 2, 3, 4, 5]])
def test_rows_that_are_not_wanted_are_counted_and_no_more(tmp_path, name, compression, picked):
    content = CONTENTS[name]
    raw = PACK[compression](content if isinstance(content, bytes) else content.encode())
    files = [write(tmp_path / "one" / (name + compression), raw), write(tmp_path / "two" / (name + compression), raw)]
    asked: set[int] = set()

    def wanted(index: int) -> bool:
        asked.add(index)
        return index in picked

    every = list(read_files(files))
    assert list(read_files(files, wanted)) == [row for row in every if row.index in picked]
    assert asked == set(range(6))


@pytest.mark.parametrize("name", ["a.jsonl", "a.txt"])
def test_a_line_that_is_not_wanted_is_not_even_decoded(tmp_path, name):
    path = write(tmp_path / name, b'{broken \xe9\n{"a": 1}\n\n{"a": 2}\n')
    (row,) = read_files([path], lambda index: index == 2)
    assert (row.index, row.line, row.lost) == (2, 4, None)
    with pytest.raises(StopIteration):
        next(iter(read_files([path], lambda _: False)))


def test_row_groups_without_a_wanted_row_are_not_read(tmp_path, monkeypatch):
    path = write(tmp_path / "a.parquet", CONTENTS["a.parquet"])  # groups of two rows and one
    groups: list[int] = []
    read_batches = pq.ParquetFile.iter_batches

    def note(self: Any, size: int, row_groups: list[int]) -> Any:
        groups.extend(row_groups)
        return read_batches(self, size, row_groups)

    monkeypatch.setattr(pq.ParquetFile, "iter_batches", note)
    assert [row.data for row in read_files([path], lambda index: index == 2)] == [ROWS[2]]
    assert groups == [1]


def test_a_file_is_not_held_in_memory(tmp_path):
    """A file of 8 MB of each kind is read within 5 MB of Python's memory."""
    row = {"question": "Hi?", "answer": "x" * 2000}
    contents = {
        "a.jsonl": (json.dumps(row) + "\n") * 4000,
        "a.txt": ("x" * 2000 + "\n") * 4000,
        "a.csv": "question,answer\n" + ("Hi?," + "x" * 2000 + "\n") * 4000,
        "a.json": "[" + ",".join([json.dumps(row)] * 4000) + "]",
        "b.json": (json.dumps(row) + "\n") * 4000,
    }
    packed: dict[str, bytes] = {f"{name}{c}": PACK[c](text.encode()) for name, text in contents.items() for c in PACK}
    for name, content in packed.items():
        path = write(tmp_path / name, content)
        tracemalloc.start()
        count = sum(1 for _ in read_files([path]))
        _, peak = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        assert (count, peak < 5_000_000) == (4000, True), f"{name}: {peak:,} bytes"


def test_lines_of_text_keep_their_blanks_and_blank_lines_are_no_rows(tmp_path):
    rows = read(tmp_path / "a.txt", "one\n\n  two\u2028still two\n \t\nthree")
    assert [(row.line, row.data) for row in rows] == [
        (1, {"text": "one"}),
        (3, {"text": "  two\u2028still two"}),
        (5, {"text": "three"}),
    ]


# JSON


def test_json_lines_under_a_json_name(tmp_path):
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


def test_a_value_that_is_no_object_is_one_lost_row(tmp_path):
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


def test_a_key_that_stands_twice_loses_its_row_alone(tmp_path):
    bad = '{"a": 1, "b": {"c": 1, "d": 2, "c": 3}}'
    expected = [(None, None), (None, ("bad_json", "the key 'c' stands twice in one object")), (None, None)]
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
    assert problem.message == "not JSON that can be read: the key 'c' stands twice in one object"


def test_json_lines_under_a_json_name_whose_first_row_is_longer_than_what_shows_the_kind(tmp_path):
    long = {"a": "x" * 2_000_000}
    rows = read(tmp_path / "a.json", json.dumps(long) + '\n{"a": 1}\n')
    assert [row.data for row in rows] == [long, {"a": 1}]


@pytest.mark.parametrize("name", ["a.jsonl", "a.txt", "a.json", "a.csv"])
@pytest.mark.parametrize("encoding", ["utf-16-le", "utf-16-be"])
def test_utf16_is_said_by_its_name(tmp_path, name, encoding):
    problem = error(tmp_path / name, ("\ufeff" + JSONL).encode(encoding))
    assert (problem.message, problem.line) == ("not UTF-8: it begins with the mark of UTF-16", 1)
    assert problem.hint == f"convert it: iconv -f utf-16 -t utf-8 {tmp_path / name} > NEW{Path(name).suffix}"


@pytest.mark.parametrize("name", ["a.json", "a.csv", "a.jsonl", "a.txt"])
def test_what_is_advised_for_a_file_from_windows_keeps_its_characters(tmp_path, name):
    """Latin-1 has control characters where Windows-1252 has quotation marks and the euro sign, and never refuses."""
    text = "“Yes” – 5 €"
    content = CONTENTS.get(name, "Hi?\n")
    path = write(tmp_path / name, content.replace("Hi?", text).encode("windows-1252", "xmlcharrefreplace"))
    try:
        said = next(row.lost[1] for row in read(path) if row.lost)
    except UserError as caught:
        said = caught.problems[0].hint
    encoding = said.split("iconv -f ")[1].split()[0]
    path.write_bytes(path.read_bytes().decode(encoding).encode())
    assert text in str(read(path)[0].data)


@pytest.mark.parametrize(
    ("name", "command"),
    [
        ("my rows.csv", "iconv -f windows-1252 -t utf-8 '{path}' > NEW.csv"),
        ("a.csv.gz", "gzip -dc {path} | iconv -f windows-1252 -t utf-8 > NEW.csv"),
        ("a.jsonl.zst", "zstd -dc {path} | iconv -f windows-1252 -t utf-8 > NEW.jsonl"),
    ],
)
def test_the_command_that_is_advised_names_the_whole_path_and_converts_no_compressed_bytes(tmp_path, name, command):
    assert conversion(tmp_path / name).endswith(": " + command.format(path=tmp_path / name))


@pytest.mark.skipif(not (shutil.which("iconv") and shutil.which("gzip")), reason="needs iconv and gzip")
def test_the_command_that_is_advised_does_it(tmp_path):
    path = write(tmp_path / "my rows.csv.gz", gzip.compress("question,answer\nHi?,“Yes” – 5 €\n".encode("cp1252")))
    command = error(path, path.read_bytes()).hint.partition(": ")[2]
    subprocess.run(command, shell=True, check=True, cwd=tmp_path)
    assert [row.data for row in read(tmp_path / "NEW.csv")] == [{"question": "Hi?", "answer": "“Yes” – 5 €"}]


# CSV


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
    said = f"{tmp_path / name}: its columns are separated by {delimiter!r}, and are read so"
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
def test_the_header_alone_tells_what_separates_columns(tmp_path, content, rows):
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
def test_separators_that_are_no_line_ends_stay_inside_their_field(tmp_path, separator):
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


# Damage


@pytest.mark.parametrize("name", [n for n in CONTENTS if n != "b.arrow"])
@pytest.mark.parametrize("compression", [".gz", ".zst"])
def test_a_compressed_file_that_is_cut_short_is_an_error_and_never_fewer_rows(tmp_path, name, compression):
    content = CONTENTS[name]
    packed = PACK[compression](content if isinstance(content, bytes) else content.encode())
    for cut in (len(packed) // 2, len(packed) - 1):
        problem = error(tmp_path / (name + compression), packed[:cut])
        assert "whole?" in problem.hint
        assert problem.message.startswith(("cannot be read", "cannot be decompressed"))


@pytest.mark.parametrize("compression", [".gz", ".zst"])
def test_a_large_compressed_file_that_is_cut_short_is_an_error(tmp_path, compression):
    packed = PACK[compression]((JSONL * 20_000).encode())
    error(tmp_path / f"a.jsonl{compression}", packed[: len(packed) // 2])


@pytest.mark.parametrize("compression", [".gz", ".zst"])
def test_several_compressed_parts_in_one_file_are_read_to_the_end(tmp_path, compression):
    part = PACK[compression](JSONL.encode())
    assert [row.data for row in read(tmp_path / f"a.jsonl{compression}", part + part)] == ROWS * 2


@pytest.mark.parametrize("compression", [".gz", ".zst"])
def test_a_file_that_is_not_compressed_as_its_name_says_is_an_error(tmp_path, compression):
    error(tmp_path / f"a.jsonl{compression}", JSONL)


@pytest.mark.parametrize(
    ("name", "kind"), [("a.parquet", "not Parquet"), ("a.arrow", "not an Arrow file"), ("b.arrow", "not an Arrow file")]
)
def test_broken_tables_are_errors(tmp_path, name, kind):
    content = CONTENTS[name]
    assert isinstance(content, bytes)
    assert error(tmp_path / name, b"no table at all" * 9).message.startswith(kind)
    assert error(tmp_path / name, content[: len(content) // 2]).message.startswith(kind)


def test_a_text_in_a_table_that_is_not_utf8_is_one_lost_row(tmp_path):
    column = pa.array([b"Hi", b"caf\xe9", b"Yes"], pa.binary()).view(pa.string())
    rows = read(tmp_path / "a.parquet", parquet_bytes(pa.table({"text": column})))
    assert [row.data for row in rows] == [{"text": "Hi"}, None, {"text": "Yes"}]
    assert rows[1].lost == ("bad_encoding", "not UTF-8: unexpected end of data")
    assert rows[1].line == 2


NESTED = [
    {"meta": {"a": None, "b": 1}, "messages": [{"calls": [{"name": "w", "arguments": {"city": "Paris"}}]}]},
    {"meta": {"a": 2, "b": None}, "messages": [{"calls": [{"name": "s", "arguments": {"n": [None, 1]}}], "id": "7"}]},
    {"meta": None, "messages": [{"id": "8"}, {"calls": []}]},
]


@pytest.mark.parametrize("kind", ["a.parquet", "a.arrow", "saved", "hub", "stream"])
def test_objects_in_lists_of_a_table_have_their_own_keys_alone(tmp_path, monkeypatch, kind):
    """Arrow gives each of them the keys of all, as null; keys of a column itself stay, for `columns` may name them."""
    import datasets

    table = pa.Table.from_pylist(NESTED)
    assert table.to_pylist()[0]["messages"][0]["calls"][0]["arguments"] == {"city": "Paris", "n": None}
    if kind == "saved":
        datasets.Dataset.from_list(NESTED).save_to_disk(tmp_path / "one")
        rows = list(read_saved(tmp_path / "one", "train", "k"))
    elif kind in ("hub", "stream"):
        monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
        write(tmp_path / "data" / "train.parquet", parquet_bytes(table))
        rows = list(read_hub(str(tmp_path / "data"), None, "train", "k", streaming=kind == "stream"))
    else:
        content = parquet_bytes(table) if kind == "a.parquet" else arrow_bytes(table, stream=True)
        rows = read(tmp_path / kind, content)
    assert [row.data for row in rows] == NESTED


def test_a_null_in_json_lines_was_meant(tmp_path):
    row = {"messages": [{"calls": [{"arguments": {"city": None}}]}]}
    assert [found.data for found in read(tmp_path / "a.jsonl", json.dumps(row))] == [row]


def test_a_file_that_may_not_be_opened_is_an_error(tmp_path, monkeypatch):
    path = write(tmp_path / "a.jsonl", JSONL)

    def refuse(*_: object, **__: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("builtins.open", refuse)
    with pytest.raises(UserError, match=r"a.jsonl: cannot be read: .*Permission denied"):
        list(read_files([path]))


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.jsonl", "\n  \n\t\n"),
        ("a.json", "[]"),
        ("a.csv", "question,answer\n"),
        ("a.csv", " \n\n"),
        ("a.txt", "\ufeff\n\n"),
        ("a.jsonl.gz", gzip.compress(b"")),
        ("a.parquet", parquet_bytes(TABLE.slice(0, 0))),
    ],
)
def test_a_file_without_rows_is_an_error(tmp_path, name, content):
    assert error(tmp_path / name, content).message == "holds no rows"


def test_a_json_file_of_blanks_is_an_error(tmp_path):
    assert error(tmp_path / "a.json", " \n").message.startswith("not JSON")


def test_one_file_without_rows_among_others_is_said_aloud(tmp_path, caplog):
    files = [write(tmp_path / "a.json", "[]"), write(tmp_path / "b.jsonl", JSONL)]
    with caplog.at_level(logging.WARNING, logger="sft"):
        assert len(list(read_files(files))) == 3
    assert caplog.messages == [f"{files[0]} holds no rows"]


# Names


def test_a_list_a_glob_and_a_folder_give_each_file_once_and_in_order(tmp_path):
    b, a, c = (write(tmp_path / "data" / name, JSONL) for name in ("b.jsonl", "a.jsonl.gz", "sub/c.json"))
    write(tmp_path / "data" / "notes.md", "no data")
    folder = str(tmp_path / "data")
    assert find_files(folder, "train_file") == [a, b, c]
    assert find_files(f"{folder}/*.jsonl*", "train_file") == [a, b]
    assert find_files(f"{folder}/**/*.json", "train_file") == [c]
    assert find_files([str(c), f"{folder}/*.jsonl", folder, str(b)], "train_file") == [c, b, a]


def test_indices_count_over_all_files_and_lines_within_each(tmp_path):
    files = [write(tmp_path / "a.jsonl", JSONL), write(tmp_path / "b.jsonl", JSONL)]
    rows = list(read_files(files))
    assert [(row.file, row.index, row.line) for row in rows] == [
        (str(file), 3 * number + at, at + 1) for number, file in enumerate(files) for at in range(3)
    ]


def test_copies_that_editors_leave_in_a_folder_are_not_read(tmp_path):
    kept = write(tmp_path / ".hidden_root" / "data" / "a.jsonl", JSONL)
    write(kept.parent / ".ipynb_checkpoints" / "a-checkpoint.jsonl", JSONL)
    write(kept.parent / "._a.jsonl", b"\x00\x05")
    assert find_files(str(kept.parent), "train_file") == [kept]


def test_what_is_written_about_a_folders_rows_is_no_row(tmp_path):
    kept = write(tmp_path / "a.jsonl", JSONL)
    for name in ("data_report.json", "dataset_dict.json", "sub/dataset_info.json", "sub/state.json"):
        write(tmp_path / name, "{}")
    assert find_files(str(tmp_path), "train_file") == [kept]
    assert find_files(str(tmp_path / "data_report.json"), "train_file") == [tmp_path / "data_report.json"]


def test_a_file_whose_name_looks_like_a_pattern_is_itself(tmp_path):
    path = write(tmp_path / "a[1].jsonl", JSONL)
    assert find_files(str(path), "train_file") == [path]


def test_a_path_under_the_home_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    path = write(tmp_path / "a.jsonl", JSONL)
    assert find_files("~/a.jsonl", "train_file") == [path]


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


@pytest.mark.parametrize(
    ("spec", "message", "hint"),
    [
        ("trian.jsonl", "no such file: '{root}/trian.jsonl'", "did you mean '{root}/train.jsonl'?"),
        ("zzz", "no such file: '{root}/zzz'", "the folder '{root}' holds no such name"),
        ("no/a.jsonl", "no such file: '{root}/no/a.jsonl'", "the folder '{root}/no' does not exist either"),
        ("*.parquet", "no such file: '{root}/*.parquet'", "the folder '{root}' holds no such name"),
        ("docs", "the folder '{root}/docs' holds no data file", "expected one of .jsonl, "),
        ("docs/a.md", "cannot tell the format of '{root}/docs/a.md' by its name", "expected one of .jsonl, "),
        ("empty.jsonl", "'{root}/empty.jsonl' is empty", "give a file with at least one row"),
    ],
)
def test_a_name_that_leads_to_no_rows_is_an_error_that_helps(tmp_path, spec, message, hint):
    write(tmp_path / "train.jsonl", JSONL)
    write(tmp_path / "empty.jsonl", "")
    write(tmp_path / "docs" / "a.md", "no data")
    with pytest.raises(UserError) as caught:
        find_files(str(tmp_path / spec), "train_file")
    (problem,) = caught.value.problems
    assert problem.message == message.format(root=tmp_path)
    assert problem.hint.startswith(hint.format(root=tmp_path))
    assert problem.key == "train_file"


@pytest.mark.parametrize("spec", ["", "  ", [], [""]])
def test_nothing_is_not_the_folder_that_one_stands_in(spec, tmp_path, monkeypatch):
    write(tmp_path / "a.jsonl", JSONL)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match="names no file"):
        find_files(spec, "train_file")


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda path: path.symlink_to(path), "is a link that leads to no file"),
        (lambda path: path.symlink_to(path.parent / "gone.jsonl"), "is a link that leads to no file"),
        (lambda path: os.mkfifo(path), "is a pipe or a device"),
    ],
)
def test_what_is_no_file_is_called_what_it_is(tmp_path, make, message):
    path = tmp_path / "a.jsonl"
    make(path)
    with pytest.raises(UserError, match=f"train_file: '.*a.jsonl' {message}"):
        find_files(str(path), "train_file")
    kept = write(tmp_path / "b.jsonl", JSONL)
    assert find_files(str(tmp_path), "train_file") == [kept]


def test_linked_folders_are_read_and_links_back_are_not_followed(tmp_path):
    outside = write(tmp_path / "disk" / "b.jsonl", JSONL)
    data = tmp_path / "data"
    kept = write(data / "a.jsonl", JSONL)
    (data / "linked").symlink_to(outside.parent)
    (data / "back").symlink_to(data)
    (outside.parent / "round").symlink_to(data)
    assert find_files(str(data), "train_file") == [kept, data / "linked" / "b.jsonl"]


def test_a_folder_that_may_not_be_read_is_an_error_and_not_an_empty_one(tmp_path, monkeypatch):
    write(tmp_path / "a.jsonl", JSONL)
    write(tmp_path / "sub" / "b.jsonl", JSONL)
    look = os.scandir

    def refuse(folder: Any) -> Any:
        if str(folder).endswith("sub"):
            raise PermissionError(13, "Permission denied", str(folder))
        return look(folder)

    monkeypatch.setattr(os, "scandir", refuse)
    with pytest.raises(UserError, match=r"train_file: cannot be searched: .*Permission denied: '.*sub'"):
        find_files(str(tmp_path), "train_file")


def test_one_file_under_two_names_is_read_once(tmp_path, monkeypatch):
    write(tmp_path / "a.jsonl", JSONL)
    monkeypatch.chdir(tmp_path)
    assert find_files(["a.jsonl", str(tmp_path / "a.jsonl"), "./a.jsonl"], "k") == [Path("a.jsonl")]


# Saved data sets


def test_a_saved_data_set_and_one_split_of_several(tmp_path):
    from datasets import Dataset, DatasetDict

    data = Dataset.from_list(ROWS)
    data.save_to_disk(tmp_path / "one")
    DatasetDict(train=data, test=data.select([1])).save_to_disk(tmp_path / "two")
    assert [row.data for row in read_saved(tmp_path / "one", "train", "dataset_path")] == ROWS
    (row,) = read_saved(tmp_path / "two", "test", "dataset_path")
    assert (row.file, row.index, row.line, row.data) == (str(tmp_path / "two"), 0, 1, ROWS[1])
    with pytest.raises(UserError, match=r"dataset_path: cannot load the saved data set .*\(dev\)"):
        list(read_saved(tmp_path / "two", "dev", "dataset_path"))
    with pytest.raises(UserError, match="cannot load the saved data set"):
        list(read_saved(tmp_path / "three", "train", "dataset_path"))


@pytest.mark.parametrize("format", [{"type": "numpy"}, {"type": "pandas"}, {"type": None, "columns": ["id"]}])
def test_the_format_that_a_data_set_was_saved_in_changes_no_row(tmp_path, format):
    from datasets import Dataset, DatasetDict

    rows = [{"messages": [{"role": "user", "content": "Hi"}], "id": n, "pair": [n, n]} for n in range(3)]
    data = Dataset.from_list(rows).with_format(**format)
    data.save_to_disk(tmp_path / "one")
    DatasetDict(train=data).save_to_disk(tmp_path / "two")
    for name in ("one", "two"):
        assert [row.data for row in read_saved(tmp_path / name, "train", "k")] == rows


@pytest.mark.parametrize("picked", [None, [0], [1, 1500], [2400], []])
def test_the_wanted_rows_of_a_saved_data_set(tmp_path, picked):
    from datasets import Dataset

    rows = [{"question": str(number), "meta": {"n": [number]}} for number in range(2500)]
    Dataset.from_list(rows).save_to_disk(tmp_path / "one")
    found = list(read_saved(tmp_path / "one", "train", "k", None if picked is None else lambda i: i in picked))
    indices = range(2500) if picked is None else picked
    assert [(row.index, row.line, row.data) for row in found] == [(i, i + 1, rows[i]) for i in indices]


@pytest.mark.parametrize("streaming", [False, True])
def test_a_data_set_of_the_hub_is_read_whole_or_as_a_stream(tmp_path, monkeypatch, streaming):
    """A folder stands for the hub: `datasets` loads both by the same call."""
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    write(tmp_path / "data" / "train.jsonl", JSONL)
    name = str(tmp_path / "data")
    rows = list(read_hub(name, None, "train", "dataset_name", streaming=streaming))
    assert [(row.file, row.index, row.line, row.data) for row in rows] == [
        (f"{name}/train", at, at + 1, row) for at, row in enumerate(ROWS)
    ]
    picked = list(read_hub(name, None, "train", "dataset_name", lambda index: index == 1, streaming))
    assert picked == [rows[1]]
    assert list((tmp_path / "cache").rglob("*.arrow")) == [] or not streaming
    with pytest.raises(UserError, match="dataset_name: cannot load the data set"):
        list(read_hub(name, None, "nowhere", "dataset_name", streaming=streaming))
