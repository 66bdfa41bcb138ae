"""Every kind of bad input: each becomes a lost row in the ledger with reason, file and line, or a clear error.

Never a traceback, and no row disappears: rows_read = rows_trained + rows_lost in each case.
"""

from __future__ import annotations

import gzip
import json
import os
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard

import data_handler
from sft.config.schema import DataKeys
from sft.errors import UserError
from tests.builders import byte_level_tokenizer

TOKENIZER = byte_level_tokenizer()
GOOD = '{"question": "Hi?", "answer": "Yes"}\n'


@dataclass(frozen=True)
class Bad:
    """One kind of bad input, and its expected result.

    Attributes:
        content: the file's bytes (text is written as UTF-8), or a function that makes the path.
        lost: `(reason, line, part of the message)` of each lost row, in order.
        trained: number of rows that are trained.
        error: part of the `UserError`'s first message, if the file cannot be read.
        line: the line in that error.
        keys: further data keys.
    """

    name: str
    content: str | bytes | Callable[[Path], object]
    lost: list[tuple[str, int, str]] = field(default_factory=list)
    trained: int = 0
    error: str | None = None
    line: int | None = None
    keys: dict[str, Any] = field(default_factory=dict)

    def make(self, folder: Path) -> DataKeys:
        """Makes the input in `folder` and returns the data keys that read it."""
        path = folder / "data" / self.name
        path.parent.mkdir()
        if callable(self.content):
            self.content(path)
        else:
            path.write_bytes(self.content.encode() if isinstance(self.content, str) else self.content)
        return DataKeys(train_file=str(path), cache_dir=str(folder / "cache"), max_seq_length=512, **self.keys)


def chat(*messages: Any, **row: Any) -> str:
    return json.dumps({"messages": list(messages), **row}) + "\n"


USER, ASSISTANT = {"role": "user", "content": "Hi?"}, {"role": "assistant", "content": "Yes"}


def row(**values: Any) -> str:
    return json.dumps({"question": "Hi?", "answer": "Yes"} | values) + "\n"


def call(**function: Any) -> str:
    return chat(USER, {"role": "assistant", "content": "", "tool_calls": [{"function": function}]})


def one_lost(content: str | bytes, reason: str, message: str, name: str = "a.jsonl", **keys: Any) -> Bad:
    """A bad row between two good ones of JSON Lines."""
    raw = content.encode() if isinstance(content, str) else content
    good = GOOD.encode()
    return Bad(name, good + raw.rstrip(b"\n") + b"\n" + good, [(reason, 2, message)], trained=2, keys=keys)


def table(**columns: Any) -> pa.Table:
    return pa.table(columns)


def parquet(of: pa.Table) -> bytes:
    sink = pa.BufferOutputStream()
    pq.write_table(of, sink)
    return sink.getvalue().to_pybytes()


def arrow(of: pa.Table) -> bytes:
    sink = pa.BufferOutputStream()
    with pa.ipc.new_file(sink, of.schema) as writer:
        writer.write_table(of)
    return sink.getvalue().to_pybytes()


def folder(**files: str | bytes) -> Callable[[Path], object]:
    def make(path: Path) -> None:
        path.mkdir()
        for name, content in files.items():
            (path / name.replace("__", ".")).write_bytes(content if isinstance(content, bytes) else content.encode())

    return make


ONE = table(question=["Hi?"], answer=["Yes"])
NOT_UTF8 = pa.array([b"Hi?", b"caf\xe9"], pa.binary()).view(pa.string())
LONG_CALL = call(name="look", arguments="{broken")

