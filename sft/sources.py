"""From what the user typed (a file, a list, a glob, a folder, a hub name) to rows with their place in the source.

Every row keeps its file and line, so that whatever happens to it later can be traced. A row that cannot be read is
yielded as a `Row` with a `lost` reason, never skipped.
"""

from __future__ import annotations

import glob
import logging
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sft.errors import Problem, UserError
from sft.readers import EXTENSIONS, data_extension, read_file

logger = logging.getLogger("sft")


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


def read_files(files: list[Path]) -> Iterator[Row]:
    """All rows of `files`, in order; `index` counts over the files.

    Raises:
        UserError: a file that cannot be opened or parsed as a whole (a JSON array cut short, a broken Parquet);
            files that hold no row at all.
    """
    index = 0
    for file in files:
        first = index
        for line, data, lost in read_file(file):
            yield Row(str(file), index, line, data, lost)
            index += 1
        if index == first:
            logger.warning("%s holds no rows", file)
    if index == 0:
        names = ", ".join(str(f) for f in files[:5])
        raise UserError(Problem("holds no rows", "give a file with at least one row", file=names))


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
