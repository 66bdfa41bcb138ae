"""One reader for each kind of file: parsed rows with their lines, in the order of the file.

A row that cannot be read comes with a reason and costs only itself; a file that cannot be read as a whole is a
`UserError` that names it.
"""

from __future__ import annotations

import csv
import gzip
import io
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from sft.errors import Problem, UserError

EXTENSIONS = (".jsonl", ".ndjson", ".json", ".csv", ".tsv", ".txt", ".parquet", ".arrow")
COMPRESSIONS = (".gz", ".zst")
_CSV_FIELD_LIMIT = 1 << 30  # bytes; Python's default of 128 KiB cuts long documents short with an error

Parsed = tuple[int, dict[str, Any] | None, tuple[str, str] | None]
"""A row's line (from 1), its mapping or None, and `(reason, message)` where it is None."""


def data_extension(path: Path) -> str:
    """`.jsonl` for `a.jsonl`, `a.JSONL` and `a.jsonl.gz`."""
    suffixes = [s.lower() for s in path.suffixes]
    if suffixes and suffixes[-1] in COMPRESSIONS:
        suffixes.pop()
    return suffixes[-1] if suffixes else ""


def read_file(file: Path) -> Iterator[Parsed]:
    """The rows of one file, by its extension.

    Raises:
        UserError: the file cannot be opened, or not parsed as a whole (a JSON array cut short, a broken Parquet).
    """
    return _READERS[data_extension(file)](file)


def _read_bytes(file: Path) -> bytes:
    try:
        raw = file.read_bytes()
        if file.suffix.lower() == ".gz":
            raw = gzip.decompress(raw)
        elif file.suffix.lower() == ".zst":
            raw = _decompress_zstd(raw)
    except (OSError, EOFError) as error:
        raise UserError(Problem(f"cannot be read: {error}", "is the file whole?", file=str(file))) from None
    except Exception as error:  # zlib.error, zstandard.ZstdError: a damaged stream has a class per library
        raise UserError(Problem(f"cannot be decompressed: {error}", "is it whole?", file=str(file))) from None
    return raw.removeprefix(b"\xef\xbb\xbf")


def _decompress_zstd(raw: bytes) -> bytes:
    """All frames of `raw`. Raises `EOFError` when the last is cut short, which zstandard's own reader passes over."""
    import zstandard

    parts = []
    while raw:
        frame = zstandard.ZstdDecompressor().decompressobj()
        parts.append(frame.decompress(raw))
        if not frame.eof:
            raise EOFError("the compressed stream ends too early")
        raw = frame.unused_data
    return b"".join(parts)


def _decoded_lines(file: Path) -> Iterator[tuple[int, str | None, tuple[str, str] | None]]:
    """Lines that are not blank, decoded one by one, so that one bad byte costs one row."""
    for number, raw in enumerate(_read_bytes(file).split(b"\n"), start=1):
        raw = raw.removesuffix(b"\r")
        if not raw.strip():
            continue
        try:
            yield number, raw.decode("utf-8"), None
        except UnicodeDecodeError as error:
            yield (
                number,
                None,
                ("bad_encoding", f"not UTF-8: {error.reason} at byte {error.start} of the line"),
            )


def _read_jsonl(file: Path) -> Iterator[Parsed]:
    for number, text, lost in _decoded_lines(file):
        if text is None:
            yield number, None, lost
            continue
        try:
            yield number, *_as_row(json.loads(text))
        except json.JSONDecodeError as error:
            yield number, None, ("bad_json", f"{error.msg} at column {error.colno}: {text[:80]!r}")
        except (ValueError, RecursionError) as error:  # a number of thousands of digits; thousands of brackets
            yield number, None, ("bad_json", str(error))


def _read_json(file: Path) -> Iterator[Parsed]:
    """A JSON array of rows; a `.json` file that holds one object a line is read as JSON Lines."""
    text = _decode_whole(file)
    try:
        content = json.loads(text)
    except json.JSONDecodeError as error:
        if text.lstrip().startswith("{") and error.msg == "Extra data":
            yield from _read_jsonl(file)
            return
        raise UserError(
            Problem(f"not JSON: {error.msg} at column {error.colno}", file=str(file), line=error.lineno)
        ) from None
    except (ValueError, RecursionError) as error:
        raise UserError(Problem(f"not JSON that can be read: {error}", file=str(file))) from None
    if isinstance(content, dict):
        content = _unwrap(content)
    if not isinstance(content, list):
        raise UserError(Problem(f"expected a JSON array of rows, found {type(content).__name__}", file=str(file)))
    for number, value in enumerate(content, start=1):
        yield number, *_as_row(value)


