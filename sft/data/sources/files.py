"""Finds the data files that the user named and reads their rows, and those of `datasets` (local or on the hub).

Every row carries its file and line, for the messages about it later. A row that cannot be read is yielded with a `lost`
reason, never skipped.
"""

from __future__ import annotations

import glob
import logging
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NoReturn

from sft.data.sources.row import Row, Wanted
from sft.data.sources.table_readers import drop_null_keys
from sft.data.sources.text_readers import EXTENSIONS, data_extension, read_file
from sft.errors import Problem, UserError

logger = logging.getLogger("sft")

_BATCH_ROWS = 1000  # rows of a `datasets.Dataset` decoded at a time
_EXPECTED = f"expected one of {', '.join(EXTENSIONS)} (or one of them with .gz or .zst)"
_METADATA_FILES = ("data_report.json", "dataset_dict.json", "dataset_info.json", "dataset_infos.json")
"""Files that prepare_data.py and `datasets` write beside the data; a `state.json` beside an info file is one too."""


def find_files(spec: str | list[str], key: str) -> list[Path]:
    """Finds the data files that `spec` names, each once, in the order given (those of a folder or glob sorted by name).

    In a folder, hidden files (`.ipynb_checkpoints/`, `._rows.json`) are copies that other programs left and are
    skipped. So are files about the data (`data_report.json`), unless `spec` names them.

    Raises:
        UserError: a path, glob or folder has no data file; the hint suggests the nearest existing name.
    """
    entries = [spec] if isinstance(spec, str) else spec
    if not any(entry.strip() for entry in entries):
        raise UserError(Problem("names no file", f"give a file, glob or folder, not {spec!r}", key))
    found: dict[str, Path] = {}  # by absolute path: two entries may name the same file differently
    for entry in entries:
        try:
            for file in _expand(entry, key):
                found.setdefault(os.path.abspath(file), file)
        except OSError as error:
            raise UserError(Problem(f"cannot be searched: {error}", "check its read permission", key)) from None
    for file in found.values():
        if data_extension(file) not in EXTENSIONS:
            raise UserError(Problem(f"cannot tell the format of {str(file)!r} by its name", _EXPECTED, key))
        if file.stat().st_size == 0:
            raise UserError(Problem(f"{str(file)!r} is empty", "give a file with at least one row", key))
    return list(found.values())


def _expand(entry: str, key: str) -> list[Path]:
    path = Path(entry).expanduser()
    if path.is_dir():
        files = sorted(_walk_data_files(path))
        if not files:
            raise UserError(Problem(f"the folder {entry!r} holds no data file", _EXPECTED, key))
        return files
    if path.is_file():
        return [path]
    if path.is_symlink():
        raise UserError(Problem(f"{entry!r} is a broken link", f"it points to {os.readlink(path)!r}", key))
    if path.exists():
        raise UserError(Problem(f"{entry!r} is a pipe or a device", "write its output to a file first", key))
    files = sorted(Path(p) for p in glob.glob(str(path), recursive=True) if Path(p).is_file())
    if not files:
        raise UserError(Problem(f"no such file: {entry!r}", _suggest_name(path), key))
    return files


def is_saved_dataset(folder: Path) -> bool:
    """Tells whether `datasets` wrote the folder with `save_to_disk`: one data set, or one for each split."""
    is_single = (folder / "state.json").is_file() and (folder / "dataset_info.json").is_file()
    return is_single or (folder / "dataset_dict.json").is_file()


def _walk_data_files(root: Path) -> Iterator[Path]:
    """Yields the data files in a folder and its subfolders; follows links, but enters no folder twice.

    Raises:
        OSError: a folder cannot be read.
    """

    def fail(error: OSError) -> NoReturn:
        raise error

    seen: set[str] = set()
    for folder, subfolders, names in os.walk(root, followlinks=True, onerror=fail):
        real = os.path.realpath(folder)
        if real in seen:
            subfolders.clear()
            continue
        seen.add(real)
        subfolders[:] = sorted(name for name in subfolders if not name.startswith("."))
        has_info = "dataset_info.json" in names
        for name in names:
            file = Path(folder, name)
            if name in _METADATA_FILES or (has_info and name == "state.json"):
                continue
            if not name.startswith(".") and data_extension(file) in EXTENSIONS and file.is_file():
                yield file


