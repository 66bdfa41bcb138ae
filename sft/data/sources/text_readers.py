"""One reader for each kind of file: rows with their places, in the order of the file.

A row that cannot be read comes with a reason and costs only itself; a file that cannot be read as a whole is a
`UserError` that names it. Rows that are not wanted are counted, and neither parsed nor made.
"""

from __future__ import annotations

import csv
import json
import logging
from collections.abc import Callable, Iterator
from functools import lru_cache
from pathlib import Path
from typing import Any

from sft.data.json_values import DuplicateKey, is_messages, kind_of, loads, shown
from sft.data.sources.file_io import COMPRESSIONS, conversion, decoded, not_utf8, open_stream
from sft.data.sources.json_array import array_values
from sft.data.sources.row import Parsed, Row, Rows, Wanted, require_distinct
from sft.data.sources.table_readers import read_arrow, read_parquet
from sft.errors import Problem, UserError

logger = logging.getLogger("sft")

EXTENSIONS = (".jsonl", ".ndjson", ".json", ".csv", ".tsv", ".txt", ".parquet", ".arrow")
_CSV_FIELD_LIMIT = 1 << 30  # bytes; Python's default of 128 KiB cuts long documents short with an error
_OTHER_DELIMITERS = (";", "\t", "|")
_HEAD = 1 << 20  # bytes of a .json file that show which kind it is


def data_extension(path: Path) -> str:
    """`.jsonl` for `a.jsonl`, `a.JSONL` and `a.jsonl.gz`."""
    suffixes = [s.lower() for s in path.suffixes]
    if suffixes and suffixes[-1] in COMPRESSIONS:
        suffixes.pop()
    return suffixes[-1] if suffixes else ""


def read_file(file: Path, first: int = 0, wanted: Wanted = None) -> Rows:
    """The wanted rows of one file, read by its extension; their indices count from `first`.

    Raises:
        UserError: the file cannot be opened, or not parsed as a whole (a JSON array cut short, a broken Parquet);
            rows that stand in front of the damage have been handed out by then.
    """
    return _READERS[data_extension(file)](file, first, wanted)


def _read_lines(file: Path, first: int, wanted: Wanted, parse: Callable[[str], Parsed]) -> Rows:
    """Lines that are not blank, decoded one by one, so that one bad byte costs one row."""
    name, index = str(file), first
    with open_stream(file) as stream:
        for number, raw in enumerate(stream, start=1):
            if raw.isspace():
                continue
            if wanted is None or wanted(index):
                try:
                    data, lost = parse(raw.decode("utf-8"))
                except UnicodeDecodeError as error:
                    data = None
                    where = f"{error.reason} at byte {error.start} of the line"
                    lost = ("bad_encoding", f"not UTF-8: {where}; {conversion(file)}")
                yield Row(name, index, number, data, lost)
            index += 1
    return index - first


def _read_jsonl(file: Path, first: int, wanted: Wanted) -> Rows:
    return _read_lines(file, first, wanted, _parse_json)


def _parse_json(line: str) -> Parsed:
    line = _without_end(line)
    try:
        return _as_row(loads(line))
    except json.JSONDecodeError as error:
        return None, ("bad_json", f"{error.msg} at column {error.colno}: {line[:80]!r}")
    except (ValueError, RecursionError) as error:  # a key twice; a number of thousands of digits; as many brackets
        return None, ("bad_json", str(error))


def _as_row(value: Any) -> Parsed:
    if isinstance(value, dict):
        return value, None
    if isinstance(value, list) and value and is_messages(value):
        return {"messages": value}, None
    return None, ("bad_schema", f"expected an object with keys, found {kind_of(value)}: {shown(value)}")


def _read_txt(file: Path, first: int, wanted: Wanted) -> Rows:
    return _read_lines(file, first, wanted, lambda line: ({"text": _without_end(line)}, None))


def _without_end(line: str) -> str:
    return line.removesuffix("\n").removesuffix("\r")


def _read_json(file: Path, first: int, wanted: Wanted) -> Rows:
    """A JSON array of rows, or one object; a `.json` file that holds one object a line is read as JSON Lines."""
    with open_stream(file) as stream:
        head = stream.read(_HEAD).lstrip()
    line, _, more = head.partition(b"\n")
    if more.strip() and _is_object(line):
        return (yield from _read_jsonl(file, first, wanted))
    index = first
    try:
        with open_stream(file) as stream:
            text = decoded(stream)
            for value, twice in array_values(text) if head.startswith(b"[") else _one_value(text.read(), file):
                if wanted is None or wanted(index):
                    data, lost = (None, ("bad_json", str(twice))) if twice else _as_row(value)
                    yield Row(str(file), index, index - first + 1, data, lost)
                index += 1
    except UnicodeDecodeError:
        raise not_utf8(file) from None
    except json.JSONDecodeError as error:
        if head.startswith(b"{") and error.msg == "Extra data":  # lines, of which the first is very long
            return (yield from _read_jsonl(file, first, wanted))
        message = f"not JSON: {error.msg} at column {error.colno}"
        raise UserError(Problem(message, file=str(file), line=error.lineno)) from None
    except (ValueError, RecursionError) as error:
        raise UserError(Problem(f"not JSON that can be read: {error}", file=str(file))) from None
    return index - first


