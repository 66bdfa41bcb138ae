"""Encodings, compression, and files that cannot be read."""

from __future__ import annotations

import gzip
import shutil
import subprocess
from pathlib import Path

import pytest

from sft.data.sources.file_io import conversion_hint
from sft.data.sources.files import read_files
from sft.errors import UserError
from tests.data.sources.samples import CONTENTS, JSONL, PACK, ROWS, error, read, write


@pytest.mark.parametrize("name", ["a.jsonl", "a.txt", "a.json", "a.csv"])
@pytest.mark.parametrize("encoding", ["utf-16-le", "utf-16-be"])
def test_utf16_is_reported_as_utf16(tmp_path, name, encoding):
    problem = error(tmp_path / name, ("\ufeff" + JSONL).encode(encoding))
    assert (problem.message, problem.line) == ("not UTF-8: it begins with a UTF-16 byte order mark", 1)
    assert problem.hint == f"convert it: iconv -f utf-16 -t utf-8 {tmp_path / name} > NEW{Path(name).suffix}"


@pytest.mark.parametrize("name", ["a.json", "a.csv", "a.jsonl", "a.txt"])
def test_the_conversion_hint_for_a_file_from_windows_keeps_its_characters(tmp_path, name):
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
def test_the_conversion_command_names_the_whole_path_and_decompresses_first(tmp_path, name, command):
    assert conversion_hint(tmp_path / name).endswith(": " + command.format(path=tmp_path / name))


@pytest.mark.skipif(not (shutil.which("iconv") and shutil.which("gzip")), reason="needs iconv and gzip")
def test_the_conversion_command_works(tmp_path):
    path = write(tmp_path / "my rows.csv.gz", gzip.compress("question,answer\nHi?,“Yes” – 5 €\n".encode("cp1252")))
    command = error(path, path.read_bytes()).hint.partition(": ")[2]
    subprocess.run(command, shell=True, check=True, cwd=tmp_path)
    assert [row.data for row in read(tmp_path / "NEW.csv")] == [{"question": "Hi?", "answer": "“Yes” – 5 €"}]


@pytest.mark.parametrize("name", [n for n in CONTENTS if n != "b.arrow"])
@pytest.mark.parametrize("compression", [".gz", ".zst"])
def test_a_truncated_compressed_file_is_an_error_and_never_fewer_rows(tmp_path, name, compression):
    content = CONTENTS[name]
    packed = PACK[compression](content if isinstance(content, bytes) else content.encode())
    for cut in (len(packed) // 2, len(packed) - 1):
        problem = error(tmp_path / (name + compression), packed[:cut])
        assert "complete?" in problem.hint
        assert problem.message.startswith(("cannot be read", "cannot be decompressed"))


@pytest.mark.parametrize("compression", [".gz", ".zst"])
def test_a_large_truncated_compressed_file_is_an_error(tmp_path, compression):
    packed = PACK[compression]((JSONL * 20_000).encode())
    error(tmp_path / f"a.jsonl{compression}", packed[: len(packed) // 2])


@pytest.mark.parametrize("compression", [".gz", ".zst"])
def test_several_compressed_parts_in_one_file_are_read_to_the_end(tmp_path, compression):
    part = PACK[compression](JSONL.encode())
    assert [row.data for row in read(tmp_path / f"a.jsonl{compression}", part + part)] == ROWS * 2


@pytest.mark.parametrize("compression", [".gz", ".zst"])
def test_a_file_that_is_not_compressed_as_its_name_says_is_an_error(tmp_path, compression):
    error(tmp_path / f"a.jsonl{compression}", JSONL)


def test_a_file_that_may_not_be_opened_is_an_error(tmp_path, monkeypatch):
    path = write(tmp_path / "a.jsonl", JSONL)

    def refuse(*_: object, **__: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("builtins.open", refuse)
    with pytest.raises(UserError, match=r"a.jsonl: cannot be read: .*Permission denied"):
        list(read_files([path]))
