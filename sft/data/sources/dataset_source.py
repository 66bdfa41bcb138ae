"""Turns the data keys into named sources: what is read, in which format, and for which split."""

from __future__ import annotations

import hashlib
import logging
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import xxhash

from sft.config.schema import DataKeys, DatasetKeys
from sft.data.sources.files import find_files, is_saved_dataset, read_files, read_hub, read_saved
from sft.data.sources.row import Row, Wanted
from sft.data.sources.text_readers import EXTENSIONS, data_extension
from sft.errors import Problem, UserError

logger = logging.getLogger("sft")

_HUB_TIMEOUT = 10  # seconds to ask the hub for the commit of a data set
_SPLIT_NAMES = {"train": ("train", "training"), "validation": ("validation", "valid", "val", "dev", "eval", "test")}
_SPLIT_OF_NAME = {
    **{name: "train" if split == "train" else "validation" for split, names in _SPLIT_NAMES.items() for name in names},
    "test": "test",
}


@dataclass(frozen=True)
class DataSource:
    """One data set as the user named it.

    Attributes:
        name: its name in the ledger and the metrics.
        key: the config key that names it, for errors.
        files: local data files; empty for a hub or saved data set.
        hub: its name on the hub, or the folder of a saved data set.
        streaming: whether a hub data set is fetched while it is read.
    """

    name: str
    key: str
    format: str
    columns: dict[str, str] | None
    train_on: str
    max_samples: int | None = None
    weight: float | None = None
    files: list[Path] = field(default_factory=list)
    hub: str | None = None
    hub_config: str | None = None
    split: str = "train"
    streaming: bool = False

    def rows(self, wanted: Wanted = None) -> Iterator[Row]:
        """Yields the wanted rows among the first `max_samples`, in source order."""
        folder = self._saved_folder()
        if self.files:
            rows = read_files(self.files, wanted)
        elif folder is not None:
            rows = read_saved(folder, self.split, self.key, wanted)
        else:
            rows = read_hub(str(self.hub), self.hub_config, self.split, self.key, wanted, self.streaming)
        for row in rows:
            if self.max_samples is not None and row.index >= self.max_samples:
                return
            yield row

    def fingerprint(self) -> str:
        """Hashes the names and bytes of the files; of a hub data set the commit, configuration and split."""
        folder = self._saved_folder()
        commit = _find_commit(self.hub) if self.hub and folder is None else None
        digest = xxhash.xxh3_128(repr((self.name, self.hub, self.hub_config, self.split, commit)).encode())
        saved = sorted(folder.glob("**/*.arrow")) if folder is not None else []
        for file in [*self.files, *saved]:
            # The name too: it appears in the ledger that is cached with the prepared data.
            digest.update(f"{file}\0{_hash_file(file)}\0".encode())
        return digest.hexdigest()

    def _saved_folder(self) -> Path | None:
        return Path(self.hub) if self.hub is not None and Path(self.hub).is_dir() else None


def _find_commit(name: str) -> str:
    """Asks the hub for a data set's commit; offline, returns that of the local copy, or nothing."""
    import huggingface_hub
    from huggingface_hub import constants, file_download

    try:
        return str(huggingface_hub.dataset_info(name, timeout=_HUB_TIMEOUT).sha)
    except Exception as error:  # many classes; loading the data set reports what is wrong
        folder = file_download.repo_folder_name(repo_id=name, repo_type="dataset")
        copy = Path(constants.HF_HUB_CACHE) / folder / "refs" / "main"
        logger.debug("the commit of %s is read from the local copy: %s", name, error)
        return copy.read_text() if copy.is_file() else ""


def _hash_file(file: Path) -> str:
    """Hashes a file's bytes with XXH3: not cryptographic, but as fast as the disk."""
    try:
        with file.open("rb", buffering=0) as stream:
            return hashlib.file_digest(stream, xxhash.xxh3_128).hexdigest()
    except OSError as error:
        raise UserError(Problem(f"cannot be read: {error}", file=str(file))) from None


def training_sources(keys: DataKeys) -> list[DataSource]:
    """Lists the sources to train on.

    Raises:
        UserError: no training data is named, or it does not exist.
    """
    if keys.train_file is not None:
        files = _find_split_files(keys.train_file, "train_file", "train")
        return [_make_source(keys, "train", "train_file", files=files)]
    if keys.dataset_path is not None:
        source = _from_dataset_path(keys, "train")
        if source is None:
            raise UserError(keys.problem("dataset_path", f"no training data in {keys.dataset_path!r}"))
        return [source]
    if keys.dataset_name is not None:
        hub = {"hub": keys.dataset_name, "hub_config": keys.dataset_config_name, "streaming": keys.streaming}
        return [_make_source(keys, "train", "dataset_name", **hub)]
    if keys.datasets is not None:
        return _from_entries(keys, keys.datasets, "datasets")
    hint = "give train_file, dataset_path, dataset_name, or datasets"
    raise UserError(Problem("no training data", hint, "train_file"))


def validation_sources(keys: DataKeys) -> list[DataSource]:
    """Lists the sources to evaluate on, besides what `validation_split` holds out; may be empty."""
    if keys.validation_file is not None:
        files = _find_split_files(keys.validation_file, "validation_file", "validation")
        return [_make_source(keys, "validation", "validation_file", files=files)]
    if keys.eval_datasets is not None:
        return _from_entries(keys, keys.eval_datasets, "eval_datasets")
    if keys.dataset_path is not None and not keys.validation_split:
        source = _from_dataset_path(keys, "validation")
        return [source] if source else []
    return []


