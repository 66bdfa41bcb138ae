"""From what the user typed (a file, a list, a glob, a folder, a hub name) to rows with their place in the source.

Every row keeps its file and line, so that whatever happens to it later can be traced. A row that cannot be read is
yielded as a `Row` with a `lost` reason, never skipped; a file that cannot be read at all is a `UserError`.
"""

from __future__ import annotations

import csv
import glob
import gzip
import io
import json
import logging
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sft.errors import Problem, UserError

logger = logging.getLogger("sft")

EXTENSIONS = (".jsonl", ".ndjson", ".json", ".csv", ".tsv", ".txt", ".parquet", ".arrow")
COMPRESSIONS = (".gz", ".zst")
_CSV_FIELD_LIMIT = 1 << 30  # bytes; Python's default of 128 KiB cuts long documents short with an error


@dataclass(frozen=True, slots=True)
class Row:
    """One row of a source.

    Attributes:
        file: the path (or hub name) as the user would recognise it.
        index: position in the source, counted from 0 over all of its files.
        line: line in the file counted from 1; for formats without lines (a JSON array, Parquet) the row, from 1.
        data: the row's mapping, or None when it could not be read.
        lost: `(reason, message)` when it could not be read.
    """

    file: str
    index: int
    line: int
    data: dict[str, Any] | None
    lost: tuple[str, str] | None = None


def find_files(spec: str | list[str], key: str) -> list[Path]:
    """The data files that `spec` names, each once, in the order given (a folder's or glob's files by name).

    A folder's hidden files (`.ipynb_checkpoints/`, `._rows.json`) are copies that other programs left, and no data.

    Raises:
        UserError: a path, glob or folder that yields no data file; the nearest existing name is offered.
    """
    entries = [spec] if isinstance(spec, str) else spec
    if not any(entry.strip() for entry in entries):
        raise UserError(Problem("names no file", f"give a file, glob or folder, not {spec!r}", key))
    found: dict[Path, None] = {}
    for entry in entries:
        path = Path(entry).expanduser()
        if path.is_dir():
            files = sorted(p for p in path.rglob("*") if _is_data_file(p, path))
            if not files:
                raise UserError(Problem(f"the folder {entry!r} holds no data file", f"expected one of {_known()}", key))
        elif path.is_file():
            files = [path]
        else:
            files = sorted(Path(p) for p in glob.glob(str(path), recursive=True) if Path(p).is_file())
            if not files:
                raise UserError(Problem(f"no such file: {entry!r}", _nearest_file(path), key))
        found.update(dict.fromkeys(files))
    for file in found:
        if data_extension(file) not in EXTENSIONS:
            raise UserError(
                Problem(f"cannot tell the format of {str(file)!r} by its name", f"expected one of {_known()}", key)
            )
        if file.stat().st_size == 0:
            raise UserError(Problem(f"{str(file)!r} is empty", "give a file with at least one row", key))
    return list(found)


def _is_data_file(file: Path, folder: Path) -> bool:
    is_hidden = any(part.startswith(".") for part in file.relative_to(folder).parts)
    return not is_hidden and data_extension(file) in EXTENSIONS and file.is_file()


def data_extension(path: Path) -> str:
    """`.jsonl` for `a.jsonl`, `a.JSONL` and `a.jsonl.gz`."""
    suffixes = [s.lower() for s in path.suffixes]
    if suffixes and suffixes[-1] in COMPRESSIONS:
        suffixes.pop()
    return suffixes[-1] if suffixes else ""


def read_files(files: list[Path]) -> Iterator[Row]:
    """All rows of `files`, in order; `index` counts over the files.

    Raises:
        UserError: a file that cannot be opened or parsed as a whole (a JSON array cut short, a broken Parquet);
            files that hold no row at all.
    """
    index = 0
    for file in files:
        first = index
        for line, data, lost in _READERS[data_extension(file)](file):
            yield Row(str(file), index, line, data, lost)
            index += 1
        if index == first:
            logger.warning("%s holds no rows", file)
    if index == 0:
        names = ", ".join(str(f) for f in files[:5])
        raise UserError(Problem("holds no rows", "give a file with at least one row", file=names))


_Parsed = tuple[int, dict[str, Any] | None, tuple[str, str] | None]


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


def _read_jsonl(file: Path) -> Iterator[_Parsed]:
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


def _read_json(file: Path) -> Iterator[_Parsed]:
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


def _read_separated(file: Path, delimiter: str) -> Iterator[_Parsed]:
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


def _read_txt(file: Path) -> Iterator[_Parsed]:
    for number, text, lost in _decoded_lines(file):
        yield number, None if text is None else {"text": text}, lost


def _read_parquet(file: Path) -> Iterator[_Parsed]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        yield from _arrow_rows(pq.ParquetFile(_arrow_input(file)).iter_batches(batch_size=4096))
    except (pa.ArrowException, OSError) as error:
        raise UserError(Problem(f"not Parquet: {error}", file=str(file))) from None


def _read_arrow(file: Path) -> Iterator[_Parsed]:
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


def _arrow_rows(batches: Iterator[Any]) -> Iterator[_Parsed]:
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


_READERS = {
    ".jsonl": _read_jsonl,
    ".ndjson": _read_jsonl,
    ".json": _read_json,
    ".csv": lambda file: _read_separated(file, ","),
    ".tsv": lambda file: _read_separated(file, "\t"),
    ".txt": _read_txt,
    ".parquet": _read_parquet,
    ".arrow": _read_arrow,
}


def read_hub(name: str, config_name: str | None, split: str, key: str) -> Iterator[Row]:
    """Rows of a data set on the Hugging Face hub.

    Raises:
        UserError: the name, configuration or split does not exist, or the hub cannot be reached.
    """
    import datasets

    try:
        dataset = datasets.load_dataset(name, config_name, split=split)
    except Exception as error:  # the hub's client raises a class per cause, some of them bare OSErrors
        hint = "a local file or folder that does not exist is looked up on the Hugging Face hub: check the spelling"
        raise UserError(Problem(f"cannot load the data set {name!r} ({split}): {error}", hint, key)) from None
    for index, row in enumerate(dataset):
        yield Row(f"{name}/{split}", index, index + 1, row)


def read_saved(folder: Path, split: str, key: str) -> Iterator[Row]:
    """Rows of a data set that `datasets` saved with `save_to_disk`. Raises `UserError` when it cannot be read."""
    import datasets

    try:
        saved = datasets.load_from_disk(str(folder))
        dataset = saved[split] if isinstance(saved, datasets.DatasetDict) else saved
    except (OSError, KeyError, ValueError) as error:
        raise UserError(
            Problem(f"cannot load the saved data set {str(folder)!r} ({split}): {error}", "", key)
        ) from None
    for index, row in enumerate(dataset):
        yield Row(str(folder), index, index + 1, row)


def _known() -> str:
    return ", ".join(EXTENSIONS) + " (or one of them with .gz or .zst)"


def _nearest_file(path: Path) -> str:
    import difflib

    folder = path.parent
    if not folder.is_dir():
        return f"the folder {str(folder)!r} does not exist either"
    names = [p.name for p in folder.iterdir()]
    close = difflib.get_close_matches(path.name, names, n=1, cutoff=0.5)
    return f"did you mean {str(folder / close[0])!r}?" if close else f"the folder {str(folder)!r} holds no such name"
