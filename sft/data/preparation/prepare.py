"""Prepares the data sets of a config into a folder of the cache: splits, encodes, mixes and packs them."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import tokenizers
import transformers
from transformers import PreTrainedTokenizerBase

from sft.config.schema import DataKeys
from sft.data.documents import IGNORE_INDEX, Documents, DocumentStore
from sft.data.encoding.row_encoder import RowEncoder, Seen
from sft.data.ledger import Ledger, as_document, as_state, total
from sft.data.preparation.cache import cache_key, write_rows
from sft.data.preparation.packing import AutoPacking, pack
from sft.data.preparation.preview import first_sample
from sft.data.preparation.selection import draw_mixture, held_out_rows
from sft.data.sources.dataset_source import DataSource, training_sources, validation_sources
from sft.data.sources.files import Wanted

Part = tuple[DataSource, Wanted]  # all or some rows of a source

_CODE = sorted(Path(__file__).parents[1].rglob("*.py"))
# Keys that change where the data goes or how fast, not what it holds.
_NOT_IN_KEY = {"cache_dir", "preprocessing_num_workers", "streaming", "streaming_window"}
_DOCUMENTS = "documents"  # folder of the documents before they are packed


@dataclass(frozen=True, slots=True)
class _Encoded:
    """The documents of some sources, one source after another, before packing.

    Attributes:
        sizes: documents of each source.
        ledgers: ledger of each source.
    """

    documents: Documents
    sizes: list[int]
    ledgers: list[Ledger]


@dataclass
class Preparation:
    """Prepares the training and evaluation sets of one config.

    The attributes are as for `data_handler.prepare_data`; `seed` is that of splits and mixtures.
    """

    keys: DataKeys
    tokenizer: PreTrainedTokenizerBase
    seed: int
    training: bool
    auto: AutoPacking
    on_rows: Callable[[int], None]

    def __post_init__(self) -> None:
        keys = self.keys
        self.train_packing = packing_mode(keys.packing)
        self.eval_packing = packing_mode(keys.packing if keys.eval_packing is None else keys.eval_packing)
        self.train_sources = training_sources(keys) if self.training or keys.validation_split else []
        self.eval_sources = validation_sources(keys)

    def key(self) -> str:
        """Returns the cache key, which differs wherever the prepared data could."""
        tokenizer = self.tokenizer
        # Preparing uses neither; set by an earlier call, both would be part of the backend's JSON and so of the key.
        tokenizer.backend_tokenizer.no_truncation()
        tokenizer.backend_tokenizer.no_padding()
        return cache_key(
            {
                "keys": self.keys.model_dump(exclude=_NOT_IN_KEY),
                "plan": [self.seed, self.train_packing, self.eval_packing, self.training],
                "auto": self._auto_facts(),
                "tokenizer": [tokenizer.backend_tokenizer.to_str(), str(tokenizer.special_tokens_map)],
                "template": tokenizer.chat_template,
                "libraries": [transformers.__version__, tokenizers.__version__],
                "sources": [s.fingerprint() for s in [*self.train_sources, *self.eval_sources]],
            },
            _CODE,
        )

    def _auto_facts(self) -> list[Any]:
        """Returns what `packing: auto` depends on; nothing if it is not used."""
        of_eval = [self.auto.obstacle] if "auto" in (self.train_packing, self.eval_packing) else []
        return [*of_eval, self.auto.sequences_per_step] if self.train_packing == "auto" and self.training else of_eval

    def make(self, folder: Path) -> None:
        """Prepares everything into `folder`.

        Raises:
            UserError: data that cannot be read.
        """
        encoder = RowEncoder(self.tokenizer, self.keys, self.on_rows)
        split = self.keys.validation_split
        held_out = [held_out_rows(s, split, self.seed + number) for number, s in enumerate(self.train_sources)]
        known: set[bytes] = set()
        limit = self.keys.max_seq_length
        ledgers: dict[str, Ledger] = {}
        files: dict[str, str] = {}
        for number, (name, parts) in enumerate(self._eval_parts(held_out).items()):
            seen = Seen(set())
            encoded = _encode(encoder, parts, seen, self.eval_packing, folder)
            known |= seen.earlier
            files[name] = f"eval_{number}.arrow"
            packing = self.eval_packing
            if packing == "auto":  # evaluation has no steps to keep
                packing, _ = replace(self.auto, sequences_per_step=0).choose(encoded.documents.lengths, limit)
            self._write(encoded, folder / files[name], packing)
            ledgers[name] = total(encoded.ledgers)
        encoded = _Encoded(Documents.empty(), [], [])
        if self.training:
            # One `Seen` for all training sets: a row may repeat a row of another set.
            parts = [(s, _not_in(rows)) for s, rows in zip(self.train_sources, held_out, strict=True)]
            encoded = _encode(encoder, parts, Seen(set(), known), self.train_packing, folder)
        packing, order, choice = self.train_packing, self._mixture(encoded), ""
        if packing == "auto":
            lengths = encoded.documents.lengths
            packing, choice = self.auto.choose(lengths if order is None else lengths[order], limit)
        self._write(encoded, folder / "train.arrow", packing, order)
        trained = dict(zip([s.name for s in self.train_sources], encoded.ledgers, strict=False))
        facts = {
            "ledger": as_document(trained, ledgers),
            "evals": files,
            # A stream is read later and counts which of its rows are among these.
            "known": [] if self.training else sorted(mark.hex() for mark in known),
            "eval_ledgers": {name: as_state(ledger) for name, ledger in ledgers.items()},
            "end_token_ids": encoder.end_token_ids,
            "train_tokens": sum(ledger.tokens for ledger in encoded.ledgers),
            "packing": choice,
            # Stored, so that a second start shows it without reading the sources.
            "sample": first_sample(self.keys, self.tokenizer, seed=self.seed) if self.training else None,
        }
        (folder / "facts.json").write_text(json.dumps(facts))

    def _eval_parts(self, held_out: list[frozenset[int]]) -> dict[str, list[Part]]:
        """Returns the rows of each evaluation set by its name."""
        parts: dict[str, list[Part]] = {}
        for source in self.eval_sources:
            parts.setdefault(source.name, []).append((source, None))
        if self.keys.validation_split:
            parts.setdefault("validation", []).extend(
                (source, rows.__contains__) for source, rows in zip(self.train_sources, held_out, strict=True)
            )
        return parts

    def _mixture(self, encoded: _Encoded) -> np.ndarray | None:
        """Draws documents by the weights of the sources; None takes each once."""
        weights = [source.weight for source in self.train_sources]
        if not encoded.ledgers or None in weights:
            return None
        documents = encoded.documents
        starts = np.cumsum(encoded.sizes) - encoded.sizes
        lengths = np.split(documents.lengths, starts[1:])
        trained = documents.count_supervised()
        mixture = draw_mixture(lengths, weights, self.keys.mix_by, self.seed)  # type: ignore[arg-type]
        order = [chosen + start for chosen, start in zip(mixture, starts.tolist(), strict=True)]
        for ledger, chosen, size in zip(encoded.ledgers, order, encoded.sizes, strict=True):
            ledger.draw(
                rows=len(np.unique(documents.rows[chosen])),
                lengths=documents.lengths[chosen],
                tokens_trained=int(trained[chosen].sum()),
                passes=len(chosen) / max(size, 1),
            )
        return np.concatenate(order)

    def _write(self, encoded: _Encoded, file: Path, packing: str | None, order: np.ndarray | None = None) -> None:
        documents, limit = encoded.documents, self.keys.max_seq_length
        if order is not None and packing == "wrapped":  # wrapping cuts documents in their final order
            documents, order = documents.take(order), None
        layout = pack(documents.lengths, packing, limit, order)
        write_rows(documents, layout, file, packed=packing is not None)
        if packing and len(documents):
            # Sequences belong to all sources together: the first ledger counts them, so the total counts them once.
            sequences = len(layout.counts)
            encoded.ledgers[0].pack(sequences, sequences * limit, int(layout.sequence_lengths.sum()))
        if packing == "wrapped":
            _subtract_cuts(encoded, documents, limit)
        shutil.rmtree(file.parent / _DOCUMENTS, ignore_errors=True)


def packing_mode(value: str | bool) -> str | None:
    """Returns the mode that a value of `packing` names; None does not pack."""
    return None if value is False else str(value)


def _not_in(held_out: frozenset[int]) -> Wanted:
    return (lambda index: index not in held_out) if held_out else None


def _encode(encoder: RowEncoder, parts: list[Part], seen: Seen, packing: str | None, folder: Path) -> _Encoded:
    """Encodes all parts; their documents are on disk, in `folder`, until they are packed."""
    store = DocumentStore(folder / _DOCUMENTS)
    sizes, ledgers = [], []
    for source, wanted in parts:
        ledger, before = Ledger(), store.count
        for documents in encoder.encode(source.rows(wanted), source, ledger, seen, wrapped=packing == "wrapped"):
            store.add(documents)
        sizes.append(store.count - before)
        ledgers.append(ledger)
    return _Encoded(store.read(), sizes, ledgers)


def _subtract_cuts(encoded: _Encoded, documents: Documents, limit: int) -> None:
    """Subtracts from the ledgers the tokens that lost their label because wrapping cut before them."""
    ends = np.cumsum([ledger.tokens for ledger in encoded.ledgers])
    cuts = np.arange(limit, len(documents.labels), limit)
    lost = cuts[documents.labels[cuts] != IGNORE_INDEX]
    counts = np.bincount(np.searchsorted(ends, lost, side="right"), minlength=len(ends))
    for ledger, count in zip(encoded.ledgers, counts.tolist(), strict=True):
        ledger.tokens_trained -= count
