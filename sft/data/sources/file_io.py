"""Data files as streams of bytes, decompressed on the way: a file is never held in memory."""

from __future__ import annotations

import gzip
import io
import shlex
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from sft.errors import Problem, UserError

COMPRESSIONS = (".gz", ".zst")
_BUFFER = 1 << 18  # bytes read ahead
_UTF8_MARK = b"\xef\xbb\xbf"
_UTF16_MARKS = (b"\xff\xfe", b"\xfe\xff")


@contextmanager
def open_stream(file: Path) -> Iterator[BinaryIO]:
    """The bytes of `file`, decompressed as its name says.

    Raises:
        UserError: here or in the `with` block, where the file cannot be opened, or its stream is damaged or cut short.
    """
    try:
        with _stream(file) as stream:
            _skip_mark(stream, file)
            yield stream
    except zlib.error as error:
        raise UserError(Problem(f"cannot be decompressed: {error}", "is it whole?", file=str(file))) from None
    except (OSError, EOFError) as error:
        raise UserError(Problem(f"cannot be read: {error}", "is the file whole?", file=str(file))) from None


def _stream(file: Path) -> io.BufferedReader:
    suffix = file.suffix.lower()
    if suffix == ".gz":
        # The buffer around it finds lines in C; GzipFile makes a call in Python for each.
        return io.BufferedReader(gzip.open(file), _BUFFER)  # type: ignore[arg-type]
    if suffix == ".zst":
        import pyarrow as pa  # whose reader takes all frames, and notices when the last is cut short

        return io.BufferedReader(pa.CompressedInputStream(pa.OSFile(str(file)), "zstd"), _BUFFER)
    return io.BufferedReader(open(file, "rb", buffering=0), _BUFFER)


def _skip_mark(stream: io.BufferedReader, file: Path) -> None:
    """Passes over a byte order mark, which no table begins with. Raises `UserError` for that of UTF-16."""
    start = stream.peek(3)
    if start.startswith(_UTF16_MARKS):
        hint = f"convert it: {_iconv(file, 'utf-16')}"
        raise UserError(Problem("not UTF-8: it begins with the mark of UTF-16", hint, file=str(file), line=1))
    if start.startswith(_UTF8_MARK):
        stream.read(3)


def decoded(stream: BinaryIO) -> io.TextIOWrapper:
    """The same as text, with its line ends as they are. A byte that is not UTF-8 raises `UnicodeDecodeError`."""
    return io.TextIOWrapper(stream, encoding="utf-8", newline="")


def not_utf8(file: Path) -> UserError:
    """The error of a file that is read as a whole and is not UTF-8: it names the first line that is not."""
    with open_stream(file) as stream:
        line, reason = _first_bad_line(stream)
    return UserError(Problem(f"not UTF-8: {reason}", conversion(file), file=str(file), line=line))


def conversion(file: Path) -> str:
    """What to do about a file that is not UTF-8. Most are Windows-1252, which Latin-1 reads without a word of warning
    and with control characters in the place of its quotation marks, dashes and euro signs."""
    return f"convert it, if it comes from Windows or is Latin-1: {_iconv(file, 'windows-1252')}"


def _iconv(file: Path, encoding: str) -> str:
    """The command that writes `file` anew, which a shell takes as it is; what is compressed is not itself the text."""
    suffix = file.suffix.lower()
    path, new = shlex.quote(str(file)), f"NEW{Path(file.stem if suffix in COMPRESSIONS else file.name).suffix}"
    convert = f"iconv -f {encoding} -t utf-8"
    if suffix not in COMPRESSIONS:
        return f"{convert} {path} > {new}"
    return f"{'gzip' if suffix == '.gz' else 'zstd'} -dc {path} | {convert} > {new}"


def _first_bad_line(stream: BinaryIO) -> tuple[int, str]:
    for number, line in enumerate(stream, start=1):
        try:
            line.decode("utf-8")
        except UnicodeDecodeError as error:
            return number, error.reason
    raise EOFError("it changes while it is read")
