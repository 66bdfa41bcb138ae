"""The data stage: from files to token data sets, with an account of every row.

    files → rows → conversations → text with trained spans → input_ids and labels → fitted → packed → cached

`prepare_data` runs it all (once per machine, see `sft.dataset_cache`); `preview` shows what it does to the first rows.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import tokenizers
import transformers
from datasets import Dataset
from transformers import PreTrainedTokenizerBase

from sft.conversation import Conversation, RowLost, Text
from sft.data_sources import DataSource, training_sources, validation_sources
from sft.dataset_cache import Columns, cache_key, cache_root, make_once, read_columns, write_columns
from sft.encoding import IGNORE_INDEX
from sft.errors import Problem, UserError
from sft.formats import normalize
from sft.ledger import Ledger, as_document
from sft.packing import best_fit_decreasing, pack_rows, wrap
from sft.row_encoder import EncodedSet, RowEncoder, Sample
from sft.schema import DataKeys
from sft.sources import Row

logger = logging.getLogger("sft")

_CODE = [Path(__file__), *sorted((Path(__file__).parent / "sft").glob("*.py"))]
_NOT_IN_KEY = {"cache_dir", "preprocessing_num_workers"}  # keys that change where or how fast, not what


@dataclass(frozen=True)
class PreparedData:
    """What the trainer needs of the data.

    Attributes:
        train: rows of `input_ids` and `labels`; packed rows also have `position_ids` and `seq_lengths`.
        evals: evaluation sets by name, in the same form.
        train_tokens: tokens of `train`.
        ledger: SPEC's LEDGER document.
        end_token_ids: the tokens that end the trained answers, in the order of first use.
        sample: the preview of the first row that is not lost; None when only evaluation sets were prepared.
        from_cache: whether an earlier preparation was found.
    """

    train: Dataset
    evals: dict[str, Dataset]
    train_tokens: int
    ledger: dict[str, Any]
    end_token_ids: tuple[int, ...]
    sample: dict[str, Any] | None = None
    from_cache: bool = False


def prepare_data(
    keys: DataKeys,
    tokenizer: PreTrainedTokenizerBase,
    *,
    seed: int,
    training: bool = True,
    on_rows: Callable[[int], None] = lambda _: None,
) -> PreparedData:
    """Prepares all data sets that `keys` names, or reads an earlier preparation of the same.

    Args:
        keys: the data section of the config.
        tokenizer: with its chat template set.
        seed: what `shuffle_seed: null` stands for.
        training: False prepares the evaluation sets alone.
        on_rows: told how many rows have been prepared since it was last told.

    Raises:
        UserError: data that does not exist or cannot be read.
    """
    plan = _Plan(keys, tokenizer, keys.shuffle_seed if keys.shuffle_seed is not None else seed, training, on_rows)
    folder = cache_root(keys.cache_dir) / plan.key()
    from_cache = make_once(folder, plan.make)
    facts = json.loads((folder / "facts.json").read_text())
    evals = {name: read_columns(folder / file) for name, file in facts["evals"].items()}
    return PreparedData(
        train=read_columns(folder / "train.arrow"),
        evals=evals,
        train_tokens=facts["train_tokens"],
        ledger=facts["ledger"],
        end_token_ids=tuple(facts["end_token_ids"]),
        sample=facts["sample"],
        from_cache=from_cache,
    )


class _Plan:
    """What is to be prepared, and the preparation itself."""

    def __init__(
        self,
        keys: DataKeys,
        tokenizer: PreTrainedTokenizerBase,
        seed: int,
        training: bool,
        on_rows: Callable[[int], None],
    ) -> None:
        self.keys, self.tokenizer, self.seed, self.training, self.on_rows = keys, tokenizer, seed, training, on_rows
        self.train_packing = self._packing(keys.packing)
        self.eval_packing = self._packing(keys.packing if keys.eval_packing is None else keys.eval_packing)
        self.train_sources = training_sources(keys) if training or keys.validation_split else []
        self.eval_sources = validation_sources(keys)

    @staticmethod
    def _packing(value: str | bool) -> str | None:
        return None if value in ("auto", False) else str(value)

    def key(self) -> str:
        tokenizer = self.tokenizer
        # Left from an earlier call, these would be part of the backend's text and of the key; nothing here uses them.
        tokenizer.backend_tokenizer.no_truncation()
        tokenizer.backend_tokenizer.no_padding()
        return cache_key(
            {
                "keys": self.keys.model_dump(exclude=_NOT_IN_KEY),
                "plan": [self.seed, self.train_packing, self.eval_packing, self.training],
                "tokenizer": [tokenizer.backend_tokenizer.to_str(), str(tokenizer.special_tokens_map)],
                "template": tokenizer.chat_template,
                "libraries": [transformers.__version__, tokenizers.__version__],
                "sources": [s.fingerprint() for s in [*self.train_sources, *self.eval_sources]],
            },
            _CODE,
        )

    def make(self, folder: Path) -> None:
        """Prepares everything into `folder`."""
        encoder = RowEncoder(self.tokenizer, self.keys, self.on_rows)
        evals: dict[str, EncodedSet] = {}
        is_wrapped = self.eval_packing == "wrapped"
        for source in self.eval_sources:
            target = evals.setdefault(source.name, EncodedSet(wrapped=is_wrapped))
            encoder.encode_into(target, source.rows(), source)
        trained: dict[str, EncodedSet] = {}
        to_train: list[tuple[DataSource, list[Row]]] = []
        for number, source in enumerate(self.train_sources):
            rows = list(source.rows())
            if self.keys.validation_split:
                rows, held = split_rows(rows, self.keys.validation_split, self.seed + number)
                target = evals.setdefault("validation", EncodedSet(wrapped=is_wrapped))
                encoder.encode_into(target, held, source)
            to_train.append((source, rows))
        if self.training:
            known = set().union(*(e.fingerprints for e in evals.values()))
            seen: set[bytes] = set()  # one for all training sets: a row may be a duplicate of another set's
            for source, rows in to_train:
                target = EncodedSet(fingerprints=seen, wrapped=self.train_packing == "wrapped")
                encoder.encode_into(trained.setdefault(source.name, target), rows, source, known)
        self._write(folder, trained, evals, encoder.end_token_ids)

    def _write(
        self, folder: Path, trained: dict[str, EncodedSet], evals: dict[str, EncodedSet], end_tokens: list[int]
    ) -> None:
        limit = self.keys.max_seq_length
        columns = _arrange(list(trained.values()), self.train_packing, limit)
        write_columns(columns, folder / "train.arrow")
        files = {}
        for number, (name, encoded) in enumerate(evals.items()):
            files[name] = f"eval_{number}.arrow"
            write_columns(_arrange([encoded], self.eval_packing, limit), folder / files[name])
        ledgers = {name: s.ledger for name, s in trained.items()}
        ledgers |= {name if name not in ledgers else f"eval_{name}": s.ledger for name, s in evals.items()}
        facts: dict[str, Any] = {"ledger": as_document(ledgers), "evals": files, "end_token_ids": end_tokens}
        facts["train_tokens"] = sum(s.ledger.tokens for s in trained.values())
        # Kept here, so that a second start shows it without reading the sources again.
        samples = preview(self.keys, self.tokenizer, 1, seed=self.seed) if self.training else iter(())
        facts["sample"] = next(samples, None)
        (folder / "facts.json").write_text(json.dumps(facts))


def split_rows(rows: list[Row], fraction: float, seed: int) -> tuple[list[Row], list[Row]]:
    """Draws `fraction` of the rows (at least one, never all) for validation; both parts keep the source's order."""
    if len(rows) < 2:
        return rows, []
    held = min(max(1, round(len(rows) * fraction)), len(rows) - 1)
    chosen = set(np.random.default_rng(seed).permutation(len(rows))[:held].tolist())
    return [r for i, r in enumerate(rows) if i not in chosen], [r for i, r in enumerate(rows) if i in chosen]


