"""From what the user typed (a file, a list, a glob, a folder, a hub name) to rows with their place in the source.

Every row keeps its file and line, so that whatever happens to it later can be traced. A row that cannot be read is
yielded as a `Row` with a `lost` reason, never skipped.
"""

from __future__ import annotations

import glob
import logging
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NoReturn

from sft.data.sources.row import Row, Wanted
from sft.data.sources.table_readers import as_given
from sft.data.sources.text_readers import EXTENSIONS, data_extension, read_file
from sft.errors import Problem, UserError

logger = logging.getLogger("sft")

_BATCH_ROWS = 1000  # rows of a data set of `datasets` that are decoded at a time
_NO_DATA = ("data_report.json", "dataset_dict.json", "dataset_info.json", "dataset_infos.json")
"""What prepare_data.py and `datasets` write about a folder's rows, besides a `state.json` beside an info."""


def find_files(spec: str | list[str], key: str) -> list[Path]:
    """The data files that `spec` names, each once, in the order given (a folder's or glob's files by name).

    A folder's hidden files (`.ipynb_checkpoints/`, `._rows.json`) are copies that other programs left, and no data. Nor
    are the accounts of the rows that stand beside them (`data_report.json`), unless they are named themselves.

    Raises:
        UserError: a path, glob or folder that yields no data file; the nearest existing name is offered.
    """
    entries = [spec] if isinstance(spec, str) else spec
    if not any(entry.strip() for entry in entries):
        raise UserError(Problem("names no file", f"give a file, glob or folder, not {spec!r}", key))
    found: dict[str, Path] = {}  # by absolute path, as two entries may name one file in two ways
    for entry in entries:
        try:
            for file in _files_of(entry, key):
                found.setdefault(os.path.abspath(file), file)
        except OSError as error:
            raise UserError(Problem(f"cannot be searched: {error}", "are you allowed to read it?", key)) from None
    for file in found.values():
        if data_extension(file) not in EXTENSIONS:
            raise UserError(
                Problem(f"cannot tell the format of {str(file)!r} by its name", f"expected one of {_known()}", key)
            )
        if file.stat().st_size == 0:
            raise UserError(Problem(f"{str(file)!r} is empty", "give a file with at least one row", key))
    return list(found.values())


def _files_of(entry: str, key: str) -> list[Path]:
    path = Path(entry).expanduser()
    if path.is_dir():
        files = sorted(_data_files(path))
        if not files:
            raise UserError(Problem(f"the folder {entry!r} holds no data file", f"expected one of {_known()}", key))
        return files
    if path.is_file():
        return [path]
    if path.is_symlink():
        raise UserError(Problem(f"{entry!r} is a link that leads to no file", f"it names {os.readlink(path)!r}", key))
    if path.exists():
        raise UserError(Problem(f"{entry!r} is a pipe or a device", "write what it gives to a file first", key))
    files = sorted(Path(p) for p in glob.glob(str(path), recursive=True) if Path(p).is_file())
    if not files:
        raise UserError(Problem(f"no such file: {entry!r}", _nearest_file(path), key))
    return files


def is_saved(folder: Path) -> bool:
    """Whether `datasets` wrote the folder with `save_to_disk`: one data set, or one for each split."""
    is_one = (folder / "state.json").is_file() and (folder / "dataset_info.json").is_file()
    return is_one or (folder / "dataset_dict.json").is_file()


def _data_files(root: Path) -> Iterator[Path]:
    """The data files in a folder and its subfolders, linked ones too; a link back to a folder above is no new folder.

    Raises:
        OSError: a folder that may not be read, whose files would be missing otherwise.
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
        is_described = "dataset_info.json" in names
        for name in names:
            file = Path(folder, name)
            if name in _NO_DATA or (is_described and name == "state.json"):
                continue
            if not name.startswith(".") and data_extension(file) in EXTENSIONS and file.is_file():
                yield file


def read_files(files: list[Path], wanted: Wanted = None) -> Iterator[Row]:
    """All rows of `files`, in order; `index` counts over the files.

    Args:
        files: as `find_files` gives them.
        wanted: tells by its index whether a row is wanted; the others are counted, neither parsed nor handed out.

    Raises:
        UserError: a file that cannot be opened or parsed as a whole (a JSON array cut short, a broken Parquet);
            files that hold no row at all.
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
    """Rows of a data set on the Hugging Face hub; `streaming` fetches them as they are read, and keeps none.

    Raises:
        UserError: the name, configuration or split does not exist, or the hub cannot be reached.
    """
    import datasets

    def dataset_rows() -> Iterator[tuple[int, dict[str, Any]]]:
        dataset = datasets.load_dataset(name, config_name, split=split, streaming=streaming)
        if not streaming:
            return _picked(dataset, wanted)
        return ((index, as_given(row)) for index, row in enumerate(dataset) if wanted is None or wanted(index))

    try:
        for index, row in dataset_rows():
            yield Row(f"{name}/{split}", index, index + 1, row)
    except Exception as error:  # the hub's client raises a class per cause, some of them bare OSErrors
        hint = "a local file or folder that does not exist is looked up on the Hugging Face hub: check the spelling"
        raise UserError(Problem(f"cannot load the data set {name!r} ({split}): {error}", hint, key)) from None


def read_saved(folder: Path, split: str, key: str, wanted: Wanted = None) -> Iterator[Row]:
    """Rows of a data set that `datasets` saved with `save_to_disk`. Raises `UserError` when it cannot be read."""
    import datasets

    try:
        saved = datasets.load_from_disk(str(folder))
        # It is saved with the format it was set to: arrays for lists, and some columns hidden.
        dataset = (saved[split] if isinstance(saved, datasets.DatasetDict) else saved).with_format(None)
    except (OSError, KeyError, ValueError) as error:
        raise UserError(
            Problem(f"cannot load the saved data set {str(folder)!r} ({split}): {error}", "", key)
        ) from None
    for index, row in _picked(dataset, wanted):
        yield Row(str(folder), index, index + 1, row)


def _picked(dataset: Any, wanted: Wanted) -> Iterator[tuple[int, dict[str, Any]]]:
    """The wanted rows of a `datasets.Dataset` with their indices; the others are not decoded."""
    for start in range(0, len(dataset), _BATCH_ROWS):
        batch = range(start, min(start + _BATCH_ROWS, len(dataset)))
        indices = [index for index in batch if wanted(index)] if wanted is not None else batch
        if indices:
            columns = dataset[indices]
            rows = zip(*columns.values(), strict=True)
            yield from zip(indices, (as_given(dict(zip(columns, row, strict=True))) for row in rows), strict=True)


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