CASES: dict[str, Bad] = {
    # values
    "null question": one_lost(row(question=None), "bad_schema", "question: expected text, found null"),
    "null answer": one_lost(row(answer=None), "empty_answer", "answer is empty"),
    "empty answer": one_lost(row(answer=""), "empty_answer", "answer is empty"),
    "answer of blanks": one_lost(row(answer=" \u3000\n\t"), "empty_answer", "answer is empty"),
    "answer that is a list": one_lost(row(answer=["a", "b"]), "bad_schema", "expected two texts or two lists"),
    "answer that is an object": one_lost(row(answer={"a": 1}), "bad_schema", "answer: expected text, found dict"),
    "answer that is a bool": one_lost(row(answer=True), "bad_schema", "answer: expected text, found bool"),
    "answer that is NaN": one_lost(
        '{"question": "Hi?", "answer": NaN}', "bad_schema", "answer: expected text, found nan"
    ),
    "answer that is infinite": one_lost('{"question": "?", "answer": -Infinity}', "bad_schema", "found -inf"),
    "numbers are texts": Bad("a.jsonl", row(answer=72) + row(answer=7.5) + row(question=-1), trained=3),
    "a number of 5,000 digits": one_lost('{"question": "?", "answer": ' + "9" * 5000 + "}", "bad_json", "4300 digits"),
    "half of a surrogate pair": one_lost(
        '{"question": "?", "answer": "\\ud83d"}', "bad_encoding", "half of a surrogate pair"
    ),
    "half of a pair in a key": one_lost('{"\\ud83d": 1}', "bad_schema", "its keys are \\ud83d"),
    "NUL bytes inside a text": Bad("a.jsonl", row(answer="a\0b"), trained=1),
    "an answer of 400 KB": Bad(
        "a.jsonl", GOOD + row(answer="x " * 200_000), [("too_long", 2, "")], 1, keys={"truncation": "drop"}
    ),
    # messages
    "messages of null": one_lost('{"messages": null}', "bad_schema", "messages: expected a list, found null"),
    "messages as a text": one_lost('{"messages": "Hi"}', "bad_schema", "messages: not JSON"),
    "messages as an object": one_lost(
        '{"messages": {"role": "user"}}', "bad_schema", "messages: expected a list, found dict"
    ),
    "no messages": one_lost(chat(), "bad_schema", "messages: the list is empty"),
    "a message that is a text": one_lost(chat("Hi"), "bad_schema", "message 0: expected an object, found str"),
    "messages nested in lists": one_lost(
        chat([USER, ASSISTANT]), "bad_schema", "message 0: expected an object, found list"
    ),
    "an unknown role": one_lost(
        chat({"role": "wizard", "content": "Hi"}), "bad_schema", "message 0: unknown role 'wizard'"
    ),
    "a role that is a number": one_lost(chat({"role": 3, "content": "Hi"}), "bad_schema", "unknown role '3'"),
    "a message without a role": one_lost(chat({"content": "Hi"}), "bad_schema", "message 0: unknown role 'None'"),
    "a message without content": one_lost(
        chat(USER, {"role": "assistant"}), "bad_schema", "message 1 (assistant): content is null"
    ),
    "content that is a number": one_lost(
        chat({"role": "user", "content": 3}, ASSISTANT), "bad_schema", "message 0 (user): content is int"
    ),
    "content that is a bool": one_lost(
        chat({"role": "user", "content": True}, ASSISTANT), "bad_schema", "message 0 (user): content is bool"
    ),
    "content with an image": one_lost(
        chat({"role": "user", "content": [{"type": "image_url"}]}, ASSISTANT), "bad_schema", "part that is not text"
    ),
    "an empty assistant message": one_lost(
        chat(USER, {"role": "assistant", "content": "  "}),
        "empty_answer",
        "message 1: the assistant's message is empty",
    ),
    "no assistant": one_lost(chat(USER), "no_trained_token", "the conversation has no assistant turn"),
    "nothing to train": one_lost(chat(USER, ASSISTANT | {"weight": 0}), "no_trained_token", ""),
    "a weight of 2": one_lost(chat(USER, ASSISTANT | {"weight": 2}), "bad_schema", "message 1: expected weight 0 or 1"),
    "a user's weight of 2": one_lost(
        chat(USER | {"weight": 2}, ASSISTANT), "bad_schema", "message 0: expected weight 0 or 1"
    ),
    "train as a word": one_lost(chat(USER, ASSISTANT | {"train": "no"}), "bad_schema", "train true or false"),
    "reasoning that is a list": one_lost(
        chat(USER, ASSISTANT | {"reasoning_content": ["a"]}),
        "bad_schema",
        "message 1: reasoning_content: expected text",
    ),
    "an unknown ShareGPT speaker": one_lost(
        '{"conversations": [{"from": "alien", "value": "Hi"}]}', "bad_schema", "message 0: unknown role 'alien'"
    ),
    "a call without a name": one_lost(call(arguments={}), "bad_schema", "message 1: tool_calls: a call without a name"),
    "a call with broken arguments": one_lost(LONG_CALL, "bad_schema", "message 1: tool_calls: arguments: not JSON"),
    "a ShareGPT call that is not JSON": one_lost(
        '{"conversations": [{"from": "function_call", "value": "look()"}]}', "bad_schema", "function_call: not JSON"
    ),
    "tools that are not JSON": one_lost(chat(USER, ASSISTANT, tools="[{"), "bad_schema", "tools: not JSON"),
    "tools with a key twice": one_lost(
        chat(USER, ASSISTANT, tools='[{"name": "a", "name": "b"}]'), "bad_schema", "the key 'name' appears twice"
    ),
    "tools of numbers": one_lost(chat(USER, ASSISTANT, tools=[1]), "bad_schema", "tools: expected a list of objects"),
    "history that is a text": one_lost(
        '{"instruction": "a", "output": "b", "history": "c"}', "bad_schema", "history: expected a list of pairs"
    ),
    "history of threes": one_lost(
        '{"instruction": "a", "output": "b", "history": [["c", "d", "e"]]}', "bad_schema", "history: expected pairs"
    ),
    "SQuAD without an answer": one_lost(
        '{"question": "a", "answers": {"text": []}}', "empty_answer", "answers is empty"
    ),
    "keys of no format": one_lost('{"q": "a", "a": "b"}', "bad_schema", "fits no known format: its keys are q, a"),
    "an empty object": one_lost("{}", "bad_schema", "its keys are none"),
    "a missing column": one_lost(
        '{"text": "a"}',
        "bad_schema",
        "columns maps answer to 'answer', which the row lacks",
        columns={"answer": "answer"},
    ),
    "another format than asked for": one_lost(
        '{"text": "a"}', "bad_schema", "is not of the format qa: its keys are text", format="qa"
    ),
    "formats mixed in one file": Bad(
        "a.jsonl", GOOD + chat(USER, ASSISTANT) + '{"text": "a"}\n{"instruction": "a", "output": "b"}\n', trained=4
    ),
    # JSON
    "a row cut short": one_lost('{"question": "Hi?", "ans', "bad_json", "Unterminated string"),
    "a row with single quotes": one_lost("{'question': 'Hi?'}", "bad_json", "double quotes at column 2"),
    "a row with a trailing comma": one_lost('{"question": "Hi?",}', "bad_json", "at column"),
    "two rows on one line": one_lost(GOOD.strip() + GOOD, "bad_json", "Extra data"),
    "a line that is not JSON": one_lost("question: Hi?", "bad_json", "Expecting value at column 1"),
    "a line feed inside a string": Bad(
        "a.jsonl",
        '{"question": "a\nb", "answer": "c"}\n' + GOOD,
        [("bad_json", 1, "Unterminated string"), ("bad_json", 2, "Expecting value")],
        trained=1,
    ),
    "a tab inside a string": one_lost('{"question": "a\tb", "answer": "c"}', "bad_json", "Invalid control character"),
    "a bad escape": one_lost('{"question": "\\x41"}', "bad_json", "Invalid \\escape at column 15"),
    "a row that is a list": one_lost('["Hi?", "Yes"]', "bad_schema", "expected an object with keys, found list"),
    "a row that is null": one_lost("null", "bad_schema", "expected an object with keys, found null"),
    "a key twice": one_lost(
        '{"question": "a", "answer": "b", "answer": "c"}', "bad_json", "the key 'answer' appears twice"
    ),
    "a key twice in a message": one_lost(
        '{"messages": [{"role": "user", "role": "system", "content": "a"}]}', "bad_json", "the key 'role' appears twice"
    ),
    "100,000 brackets": one_lost("[" * 100_000, "bad_json", "recursion"),
    "900 nested lists as an answer": one_lost(
        '{"question": "?", "answers": ' + "[" * 900 + "]" * 900 + "}",
        "bad_schema",
        "answers: expected text, found list",
    ),
    "900 nested lists as a row": one_lost(
        "[" * 900 + "]" * 900, "bad_schema", "expected an object with keys, found list"
    ),
    "an array cut short": Bad("a.json", f"[{GOOD},\n{GOOD}", error="not JSON: Expecting ',' delimiter", line=4),
    "an array with a bad row": Bad("a.json", f"[{GOOD}, 3, {GOOD}]", [("bad_schema", 2, "found int")], 2),
    "an array with a key twice": Bad(
        "a.json", f'[{GOOD}, {{"a": 1, "a": 2}}, {GOOD}]', [("bad_json", 2, "the key 'a' appears twice")], 2
    ),
    "an array with text after it": Bad("a.json", f"[{GOOD}]\nend", error="not JSON: Extra data", line=3),
    "a .json file that is a number": Bad("a.json", "3", error="expected a JSON array of rows, found int"),
    "a .json file that is not JSON": Bad("a.json", "Hi?", error="not JSON: Expecting value", line=1),
    # bytes
    "a byte order mark": Bad("a.jsonl", "\ufeff" + GOOD, trained=1),
    "a byte order mark inside the file": one_lost("\ufeff" + GOOD, "bad_json", "at column 1: '\\ufeff{"),
    "windows line ends": Bad("a.jsonl", (GOOD + "\n" + GOOD).replace("\n", "\r\n"), trained=2),
    "latin-1": one_lost('{"question": "?", "answer": "caf\xe9"}'.encode("latin-1"), "bad_encoding", "at byte 32"),
    "latin-1 in an array": Bad("a.json", f"[\n{GOOD},\n".encode() + b'{"a": "\xe9"}]', error="not UTF-8: ", line=4),
    "latin-1 in CSV": Bad("a.csv", b"question,answer\na,b\nc,\xe9\n", error="not UTF-8: ", line=3),
    "UTF-16": Bad("a.jsonl", GOOD.encode("utf-16"), error="begins with a UTF-16 byte order mark", line=1),
    "UTF-16 without a mark": Bad("a.jsonl", GOOD.encode("utf-16-be"), [("bad_json", 1, "Expecting")]),
    "NUL bytes as a row": one_lost(b"\0\0\0\0", "bad_json", "Expecting value at column 1"),
    # compression
    "gz cut short": Bad("a.jsonl.gz", gzip.compress(GOOD.encode() * 9)[:-9], error="cannot be read: "),
    "zst cut short": Bad("a.jsonl.zst", zstandard.compress(GOOD.encode() * 9)[:-9], error="cannot be read: "),
    "gz that is not gzip": Bad("a.jsonl.gz", GOOD, error="cannot be read: Not a gzipped file"),
    "zst that is not zstd": Bad("a.jsonl.zst", GOOD, error="cannot be read: "),
    "gz with a damaged byte": Bad(
        "a.csv.gz",
        gzip.compress(b"question,answer\na,b\n" * 9)[:-8] + b"\0" * 8,
        error="cannot be read: CRC check failed",
    ),
    "Parquet in a gz that is cut short": Bad(
        "a.parquet.gz", gzip.compress(parquet(ONE))[:-9], error="cannot be read: "
    ),
    # no rows
    "an empty file": Bad("a.jsonl", "", error="is empty"),
    "blank lines alone": Bad("a.jsonl", "\n \n\t\r\n", error="holds no rows"),
    "a text file of blanks": Bad("a.txt", " \n\n", error="holds no rows"),
    "an array of no rows": Bad("a.json", "[ ]", error="holds no rows"),
    "a header alone": Bad("a.csv", "question,answer\n", error="holds no rows"),
    "Parquet of no rows": Bad("a.parquet", parquet(ONE.slice(0, 0)), error="holds no rows"),
    "nothing in a gz": Bad("a.jsonl.gz", gzip.compress(b""), error="holds no rows"),
    # CSV
    "ragged CSV": Bad(
        "a.csv",
        "question,answer\na,b\nc\nd,e,f\ng,h\n",
        [("bad_schema", 3, "1 fields, the header has 2 columns"), ("bad_schema", 4, "3 fields")],
        trained=2,
    ),
    "an unclosed quote": Bad("a.csv", 'question,answer\na,b\nc,"d\ne,f\n', error="not CSV: unexpected end", line=3),
    "a stray quote": Bad("a.tsv", 'question\tanswer\na\t"b"c\n', error="not CSV: ", line=2),
    "two columns of one name": Bad("a.csv", "answer,answer\na,b\n", error="two columns are called 'answer'", line=1),
    "empty fields": Bad("a.csv", "question,answer\na,b\nc,\n", [("empty_answer", 3, "answer is empty")], 1),
    "CSV without a header": Bad("a.csv", "Hi?,Yes\nHo?,No\n", [("bad_schema", 2, "its keys are Hi?, Yes")]),
    "semicolons": Bad("a.csv", "question;answer\na;b\n", trained=1),
    # tables
    "broken Parquet": Bad("a.parquet", parquet(ONE)[:-20], error="not Parquet: "),
    "Parquet that is not Parquet": Bad("a.parquet", GOOD * 9, error="not Parquet: "),
    "Arrow that is not Arrow": Bad("a.arrow", GOOD * 9, error="not an Arrow file: "),
    "Arrow of other columns": Bad(
        "a.arrow", arrow(table(x=[1, 2])), [("bad_schema", n, "its keys are x") for n in (1, 2)]
    ),
    "two columns of one name in a table": Bad(
        "a.parquet", parquet(pa.table([["a"], ["b"]], names=["text", "text"])), error="two columns are called 'text'"
    ),
    "a table with nulls": Bad(
        "a.parquet",
        parquet(table(question=["a", None], answer=[None, "b"])),
        [("empty_answer", 1, ""), ("bad_schema", 2, "")],
    ),
    "a table with bytes": Bad(
        "a.parquet", parquet(table(text=[b"a"])), [("bad_schema", 1, "text: expected text, found bytes")]
    ),
    "a table with a text that is not UTF-8": Bad(
        "a.arrow", arrow(table(text=NOT_UTF8)), [("bad_encoding", 2, "not UTF-8: ")], 1
    ),
    "a time that Python cannot hold": Bad(
        "a.arrow",
        arrow(table(text=["a", "b"], at=pa.array([0, 2**62], pa.timestamp("s")))),
        [("bad_schema", 2, "a value that cannot be read")],
        trained=1,
    ),
    # paths
    "no such file": Bad("b.jsonl", lambda _: None, error="no such file: "),
    "an unknown extension": Bad("a.md", GOOD, error="cannot tell the format of"),
    "no extension": Bad("rows", GOOD, error="cannot tell the format of"),
    "an Excel file": Bad("a.xlsx", b"PK\3\4", error="cannot tell the format of"),
    "a folder without data": Bad("a", folder(notes__md="no data"), error="holds no data file"),
    "a folder that is called a file": Bad("a.jsonl", folder(), error="holds no data file"),
    "a folder with one empty file": Bad("a", folder(a__jsonl=GOOD, b__jsonl=""), error="b.jsonl' is empty"),
    "a folder with a hidden copy": Bad("a", folder(a__jsonl=GOOD, ____a__jsonl=b"\0\5"), trained=1),
    "a link to itself": Bad("a.jsonl", lambda path: path.symlink_to(path), error="is a broken link"),
    "a named pipe": Bad("a.jsonl", lambda path: os.mkfifo(path), error="is a pipe or a device"),
}