def _arrange(sets: list[EncodedSet], packing: str | None, limit: int) -> Columns:
    """The columns of one prepared data set, packed or not."""
    input_ids = [ids for s in sets for ids in s.input_ids]
    labels = [row for s in sets for row in s.labels]
    if not packing or not input_ids:
        return {"input_ids": input_ids, "labels": labels}
    if packing == "wrapped":
        rows = wrap(input_ids, labels, limit)
        _note_cuts(sets, limit)
    else:
        lengths = np.array([len(ids) for ids in input_ids])
        rows = pack_rows(input_ids, labels, best_fit_decreasing(lengths, limit))
    # The row count belongs to the data set as a whole: it stands in the first ledger and so, once, in the total.
    sets[0].ledger.pack(len(rows), limit)
    return {name: [row[name] for row in rows] for name in ("input_ids", "labels", "position_ids", "seq_lengths")}


def _note_cuts(sets: list[EncodedSet], limit: int) -> None:
    """Takes out of the ledgers the tokens that are not trained because the stream was cut in front of them."""
    at = 0
    for one in (s for s in sets if s.labels):
        labels = np.concatenate(one.labels)
        one.ledger.tokens_trained -= int((labels[-at % limit :: limit] != IGNORE_INDEX).sum())
        at += len(labels)


