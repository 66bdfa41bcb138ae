"""Opens data files as streams of bytes and decompresses them; a file is never held in memory."""

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
_UTF8_BOM = b"\xef\xbb\xbf"
_UTF16_BOMS = (b"\xff\xfe", b"\xfe\xff")


@contextmanager
def open_stream(file: Path) -> Iterator[BinaryIO]:
    """Opens `file` for reading bytes, decompressed according to its extension.

    Raises:
        UserError: here or in the `with` block: the file cannot be opened, or is damaged or truncated.
    """
    try:
        with _open_decompressed(file) as stream:
            _skip_byte_order_mark(stream, file)
            yield stream
    except zlib.error as error:
        raise UserError(Problem(f"cannot be decompressed: {error}", "is the file complete?", file=str(file))) from None
    except (OSError, EOFError) as error:
        raise UserError(Problem(f"cannot be read: {error}", "is the file complete?", file=str(file))) from None


def _open_decompressed(file: Path) -> io.BufferedReader:
    suffix = file.suffix.lower()
    if suffix == ".gz":
        # BufferedReader splits lines in C; GzipFile needs a Python call for each.
        return io.BufferedReader(gzip.open(file), _BUFFER)  # type: ignore[arg-type]
    if suffix == ".zst":
        import pyarrow as pa  # its reader reads all frames and detects a truncated last one

        return io.BufferedReader(pa.CompressedInputStream(pa.OSFile(str(file)), "zstd"), _BUFFER)
    return io.BufferedReader(open(file, "rb", buffering=0), _BUFFER)


def _skip_byte_order_mark(stream: io.BufferedReader, file: Path) -> None:
    """Skips a UTF-8 byte order mark (no binary table begins with one). Raises `UserError` for UTF-16."""
    start = stream.peek(3)
    if start.startswith(_UTF16_BOMS):
        hint = f"convert it: {_iconv_command(file, 'utf-16')}"
        raise UserError(Problem("not UTF-8: it begins with a UTF-16 byte order mark", hint, file=str(file), line=1))
    if start.startswith(_UTF8_BOM):
        stream.read(3)


def decode_utf8(stream: BinaryIO) -> io.TextIOWrapper:
    """Wraps a stream as text and keeps its line ends. Reading a byte that is not UTF-8 raises `UnicodeDecodeError`."""
    return io.TextIOWrapper(stream, encoding="utf-8", newline="")


def utf8_error(file: Path) -> UserError:
    """Makes the error for a file that must be UTF-8 throughout; it names the first line that is not."""
    with open_stream(file) as stream:
        for number, line in enumerate(stream, start=1):
            try:
                line.decode("utf-8")
            except UnicodeDecodeError as error:
                problem = Problem(f"not UTF-8: {error.reason}", conversion_hint(file), file=str(file), line=number)
                return UserError(problem)
        raise EOFError("it changed while it was read")


def conversion_hint(file: Path) -> str:
    """Says how to convert a file that is not UTF-8.

    Most such files are Windows-1252. Decoding them as Latin-1 never fails, but turns quotation marks, dashes and euro
    signs into control characters.
    """
    return f"convert it, if it comes from Windows or is Latin-1: {_iconv_command(file, 'windows-1252')}"


def _iconv_command(file: Path, encoding: str) -> str:
    """Writes the shell command that converts `file`, which it decompresses first."""
    suffix = file.suffix.lower()
    path, new = shlex.quote(str(file)), f"NEW{Path(file.stem if suffix in COMPRESSIONS else file.name).suffix}"
    convert = f"iconv -f {encoding} -t utf-8"
    if suffix not in COMPRESSIONS:
        return f"{convert} {path} > {new}"
    return f"{'gzip' if suffix == '.gz' else 'zstd'} -dc {path} | {convert} > {new}"
