"""Reads rows of text files (JSON, JSON Lines, CSV, TSV, plain text), and chooses the reader of each file.

A row that cannot be read is yielded with a reason, and the rows after it are read; a file that cannot be parsed at all
is a `UserError` that names it. Rows that are not wanted are counted, but neither parsed nor yielded.
"""

from __future__ import annotations

import csv
import json
import logging
from collections.abc import Callable, Iterator
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

from sft.data.json_values import DuplicateKey, is_messages, kind_of, loads, shown
from sft.data.sources.file_io import COMPRESSIONS, conversion_hint, decode_utf8, open_stream, utf8_error
from sft.data.sources.json_array import array_values
from sft.data.sources.row import Parsed, Row, Rows, Wanted, require_distinct
from sft.data.sources.table_readers import read_arrow, read_parquet
from sft.errors import Problem, UserError

logger = logging.getLogger("sft")

EXTENSIONS = (".jsonl", ".ndjson", ".json", ".csv", ".tsv", ".txt", ".parquet", ".arrow")
_CSV_FIELD_LIMIT = 1 << 30  # bytes; Python's default of 128 KiB is an error for long documents
_OTHER_DELIMITERS = (";", "\t", "|")
_HEAD = 1 << 20  # bytes of a .json file that show whether it is an array, an object or lines


def data_extension(path: Path) -> str:
    """Returns `.jsonl` for `a.jsonl`, `a.JSONL` and `a.jsonl.gz`."""
    suffixes = [s.lower() for s in path.suffixes]
    if suffixes and suffixes[-1] in COMPRESSIONS:
        suffixes.pop()
    return suffixes[-1] if suffixes else ""


def read_file(file: Path, first: int = 0, wanted: Wanted = None) -> Rows:
    """Yields the wanted rows of one file, read according to its extension; indices count from `first`.

    Raises:
        UserError: the file cannot be opened or parsed (a truncated JSON array, a broken Parquet file); the rows before
            the damage have been yielded by then.
    """
    return _READERS[data_extension(file)](file, first, wanted)


def _read_lines(file: Path, first: int, wanted: Wanted, parse: Callable[[str], Parsed]) -> Rows:
    """Yields the lines that are not blank. Each is decoded on its own: a bad byte loses one row."""
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
                    lost = ("bad_encoding", f"not UTF-8: {where}; {conversion_hint(file)}")
                yield Row(name, index, number, data, lost)
            index += 1
    return index - first


def _parse_json(line: str) -> Parsed:
    line = _strip_line_end(line)
    try:
        return _as_row(loads(line))
    except json.JSONDecodeError as error:
        return None, ("bad_json", f"{error.msg} at column {error.colno}: {line[:80]!r}")
    except (ValueError, RecursionError) as error:  # a duplicate key, or thousands of digits or brackets
        return None, ("bad_json", str(error))


def _as_row(value: Any) -> Parsed:
    if isinstance(value, dict):
        return value, None
    if isinstance(value, list) and value and is_messages(value):
        return {"messages": value}, None
    return None, ("bad_schema", f"expected an object with keys, found {kind_of(value)}: {shown(value)}")


def _strip_line_end(line: str) -> str:
    return line.removesuffix("\n").removesuffix("\r")


_read_jsonl = partial(_read_lines, parse=_parse_json)


def _read_json(file: Path, first: int, wanted: Wanted) -> Rows:
    """Reads a JSON array of rows, or one object; a `.json` file with one object per line is read as JSON Lines."""
    with open_stream(file) as stream:
        head = stream.read(_HEAD).lstrip()
    line, _, rest = head.partition(b"\n")
    if rest.strip() and _is_object(line):
        return (yield from _read_jsonl(file, first, wanted))
    index = first
    try:
        with open_stream(file) as stream:
            text = decode_utf8(stream)
            for value, duplicate in array_values(text) if head.startswith(b"[") else _object_rows(text.read(), file):
                if wanted is None or wanted(index):
                    data, lost = (None, ("bad_json", str(duplicate))) if duplicate else _as_row(value)
                    yield Row(str(file), index, index - first + 1, data, lost)
                index += 1
    except UnicodeDecodeError:
        raise utf8_error(file) from None
    except json.JSONDecodeError as error:
        if head.startswith(b"{") and error.msg == "Extra data":  # JSON Lines whose first line is longer than the head
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


def _object_rows(text: str, file: Path) -> Iterator[tuple[Any, None]]:
    """Yields the rows of `{"data": [rows]}`; any other object is one row, also a `{"messages": [...]}`."""
    content = loads(text)
    if not isinstance(content, dict):
        raise UserError(Problem(f"expected a JSON array of rows, found {kind_of(content)}", file=str(file)))
    values = list(content.values())
    rows = values[0] if len(values) == 1 and isinstance(values[0], list) else []
    are_rows = bool(rows) and all(isinstance(r, dict) and "role" not in r and "from" not in r for r in rows)
    return ((row, None) for row in (rows if are_rows else [content]))


def _read_records(file: Path, delimiter: str) -> Iterator[tuple[int, list[str]]]:
    """Yields the records that are not blank, each with its first line: quoted fields may contain line feeds."""
    csv.field_size_limit(_CSV_FIELD_LIMIT)
    start = 1
    try:
        with open_stream(file) as stream:
            # Not str.splitlines, which also splits at U+2028 and form feeds inside of texts.
            reader = csv.reader(decode_utf8(stream), delimiter=delimiter, strict=True)
            for fields in reader:
                if len(fields) > 1 or "".join(fields).strip():
                    yield start, fields
                start = reader.line_num + 1
    except csv.Error as error:
        raise UserError(Problem(f"not CSV: {error}", file=str(file), line=start)) from None
    except UnicodeDecodeError:
        raise utf8_error(file) from None


def _detect_delimiter(file: Path, usual: str) -> str:
    """Returns `usual`, unless only another delimiter splits the header: Excel's depends on its language."""
    if _count_header_fields(file, usual) > 1:
        return usual
    counts = {delimiter: _count_header_fields(file, delimiter) for delimiter in _OTHER_DELIMITERS}
    best = max(counts, key=lambda delimiter: counts[delimiter])
    if counts[best] < 2:
        return usual
    _log_delimiter(file, best)
    return best


def _count_header_fields(file: Path, delimiter: str) -> int:
    try:
        return len(next(_read_records(file, delimiter), (1, []))[1])
    except UserError:  # not CSV with this delimiter; reading the file with the usual one reports it
        return 0


@lru_cache(maxsize=64)  # logged once per file, which is read several times
def _log_delimiter(file: Path, delimiter: str) -> None:
    logger.warning("%s: reading it with %r as the column separator", file, delimiter)


def _read_separated(file: Path, first: int, wanted: Wanted, usual: str) -> Rows:
    """Yields the rows below a header; a row with another number of fields is lost."""
    records = _read_records(file, _detect_delimiter(file, usual))
    start, header = next(records, (1, []))
    if header == ["sep=", ""]:  # a line before the header that tells Excel the delimiter
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


_READERS: dict[str, Callable[[Path, int, Wanted], Rows]] = {
    ".jsonl": _read_jsonl,
    ".ndjson": _read_jsonl,
    ".json": _read_json,
    ".csv": partial(_read_separated, usual=","),
    ".tsv": partial(_read_separated, usual="\t"),
    ".txt": partial(_read_lines, parse=lambda line: ({"text": _strip_line_end(line)}, None)),
    ".parquet": read_parquet,
    ".arrow": read_arrow,
}