def require_enough_rows(keys: DataKeys, document: dict[str, Any]) -> None:
    """Raises `UserError` when nothing is left to train, or too much was lost on the way."""
    for name, ledger in document["datasets"].items():
        if not ledger["rows_read"]:
            hint = "validation_split holds rows out of a data set of two rows and more"
            raise UserError(Problem(f"{name!r} has no rows", hint, "validation_split"))
        asked_for = ledger["rows_lost"].get("duplicate", 0) + ledger["rows_lost"].get("in_validation", 0)
        lost = sum(ledger["rows_lost"].values()) - asked_for
        fraction = lost / ledger["rows_read"]
        if ledger["rows_trained"] and fraction <= keys.max_lost_fraction:
            continue
        reasons = ", ".join(f"{n} {reason}" for reason, n in ledger["rows_lost"].items())
        summary = f"{lost} of {ledger['rows_read']} rows of {name!r} are lost ({reasons})"
        if ledger["rows_trained"]:
            summary += f": {fraction:.1%}, max_lost_fraction is {keys.max_lost_fraction:.1%}"
        examples = [
            Problem(f"{e['reason']}: {e['message']}", file=e["file"], line=e["line"])
            for e in ledger["lost_examples"][:5]
        ]
        hint = "mend the rows below; or raise max_lost_fraction if you can do without them"
        raise UserError(Problem(summary, hint, "max_lost_fraction"), *examples)


def preview(
    keys: DataKeys, tokenizer: PreTrainedTokenizerBase, num_samples: int, *, seed: int
) -> Iterator[dict[str, Any]]:
    """SPEC's preview: the first rows in source order (training sources first), before fitting and packing.

    Rows that are lost are said aloud and stepped over.
    """
    seed = keys.shuffle_seed if keys.shuffle_seed is not None else seed
    encoder = RowEncoder(tokenizer, keys)
    shown = 0
    for split, source, row in _rows_with_split(keys, seed):
        if shown == num_samples:
            return
        ledger = Ledger()
        for sample in encoder.encode([row], source, ledger):
            shown += 1
            yield _as_preview(split, sample, tokenizer)
        for lost in ledger.lost_examples:
            logger.warning("%s:%s: lost: %s: %s", lost["file"], lost["line"], lost["reason"], lost["message"])


def _as_preview(split: str, sample: Sample, tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    content, encoded = sample.content, sample.encoded
    what = {"text": content.text} if isinstance(content, Text) else {"messages": content.messages}
    trained = encoded.labels[encoded.labels != IGNORE_INDEX]
    return {
        "split": split,
        "file": sample.row.file,
        "row": sample.row.index,
        "format": content.format,
        **what,
        "rendered": sample.rendered.text,
        "input_ids": encoded.input_ids.tolist(),
        "labels": encoded.labels.tolist(),
        "trained_text": tokenizer.decode(trained.tolist(), clean_up_tokenization_spaces=False),
    }


def validation_conversations(keys: DataKeys, *, seed: int, limit: int) -> list[Conversation]:
    """At most `limit` validation rows that end with an answer, evenly spaced over all validation sets."""
    seed = keys.shuffle_seed if keys.shuffle_seed is not None else seed
    found: list[Conversation] = []
    for split, source, row in _rows_with_split(keys, seed, training=bool(keys.validation_split)):
        if split == "train" or row.data is None:
            continue
        try:
            content = normalize(row.data, source.format, source.columns, keys.system_prompt)
        except RowLost:
            continue
        if isinstance(content, Conversation) and content.messages[-1]["role"] == "assistant":
            found.append(content)
    limit = min(limit, len(found))
    return [found[number * len(found) // limit] for number in range(limit)]


def _rows_with_split(keys: DataKeys, seed: int, training: bool = True) -> Iterator[tuple[str, DataSource, Row]]:
    """Every row in source order with the split it falls in, by the same draw as the preparation's."""
    for number, source in enumerate(training_sources(keys) if training else []):
        if not keys.validation_split:
            yield from (("train", source, row) for row in source.rows())
            continue
        rows = list(source.rows())
        _, held = split_rows(rows, keys.validation_split, seed + number)
        held_indices = {row.index for row in held}
        for row in rows:
            yield ("validation" if row.index in held_indices else "train"), source, row
    for source in validation_sources(keys):
        yield from ((source.name, source, row) for row in source.rows())