def split_seed(keys: DataKeys, seed: int) -> int:
    """Returns the seed of the validation split and of the mixture: `shuffle_seed`, or the run's `seed`."""
    return seed if keys.shuffle_seed is None else keys.shuffle_seed


def _make_source(keys: DataKeys, name: str, key: str, **fields: Any) -> DataSource:
    """Makes a source with the format, columns and `train_on` of the config."""
    return DataSource(name, key, keys.format, keys.columns, keys.train_on, **fields)


def _find_split_files(spec: str | list[str], key: str, split: str) -> list[Path]:
    """Finds the files that `spec` names for `split`, `train` or `validation`.

    Raises:
        UserError: a folder among them holds files of several splits, or a data set that `datasets` saved (whose folder
            may also hold files that `datasets` cached).
    """
    files = find_files(spec, key)
    for entry in [spec] if isinstance(spec, str) else spec:
        folder = Path(entry)
        if folder.is_dir():
            _require_one_split(folder, files if entry == spec else find_files(entry, key), key, split)
    return files


def _require_one_split(folder: Path, files: list[Path], key: str, split: str) -> None:
    own = key.rpartition(".")[2]
    by_split: dict[str, list[Path]] = {}
    for file in files:
        saved = next((f for f in (folder, *file.parents) if f.is_relative_to(folder) and is_saved_dataset(f)), None)
        if saved is not None:
            forms = {"path": "path: {}", "validation_file": "eval_datasets: [{{path: {}}}]"}
            hint = f"write `{forms.get(own, 'dataset_path: {}').format(saved)}`, which reads it as it was saved"
            raise UserError(Problem(f"{str(saved)!r} is a data set that `datasets` saved", hint, key))
        by_split.setdefault(_SPLIT_OF_NAME.get(_guess_split(file.relative_to(folder)), split), []).append(file)
    if len(by_split) > 1:
        found = "; ".join(f"{name}: {_list_names(some)}" for name, some in by_split.items())
        wanted = by_split.get(split, [])
        files_hint = f"`{own}: {wanted[0]}`" if len(wanted) == 1 else "the files, or a glob for them"
        folder_hint = f", or `dataset_path: {folder}`, which trains and evaluates by the names" if own != "path" else ""
        message = f"the folder {str(folder)!r} holds files of several splits ({found})"
        raise UserError(Problem(message, f"write {files_hint}{folder_hint}", key))


def _list_names(files: list[Path]) -> str:
    return ", ".join(file.name for file in files[:3]) + (f" and {len(files) - 3} more" if len(files) > 3 else "")


def _from_dataset_path(keys: DataKeys, split: str) -> DataSource | None:
    """Reads `dataset_path`: a saved data set, or a folder of files named for splits (other names are training)."""
    path = Path(str(keys.dataset_path))
    if (path / "dataset_dict.json").is_file():
        names = [n for n in _SPLIT_NAMES[split] if (path / n).is_dir()]
        return _make_source(keys, split, "dataset_path", hub=str(path), split=names[0]) if names else None
    if is_saved_dataset(path):
        return _make_source(keys, split, "dataset_path", hub=str(path)) if split == "train" else None
    files = find_files(str(path), "dataset_path")
    by_split: dict[str, list[Path]] = {}
    for file in files:
        by_split.setdefault(_guess_split(file.relative_to(path)), []).append(file)
    chosen = next((by_split[name] for name in _SPLIT_NAMES[split] if name in by_split), [])
    if split == "train":
        others = by_split.get("", [])
        if chosen and others:
            logger.warning("dataset_path: not used, as others are named for training: %s", ", ".join(map(str, others)))
        chosen = chosen or others
    return _make_source(keys, split, "dataset_path", files=chosen) if chosen else None


def _guess_split(file: Path) -> str:
    """Finds the split in a path (`train-00001.parquet`, `test/0.jsonl`, `my_val.csv`); empty if there is none."""
    names = "|".join(name for names in _SPLIT_NAMES.values() for name in names)
    found = (re.search(rf"(?<![a-z])({names})(?![a-z])", part.lower()) for part in file.parts)
    return next((match[1] for match in found if match), "")


def _from_entries(keys: DataKeys, entries: list[DatasetKeys], key: str) -> list[DataSource]:
    sources: list[DataSource] = []
    default = "train" if key == "datasets" else "validation"
    for number, entry in enumerate(entries):
        entry_key = f"{key}.{number}.path"
        name = entry.display_name(f"{key}_{number}")
        if name in {s.name for s in sources}:
            message = f"two data sets are called {name!r}"
            raise UserError(Problem(message, "give each a `name` of its own", f"{key}.{number}.name"))
        path = Path(entry.path)
        is_local = path.exists() or any(c in entry.path for c in "*?[") or entry.path.startswith((".", "/"))
        is_file = (is_local or data_extension(path) in EXTENSIONS) and not is_saved_dataset(path)
        sources.append(
            DataSource(
                name,
                entry_key,
                entry.format or keys.format,
                entry.columns or keys.columns,
                entry.train_on or keys.train_on,
                entry.max_samples,
                entry.weight,
                files=_find_split_files(entry.path, entry_key, default) if is_file else [],
                hub=None if is_file else str(path),
                split=entry.split or default,
                streaming=keys.streaming,
            )
        )
    return sources
