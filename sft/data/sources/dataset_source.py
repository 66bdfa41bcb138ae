"""From the data keys to named sources: what is read, in which format, and for which split."""

from __future__ import annotations

import logging
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import xxhash

from sft.config.schema import DataKeys, DatasetKeys
from sft.data.sources.files import find_files, is_saved, read_files, read_hub, read_saved
from sft.data.sources.row import Row, Wanted
from sft.data.sources.text_readers import EXTENSIONS, data_extension
from sft.errors import Problem, UserError

logger = logging.getLogger("sft")

_PIECE = 1 << 20  # bytes hashed at a time: they stay in the processor's cache
_PATIENCE = 10  # seconds in which the hub is to say which commit a data set is at
_SPLIT_NAMES = {"train": ("train", "training"), "validation": ("validation", "valid", "val", "dev", "eval", "test")}
_SPLIT_OF_NAME = {
    **{name: "train" if split == "train" else "validation" for split, names in _SPLIT_NAMES.items() for name in names},
    "test": "test",
}


@dataclass(frozen=True)
class DataSource:
    """One data set as the user named it.

    Attributes:
        name: what the ledger and the metrics call it.
        key: the config key that named it, for errors.
        files: local data files; empty for a hub or saved data set.
        hub: name on the hub, or the folder of a saved data set.
        streaming: whether a data set on the hub is fetched as it is read.
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
        """The rows in source order: those of the first `max_samples` whose index is `wanted` (None: all)."""
        if self.files:
            rows = read_files(self.files, wanted)
        elif Path(str(self.hub)).is_dir():
            rows = read_saved(Path(str(self.hub)), self.split, self.key, wanted)
        else:
            rows = read_hub(str(self.hub), self.hub_config, self.split, self.key, wanted, self.streaming)
        for row in rows:
            if self.max_samples is not None and row.index >= self.max_samples:
                return
            yield row

    def fingerprint(self) -> str:
        """Changes when a byte of the data does; a hub data set is known by its commit, configuration and split."""
        is_here = self.hub is not None and Path(self.hub).is_dir()
        commit = _commit_of(self.hub) if self.hub and not is_here else None
        digest = xxhash.xxh3_128(repr((self.name, self.hub, self.hub_config, self.split, commit)).encode())
        saved = sorted(Path(str(self.hub)).glob("**/*.arrow")) if is_here else []
        for file in [*self.files, *saved]:
            # The name too: the ledger that is kept with the prepared data shows it.
            digest.update(f"{file}\0{_hash_of(file)}\0".encode())
        return digest.hexdigest()


def _commit_of(name: str) -> str:
    """The commit of a data set on the hub; that of the copy here where the hub cannot be asked, or nothing."""
    import huggingface_hub
    from huggingface_hub import constants, file_download

    try:
        return str(huggingface_hub.dataset_info(name, timeout=_PATIENCE).sha)
    except Exception as error:  # as many classes as for loading it, which says what is wrong
        folder = file_download.repo_folder_name(repo_id=name, repo_type="dataset")
        copy = Path(constants.HF_HUB_CACHE) / folder / "refs" / "main"
        logger.debug("the commit of %s is that of its copy: %s", name, error)
        return copy.read_text() if copy.is_file() else ""


def _hash_of(file: Path) -> str:
    """The hash of a file's bytes: XXH3, which is not for secrets, and as fast as the bytes can be read."""
    digest = xxhash.xxh3_128()
    try:
        with file.open("rb", buffering=0) as stream:
            while piece := stream.read(_PIECE):
                digest.update(piece)
    except OSError as error:
        raise UserError(Problem(f"cannot be read: {error}", file=str(file))) from None
    return digest.hexdigest()


def training_sources(keys: DataKeys) -> list[DataSource]:
    """The sources to train on.

    Raises:
        UserError: no training data is named, or it does not exist.
    """
    if keys.train_file is not None:
        return [_from_files(keys, "train", "train_file", keys.train_file)]
    if keys.dataset_path is not None:
        source = _from_dataset_path(keys, "train")
        if source is None:
            raise UserError(keys.problem("dataset_path", f"no training data in {keys.dataset_path!r}"))
        return [source]
    if keys.dataset_name is not None:
        return [_from_hub(keys, "train")]
    if keys.datasets is not None:
        return _from_entries(keys, keys.datasets, "datasets")
    raise UserError(
        Problem("no training data", "give train_file, dataset_path, dataset_name, or datasets", "train_file")
    )


def validation_sources(keys: DataKeys) -> list[DataSource]:
    """The sources to evaluate on, besides what `validation_split` holds out; may be none."""
    if keys.validation_file is not None:
        return [_from_files(keys, "validation", "validation_file", keys.validation_file)]
    if keys.eval_datasets is not None:
        return _from_entries(keys, keys.eval_datasets, "eval_datasets")
    if keys.dataset_path is not None and not keys.validation_split:
        source = _from_dataset_path(keys, "validation")
        return [source] if source else []
    return []


