"""Turns rows into documents of tokens: normalizes, renders, tokenizes in batches, truncates, and counts in the ledger.

Python reads and renders the next thousand rows while the Rust tokenizer, in a thread of its own, encodes the last
thousand. If Rust is still busy then, Python tokenizes too, with cached words: on two cores that is half of the rows, on
many cores none. Both give the same ids.
"""

from __future__ import annotations

import gc
import json
import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import islice

import numpy as np
import xxhash
from transformers import PreTrainedTokenizerBase

from sft.config.schema import DataKeys
from sft.data.documents import IGNORE_INDEX, Documents
from sft.data.encoding.encoder import Batch, Encoded, Encoder
from sft.data.encoding.truncation import fit
from sft.data.encoding.word_cache import WordCache
from sft.data.formats.conversation import Conversation, RowLost, Text, require_valid_unicode
from sft.data.formats.normalize import normalize
from sft.data.ledger import Ledger
from sft.data.sources.dataset_source import DataSource
from sft.data.sources.files import Row
from sft.data.templates.renderer import ChatRenderer, Rendered
from sft.errors import Problem, UserError

_BATCH_ROWS = 1000  # rows given to the Rust tokenizer at a time: enough to keep its threads busy
_MAX_UNDERWAY = 4  # batches that are being tokenized, or wait for an earlier one
_THOUGHTS = ("reasoning_content", "thinking")


@dataclass(slots=True)
class Sample:
    """One row with what it was normalized to and its text, in several parts if the template rewrites earlier turns."""

    row: Row
    content: Conversation | Text
    parts: list[Rendered]


@dataclass(slots=True)
class Seen:
    """Fingerprints of rows, to count repetitions.

    Attributes:
        earlier: of the rows so far; each row is added.
        validation: of the validation rows; None while validation rows are read.
    """

    earlier: set[bytes]
    validation: set[bytes] | None = None