def _is_object(line: bytes) -> bool:
    try:
        return isinstance(loads(line.decode("utf-8")), dict)
    except DuplicateKey:
        return True
    except (ValueError, RecursionError):
        return False


def _one_value(text: str, file: Path) -> Iterator[tuple[Any, None]]:
    """The rows of `{"data": [rows]}`; any other object is one row, a conversation's `{"messages": [...]}` too."""
    content = loads(text)
    if not isinstance(content, dict):
        raise UserError(Problem(f"expected a JSON array of rows, found {kind_of(content)}", file=str(file)))
    values = list(content.values())
    rows = values[0] if len(values) == 1 and isinstance(values[0], list) else []
    are_rows = bool(rows) and all(isinstance(r, dict) and "role" not in r and "from" not in r for r in rows)
    return ((row, None) for row in (rows if are_rows else [content]))


def _records(file: Path, delimiter: str) -> Iterator[tuple[int, list[str]]]:
    """The records that are not blank, each with the line it starts on: quoted fields may hold line feeds."""
    csv.field_size_limit(_CSV_FIELD_LIMIT)
    start = 1
    try:
        with open_stream(file) as stream:
            # Lines end as the file's do: str.splitlines would also cut at U+2028 and form feeds, which texts hold.
            reader = csv.reader(decoded(stream), delimiter=delimiter, strict=True)
            for fields in reader:
                if len(fields) > 1 or "".join(fields).strip():
                    yield start, fields
                start = reader.line_num + 1
    except csv.Error as error:
        raise UserError(Problem(f"not CSV: {error}", file=str(file), line=start)) from None
    except UnicodeDecodeError:
        raise not_utf8(file) from None


def _delimiter(file: Path, usual: str) -> str:
    """`usual`, unless the header is one field by it and several by another: Excel separates as its language does."""
    if _fields_of_header(file, usual) > 1:
        return usual
    found = {delimiter: _fields_of_header(file, delimiter) for delimiter in _OTHER_DELIMITERS}
    best = max(found, key=lambda delimiter: found[delimiter])
    if found[best] < 2:
        return usual
    _say_delimiter(file, best)
    return best


def _fields_of_header(file: Path, delimiter: str) -> int:
    try:
        return len(next(_records(file, delimiter), (1, []))[1])
    except UserError:  # quoted fields that end in front of something else; who reads the file says what is wrong
        return 0


@lru_cache(maxsize=64)  # once for each file, which is read several times
def _say_delimiter(file: Path, delimiter: str) -> None:
    logger.warning("%s: its columns are separated by %r, and are read so", file, delimiter)


def _read_separated(file: Path, first: int, wanted: Wanted, usual: str) -> Rows:
    """Rows under a header."""
    records = _records(file, _delimiter(file, usual))
    start, header = next(records, (1, []))
    if header == ["sep=", ""]:  # a line in front of the header that tells Excel the delimiter
        start, header = next(records, (1, []))
    require_distinct(header, file, start)
    name, index = str(file), first
    for start, fields in records:
        if wanted is None or wanted(index):
            if len(fields) == len(header):
                yield Row(name, index, start, dict(zip(header, fields, strict=True)))
            else:
                message = f"{len(fields)} fields, the header has {len(header)} columns"
                yield Row(name, index, start, None, ("bad_schema", message))
        index += 1
    return index - first


def _read_csv(file: Path, first: int, wanted: Wanted) -> Rows:
    return _read_separated(file, first, wanted, ",")


def _read_tsv(file: Path, first: int, wanted: Wanted) -> Rows:
    return _read_separated(file, first, wanted, "\t")


_READERS: dict[str, Callable[[Path, int, Wanted], Rows]] = {
    ".jsonl": _read_jsonl,
    ".ndjson": _read_jsonl,
    ".json": _read_json,
    ".csv": _read_csv,
    ".tsv": _read_tsv,
    ".txt": _read_txt,
    ".parquet": read_parquet,
    ".arrow": read_arrow,
}