def split_seed(keys: DataKeys, seed: int) -> int:
    """The seed of the validation split and of the mixture: `shuffle_seed`, or the run's `seed`."""
    return seed if keys.shuffle_seed is None else keys.shuffle_seed


def _from_files(keys: DataKeys, name: str, key: str, spec: str | list[str]) -> DataSource:
    files = _files_of_one_split(spec, key, name)
    return DataSource(name, key, keys.format, keys.columns, keys.train_on, files=files)


def _files_of_one_split(spec: str | list[str], key: str, split: str) -> list[Path]:
    """The files that `spec` names for `split`, `train` or `validation`.

    Raises:
        UserError: a folder among them holds files of several splits, or a data set that `datasets` saved, whose folder
            holds what was cached on the way, too.
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
        saved = next((f for f in (folder, *file.parents) if f.is_relative_to(folder) and is_saved(f)), None)
        if saved is not None:
            wholes = {"path": "path: {}", "validation_file": "eval_datasets: [{{path: {}}}]"}
            hint = f"write `{wholes.get(own, 'dataset_path: {}').format(saved)}`, which reads it as it was saved"
            raise UserError(Problem(f"{str(saved)!r} is a data set that `datasets` saved", hint, key))
        by_split.setdefault(_SPLIT_OF_NAME.get(_split_of(file.relative_to(folder)), split), []).append(file)
    if len(by_split) > 1:
        held = "; ".join(f"{name}: {_listed(some)}" for name, some in by_split.items())
        mine = by_split.get(split, [])
        named = f"`{own}: {mine[0]}`" if len(mine) == 1 else "the files, or a glob for them"
        whole = f", or `dataset_path: {folder}`, which trains and evaluates by the names" if own != "path" else ""
        message = f"the folder {str(folder)!r} holds files of several splits ({held})"
        raise UserError(Problem(message, f"write {named}{whole}", key))


def _listed(files: list[Path]) -> str:
    return ", ".join(file.name for file in files[:3]) + (f" and {len(files) - 3} more" if len(files) > 3 else "")


def _from_hub(keys: DataKeys, split: str) -> DataSource:
    return DataSource(
        split,
        "dataset_name",
        keys.format,
        keys.columns,
        keys.train_on,
        hub=keys.dataset_name,
        hub_config=keys.dataset_config_name,
        split=split,
        streaming=keys.streaming,
    )


def _from_dataset_path(keys: DataKeys, split: str) -> DataSource | None:
    """A saved data set, or a folder whose files are named for their splits (a folder of other names is training)."""
    path = Path(str(keys.dataset_path))
    common = (split, "dataset_path", keys.format, keys.columns, keys.train_on)
    if (path / "dataset_dict.json").is_file():
        names = [n for n in _SPLIT_NAMES[split] if (path / n).is_dir()]
        return DataSource(*common, hub=str(path), split=names[0]) if names else None
    if is_saved(path):
        return DataSource(*common, hub=str(path)) if split == "train" else None
    files = find_files(str(path), "dataset_path")
    by_split: dict[str, list[Path]] = {}
    for file in files:
        by_split.setdefault(_split_of(file.relative_to(path)), []).append(file)
    chosen = next((by_split[name] for name in _SPLIT_NAMES[split] if name in by_split), [])
    if split == "train":
        others = by_split.get("", [])
        if chosen and others:
            logger.warning(
                "dataset_path: not used beside the files named for training: %s", ", ".join(map(str, others))
            )
        chosen = chosen or others
    return DataSource(*common, files=chosen) if chosen else None


def _split_of(file: Path) -> str:
    """The split that a folder or the file is named for (`train-00001.parquet`, `test/0.jsonl`, `my_val.csv`)."""
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
            raise UserError(
                Problem(f"two data sets are called {name!r}", "give each a `name` of its own", f"{key}.{number}.name")
            )
        path = Path(entry.path)
        is_local = path.exists() or any(c in entry.path for c in "*?[") or entry.path.startswith((".", "/"))
        is_file = (is_local or data_extension(path) in EXTENSIONS) and not is_saved(path)
        sources.append(
            DataSource(
                name,
                entry_key,
                entry.format or keys.format,
                entry.columns or keys.columns,
                entry.train_on or keys.train_on,
                entry.max_samples,
                entry.weight,
                files=_files_of_one_split(entry.path, entry_key, default) if is_file else [],
                hub=None if is_file else str(path),
                split=entry.split or default,
                streaming=keys.streaming,
            )
        )
    return sources