class RowEncoder:
    """Encodes rows as documents, with one tokenizer and one set of data keys.

    Attributes:
        end_token_ids: the tokens that end the kept answers, in the order of first use.
    """

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, keys: DataKeys, on_rows: Callable[[int], None] = lambda _: None
    ) -> None:
        if keys.preprocessing_num_workers:
            # The Rust tokenizer starts its threads when it first encodes a batch, and reads their number here.
            os.environ["RAYON_NUM_THREADS"] = str(keys.preprocessing_num_workers)
        self._tokenizer, self._keys, self._on_rows = tokenizer, keys, on_rows
        self._encoder = Encoder(tokenizer)
        self._word_cache = WordCache(self._encoder.backend)
        self.end_token_ids: list[int] = []

    @cached_property
    def _renderer(self) -> ChatRenderer:  # made for the first conversation: texts need no chat template
        return ChatRenderer(self._tokenizer, self._keys.special_tokens_in_content)

    def encode(
        self, rows: Iterable[Row], source: DataSource, ledger: Ledger, seen: Seen, *, wrapped: bool = False
    ) -> Iterator[Documents]:
        """Yields the documents of `rows`, batch by batch, and counts each row in `ledger`.

        Args:
            seen: earlier rows; these are added.
            wrapped: texts keep their full length, because packing cuts them.

        Raises:
            UserError: a row is too long or contains a control token, if the keys make that an error.
        """
        pending = iter(rows)
        underway: deque[tuple[list[Sample], Future[Batch]]] = deque()
        with ThreadPoolExecutor(1) as rust, _few_garbage_collections() as collect:
            while batch := list(islice(pending, _BATCH_ROWS)):
                collect()
                samples = list(self.render(batch, source, ledger))
                segments = self._encoder.split([p for s in samples for p in s.parts])
                if underway and not underway[-1][1].done():
                    self._word_cache.tokenize(segments)
                underway.append((samples, rust.submit(self._encoder.tokenize, segments)))
                while underway and (len(underway) > _MAX_UNDERWAY or underway[0][1].done()):
                    first, running = underway.popleft()
                    yield self._finish(first, running.result(), ledger, seen, wrapped)
                self._on_rows(len(batch))
            for first, running in underway:
                yield self._finish(first, running.result(), ledger, seen, wrapped)

    def render(self, rows: Iterable[Row], source: DataSource, ledger: Ledger) -> Iterator[Sample]:
        """Normalizes and renders rows; counts those that are lost in the ledger."""
        for row in rows:
            ledger.rows_read += 1
            try:
                content = self._normalize(row, source)
                parts = self._render(content, source.train_on)
            except RowLost as lost:
                if lost.reason == "control_token":
                    hint = "fix the row, or set special_tokens_in_content to text or allow"
                    key = "special_tokens_in_content"
                    raise UserError(Problem(lost.message, hint, key, row.file, row.line)) from None
                ledger.lose(lost.reason, lost.message, row.file, row.line)
                continue
            ledger.control_tokens += any(part.inert for part in parts)
            ledger.unrolled += len(parts) > 1
            extended = [m for m in content.messages if len(m) > 2] if isinstance(content, Conversation) else []
            # Many templates do not render the reasoning; some, like Llama 3.1's, not the text beside a call.
            thoughts = [text for m in extended for key in _THOUGHTS if isinstance(text := m.get(key), str)]
            ledger.thoughts_left_out += not _holds(parts, thoughts)
            ledger.texts_left_out += not _holds(parts, [m["content"] for m in extended if m.get("tool_calls")])
            ledger.formats[content.format] += 1
            yield Sample(row, content, parts)

    def encode_parts(self, sample: Sample) -> list[Encoded]:
        """Encodes each part of a sample, without truncation."""
        return self._encoder.encode_each(sample.parts)

    def _normalize(self, row: Row, source: DataSource) -> Conversation | Text:
        if row.data is None:
            raise RowLost(*(row.lost or ("bad_schema", "no data")))
        return normalize(row.data, source.format, source.columns, self._keys.system_prompt)

    def _render(self, content: Conversation | Text, train_on: str) -> list[Rendered]:
        if isinstance(content, Text):
            parts = [Rendered(content.text, [(0, len(content.text))], is_document=True)]
        else:
            parts = self._renderer.render_parts(content, train_on)
        for part in parts:
            require_valid_unicode(part.text)
        return parts

    def _finish(self, samples: list[Sample], batch: Batch, ledger: Ledger, seen: Seen, wrapped: bool) -> Documents:
        """Truncates the samples of a tokenized batch and counts them in the ledger."""
        documents = self._encoder.assemble(batch)
        fits = (documents.lengths <= self._keys.max_seq_length) & (documents.count_supervised() > 0)
        if wrapped:
            fits |= np.array([part.is_document for s in samples for part in s.parts], dtype=bool)
        is_kept = np.ones(len(documents), dtype=bool)
        replaced: dict[int, list[Encoded]] = {}  # documents that are truncated or split
        digests = list(fingerprints(documents))
        rows = at = 0
        for sample in samples:
            places = range(at, at + len(sample.parts))
            at = places.stop
            try:
                self._count_repetition(b"".join(digests[places.start : places.stop]), ledger, seen)
                if not fits[places.start : places.stop].all():
                    replaced |= self._fit(sample, documents, [p for p in places if not fits[p]], is_kept, ledger)
            except RowLost as lost:
                is_kept[places.start : places.stop] = False
                ledger.lose(lost.reason, lost.message, sample.row.file, sample.row.line)
                continue
            rows += 1
            is_document = sample.parts[0].is_document
            end = self._tokenizer.eos_token_id if is_document else self._renderer.end_token_id
            if end is not None and end not in self.end_token_ids:
                self.end_token_ids.append(end)
        sources = np.repeat([s.row.index for s in samples], [len(s.parts) for s in samples]).astype(np.int64)
        documents = _with(replace(documents, rows=sources), is_kept, replaced)
        ledger.keep(rows, documents)
        return documents

    def _fit(
        self, sample: Sample, documents: Documents, places: list[int], is_kept: np.ndarray, ledger: Ledger
    ) -> dict[int, list[Encoded]]:
        """Truncates the parts of a row at `places`, which are too long or not supervised.

        Lost parts are marked in `is_kept`. Raises `RowLost` if no part of the row is left.
        """
        row, keys = sample.row, self._keys
        replaced: dict[int, list[Encoded]] = {}
        for place in places:
            one = documents.take(np.array([place]))
            try:
                fitted = fit(Encoded(one.input_ids, one.labels), keys.max_seq_length, keys.truncation)
            except RowLost as lost:
                if lost.reason == "too_long" and keys.truncation == "error":
                    hint = "raise max_seq_length, or set truncation to drop, left, right or split"
                    raise UserError(Problem(lost.message, hint, "truncation", row.file, row.line)) from None
                is_kept[place] = False
                if not replaced and len(places) == len(sample.parts) and place == places[-1]:
                    raise
                ledger.tokens_truncated += len(one.input_ids)
                continue
            ledger.tokens_truncated += fitted.truncated
            ledger.answers_cut += fitted.answers_cut
            replaced[place] = fitted.samples
        return replaced

    def _count_repetition(self, fingerprint: bytes, ledger: Ledger, seen: Seen) -> None:
        """Counts a row that repeats an earlier row or a validation row; with `dedupe` it is lost."""
        is_training = seen.validation is not None
        if fingerprint in seen.earlier:
            ledger.duplicates += 1
            if is_training and self._keys.dedupe:
                raise RowLost("duplicate", "an earlier row has the same tokens")
        else:
            seen.earlier.add(fingerprint)
        if seen.validation and fingerprint in seen.validation:
            ledger.in_validation += 1
            if self._keys.dedupe:
                raise RowLost("in_validation", "a validation row has the same tokens")