def test_the_corpus_is_large():
    assert len(CASES) >= 100


@pytest.mark.parametrize("case", CASES)
def test_bad_input_is_accounted_for_or_an_error_that_says_where(tmp_path, case):
    bad = CASES[case]
    keys = bad.make(tmp_path)
    if bad.error is not None:
        with pytest.raises(UserError) as caught:
            data_handler.prepare_data(keys, TOKENIZER, seed=0)
        problem = caught.value.problems[0]
        assert bad.error in problem.message
        assert problem.line == bad.line
        assert str(keys.train_file) in f"{problem.file} {problem.message}"
        assert len(problem.message) < 1000
        return
    ledger = data_handler.prepare_data(keys, TOKENIZER, seed=0).ledger["total"]
    found = [(lost["reason"], lost["line"], lost["message"]) for lost in ledger["lost_examples"]]
    assert [lost[:2] for lost in found] == [lost[:2] for lost in bad.lost]
    for (_, _, message), (_, _, expected) in zip(found, bad.lost, strict=True):
        assert expected in message
        assert 0 < len(message) < 400
    assert {Path(lost["file"]).parent.name for lost in ledger["lost_examples"]} <= {"data"}
    assert ledger["rows_trained"] == bad.trained
    assert ledger["rows_read"] == bad.trained + len(bad.lost)
    assert sum(ledger["rows_lost"].values()) == len(bad.lost)


@pytest.mark.parametrize("case", [name for name, bad in CASES.items() if bad.lost])
def test_too_much_bad_input_is_an_error_that_names_the_rows(tmp_path, case):
    bad = CASES[case]
    keys = bad.make(tmp_path)
    with pytest.raises(UserError) as caught:
        data_handler.require_enough_rows(keys, data_handler.prepare_data(keys, TOKENIZER, seed=0).ledger)
    summary, *examples = caught.value.problems
    rows = bad.trained + len(bad.lost)
    assert f"{len(bad.lost)} of {rows} rows of 'train' are lost" in summary.message
    assert [(str(e.file), e.line) for e in examples] == [(keys.train_file, line) for _, line, _ in bad.lost]
    str(caught.value).encode()  # can be printed