def read_files(files: list[Path], wanted: Wanted = None) -> Iterator[Row]:
    """Yields the wanted rows of `files`, as `find_files` gives them; `index` counts over all files.

    Rows that are not wanted are counted, but neither parsed nor yielded.

    Raises:
        UserError: a file cannot be opened or parsed (a truncated JSON array, a broken Parquet file), or all of the
            files together have no row.
    """
    index = 0
    for file in files:
        count = yield from read_file(file, index, wanted)
        if not count:
            logger.warning("%s holds no rows", file)
        index += count
    if index == 0:
        names = ", ".join(str(f) for f in files[:5])
        raise UserError(Problem("holds no rows", "give a file with at least one row", file=names))


def read_hub(
    name: str, config_name: str | None, split: str, key: str, wanted: Wanted = None, streaming: bool = False
) -> Iterator[Row]:
    """Yields the wanted rows of a data set on the Hugging Face hub; `streaming` fetches rows while reading, uncached.

    Raises:
        UserError: the name, configuration or split does not exist, or the hub cannot be reached.
    """
    import datasets

    try:
        dataset = datasets.load_dataset(name, config_name, split=split, streaming=streaming)
        rows = _select_rows(dataset, wanted)
        if streaming:
            rows = ((at, drop_null_keys(row)) for at, row in enumerate(dataset) if wanted is None or wanted(at))
        for index, row in rows:
            yield Row(f"{name}/{split}", index, index + 1, row)
    except Exception as error:  # the hub client raises many classes, some of them bare OSErrors
        hint = "a local file or folder that does not exist is looked up on the Hugging Face hub: check the spelling"
        raise UserError(Problem(f"cannot load the data set {name!r} ({split}): {error}", hint, key)) from None


def read_saved(folder: Path, split: str, key: str, wanted: Wanted = None) -> Iterator[Row]:
    """Yields the wanted rows of a data set written by `save_to_disk`. Raises `UserError` when it cannot be read."""
    import datasets

    try:
        saved = datasets.load_from_disk(str(folder))
        # The saved format may turn lists into arrays and hide columns.
        dataset = (saved[split] if isinstance(saved, datasets.DatasetDict) else saved).with_format(None)
    except (OSError, KeyError, ValueError) as error:
        message = f"cannot load the saved data set {str(folder)!r} ({split}): {error}"
        raise UserError(Problem(message, key=key)) from None
    for index, row in _select_rows(dataset, wanted):
        yield Row(str(folder), index, index + 1, row)


def _select_rows(dataset: Any, wanted: Wanted) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yields the wanted rows of a `datasets.Dataset` with their indices; the others are not decoded."""
    for start in range(0, len(dataset), _BATCH_ROWS):
        batch = range(start, min(start + _BATCH_ROWS, len(dataset)))
        indices = [index for index in batch if wanted(index)] if wanted is not None else batch
        if indices:
            columns = dataset[indices]
            for index, row in zip(indices, zip(*columns.values(), strict=True), strict=True):
                yield index, drop_null_keys(dict(zip(columns, row, strict=True)))


def _suggest_name(path: Path) -> str:
    import difflib

    folder = path.parent
    if not folder.is_dir():
        return f"the folder {str(folder)!r} does not exist either"
    names = [p.name for p in folder.iterdir()]
    close = difflib.get_close_matches(path.name, names, n=1, cutoff=0.5)
    return f"did you mean {str(folder / close[0])!r}?" if close else f"the folder {str(folder)!r} has no such file"