@contextmanager
def _few_garbage_collections() -> Iterator[Callable[[], object]]:
    """Lets the caller collect cyclic garbage: Python's own schedule takes 15 % of the preparation.

    Rows and samples make no cycles; those that exist come from errors, and are young.
    """
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield lambda: gc.collect(1)
    finally:
        if was_enabled:
            gc.enable()


def fingerprints(documents: Documents) -> Iterator[bytes]:
    """Yields 16 bytes for each document, the same for the same tokens and labels."""
    both = documents.input_ids * np.int32(2) + (documents.labels != IGNORE_INDEX)
    content = both.astype(np.int32, copy=False).tobytes()
    at = 0
    for size in (documents.lengths * 4).tolist():
        yield xxhash.xxh3_128_digest(content[at : at + size])
        at += size


def _with(documents: Documents, is_kept: np.ndarray, replaced: dict[int, list[Encoded]]) -> Documents:
    """Returns the kept documents, those in `replaced` with what they became."""
    if is_kept.all() and not replaced:
        return documents
    parts: list[Documents] = []
    at = 0
    for number in [*sorted(replaced), len(documents)]:
        parts.append(documents.take(at + np.flatnonzero(is_kept[at:number])))
        for one in replaced.get(number, ()):
            row = documents.rows[number : number + 1]
            parts.append(Documents(one.input_ids, one.labels, np.array([len(one.input_ids)]), row))
        at = number + 1
    return Documents.join(parts)


def _holds(parts: list[Rendered], texts: list[str]) -> bool:
    """Whether all of `texts` are rendered, regardless of the blanks around them and perhaps as JSON."""
    forms = ((text, json.dumps(text, ensure_ascii=False)[1:-1]) for text in map(str.strip, texts))
    return all(any(form in part.text for part in parts for form in both) for both in forms)