def _unwrap(content: dict[str, Any]) -> list[Any]:
    """The rows of `{"data": [rows]}`; any other object is one row, a conversation's `{"messages": [...]}` too."""
    values = list(content.values())
    rows = values[0] if len(values) == 1 and isinstance(values[0], list) else []
    are_rows = bool(rows) and all(isinstance(r, dict) and "role" not in r and "from" not in r for r in rows)
    return rows if are_rows else [content]


def _as_row(value: Any) -> tuple[dict[str, Any] | None, tuple[str, str] | None]:
    if isinstance(value, dict):
        return value, None
    return None, (
        "bad_schema",
        f"expected an object with keys, found {type(value).__name__}: {str(value)[:60]!r}",
    )


def _decode_whole(file: Path) -> str:
    raw = _read_bytes(file)
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError as error:
        line = raw[: error.start].count(b"\n") + 1
        hint = f"convert it: iconv -f latin1 -t utf-8 {file.name}"
        raise UserError(Problem(f"not UTF-8: {error.reason}", hint, file=str(file), line=line)) from None


def _read_separated(file: Path, delimiter: str) -> Iterator[Parsed]:
    """Rows under a header; each is named by the line it starts on, for quoted fields may hold line feeds."""
    csv.field_size_limit(_CSV_FIELD_LIMIT)
    # Lines end as the file's do: str.splitlines would also cut at U+2028 and form feeds, which texts hold.
    reader = csv.reader(io.StringIO(_decode_whole(file), newline=""), delimiter=delimiter, strict=True)
    header: list[str] = []
    while True:
        start = reader.line_num + 1
        try:
            fields = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            raise UserError(Problem(f"not CSV: {error}", file=str(file), line=start)) from None
        if len(fields) < 2 and not "".join(fields).strip():
            continue  # a blank line
        if not header:
            header = fields
            twice = sorted({name for name in header if header.count(name) > 1})
            if twice:
                raise UserError(Problem(f"two columns are called {twice[0]!r}", file=str(file), line=start))
        elif len(fields) != len(header):
            yield start, None, ("bad_schema", f"{len(fields)} fields, the header has {len(header)} columns")
        else:
            yield start, dict(zip(header, fields, strict=True)), None


def _read_txt(file: Path) -> Iterator[Parsed]:
    for number, text, lost in _decoded_lines(file):
        yield number, None if text is None else {"text": text}, lost


def _read_parquet(file: Path) -> Iterator[Parsed]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        yield from _arrow_rows(pq.ParquetFile(_arrow_input(file)).iter_batches(batch_size=4096))
    except (pa.ArrowException, OSError) as error:
        raise UserError(Problem(f"not Parquet: {error}", file=str(file))) from None


def _read_arrow(file: Path) -> Iterator[Parsed]:
    import pyarrow as pa

    try:
        source = _arrow_input(file)
        try:
            reader: Any = pa.ipc.open_file(source)
            batches = (reader.get_batch(i) for i in range(reader.num_record_batches))
        except pa.ArrowInvalid:
            source.seek(0)
            batches = iter(pa.ipc.open_stream(source))
        yield from _arrow_rows(batches)
    except (pa.ArrowException, OSError) as error:
        raise UserError(Problem(f"not an Arrow file: {error}", file=str(file))) from None


def _arrow_input(file: Path) -> Any:
    import pyarrow as pa

    is_compressed = file.suffix.lower() in COMPRESSIONS
    return pa.BufferReader(_read_bytes(file)) if is_compressed else pa.memory_map(str(file))


def _arrow_rows(batches: Iterator[Any]) -> Iterator[Parsed]:
    number = 0
    for batch in batches:
        try:
            rows = batch.to_pylist()
        except UnicodeDecodeError:  # Arrow does not check its texts: find the rows that are none, one by one
            rows = [_arrow_row(batch.slice(i, 1)) for i in range(batch.num_rows)]
        for row in rows:
            number += 1
            is_lost = isinstance(row, UnicodeDecodeError)
            yield number, None if is_lost else row, ("bad_encoding", f"not UTF-8: {row.reason}") if is_lost else None


def _arrow_row(one: Any) -> dict[str, Any] | UnicodeDecodeError:
    try:
        return one.to_pylist()[0]
    except UnicodeDecodeError as error:
        return error


_READERS: dict[str, Callable[[Path], Iterator[Parsed]]] = {
    ".jsonl": _read_jsonl,
    ".ndjson": _read_jsonl,
    ".json": _read_json,
    ".csv": lambda file: _read_separated(file, ","),
    ".tsv": lambda file: _read_separated(file, "\t"),
    ".txt": _read_txt,
    ".parquet": _read_parquet,
    ".arrow": _read_arrow,
}
