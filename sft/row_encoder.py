"""From rows to encoded samples: normalized, rendered, tokenized in batches, fitted, and accounted for."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from itertools import islice

import numpy as np
from transformers import PreTrainedTokenizerBase

from sft.conversation import Conversation, RowLost, Text
from sft.data_sources import DataSource
from sft.encoding import Encoded, Encoder
from sft.errors import Problem, UserError
from sft.formats import normalize
from sft.ledger import Ledger
from sft.rendering import ChatRenderer, Rendered
from sft.schema import DataKeys
from sft.sources import Row
from sft.truncation import Fitted, fit

_BATCH_ROWS = 1000  # rows handed to the Rust tokenizer at a time: enough to keep its threads busy
_NOTHING = Encoded(np.zeros(0, dtype=np.int32), np.zeros(0, dtype=np.int32))


@dataclass
class Sample:
    """One row on its way: where it comes from, what it was normalized to, and what it became."""

    row: Row
    content: Conversation | Text
    rendered: Rendered
    encoded: Encoded


@dataclass
class EncodedSet:
    """All samples of one data set that are kept; `wrapped` ones keep their whole length, to be cut by the packing."""

    ledger: Ledger = field(default_factory=Ledger)
    input_ids: list[np.ndarray] = field(default_factory=list)
    labels: list[np.ndarray] = field(default_factory=list)
    fingerprints: set[bytes] = field(default_factory=set)
    wrapped: bool = False


class RowEncoder:
    """Takes rows to samples, with one tokenizer and one set of data keys."""

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        keys: DataKeys,
        on_rows: Callable[[int], None] = lambda _: None,
    ) -> None:
        if keys.preprocessing_num_workers:
            # The Rust tokenizer makes its threads when it first encodes a batch, and reads their number here.
            os.environ["RAYON_NUM_THREADS"] = str(keys.preprocessing_num_workers)
        self._tokenizer = tokenizer
        self._keys = keys
        self._on_rows = on_rows
        self._encoder = Encoder(tokenizer)
        self._renderer: ChatRenderer | None = None  # made for the first conversation: texts need no chat template
        self.end_token_ids: list[int] = []  # of the samples that were kept, in the order of first use

    def encode_into(
        self, target: EncodedSet, rows: Iterable[Row], source: DataSource, known: set[bytes] | None = None
    ) -> None:
        """Encodes `rows` and keeps them in `target`; `known` are the fingerprints of validation rows."""
        pending = iter(rows)
        while batch := list(islice(pending, _BATCH_ROWS)):
            for sample in self.encode(batch, source, target.ledger):
                self._keep(sample, target, known)
            self._on_rows(len(batch))

    def encode(self, rows: list[Row], source: DataSource, ledger: Ledger) -> Iterator[Sample]:
        """Normalizes, renders and tokenizes a batch; rows that are lost on the way are in the ledger."""
        order: list[Sample] = []
        for row in rows:
            ledger.rows_read += 1
            try:
                content = self._normalize(row, source)
                rendered = _encodable(self._render(content, source.train_on))
            except RowLost as lost:
                if lost.reason == "control_token":
                    hint = "mend the row, or set special_tokens_in_content to text or allow"
                    raise UserError(
                        Problem(lost.message, hint, "special_tokens_in_content", row.file, row.line)
                    ) from None
                ledger.lose(lost.reason, lost.message, row.file, row.line)
                continue
            ledger.control_tokens += bool(rendered.inert)
            ledger.formats[content.format] += 1
            order.append(Sample(row, content, rendered, _NOTHING))
        chats = [s for s in order if isinstance(s.content, Conversation)]
        texts = [s for s in order if isinstance(s.content, Text)]
        for sample, encoded in zip(chats, self._encoder.encode_chats([s.rendered for s in chats]), strict=True):
            sample.encoded = encoded
        for sample, encoded in zip(texts, self._encoder.encode_texts([s.rendered.text for s in texts]), strict=True):
            sample.encoded = encoded
        yield from order

    def _normalize(self, row: Row, source: DataSource) -> Conversation | Text:
        if row.data is None:
            raise RowLost(*(row.lost or ("bad_schema", "no data")))
        return normalize(row.data, source.format, source.columns, self._keys.system_prompt)

    def _render(self, content: Conversation | Text, train_on: str) -> Rendered:
        if isinstance(content, Text):
            return Rendered(content.text, [(0, len(content.text))])
        if self._renderer is None:
            self._renderer = ChatRenderer(self._tokenizer, self._keys.special_tokens_in_content)
        return self._renderer.render(content, train_on)

    def _keep(self, sample: Sample, target: EncodedSet, known: set[bytes] | None) -> None:
        ledger, keys, row = target.ledger, self._keys, sample.row
        wrapped = target.wrapped and isinstance(sample.content, Text)
        try:
            self._note_duplicate(sample.encoded, target, known)
            fitted = Fitted([sample.encoded]) if wrapped else fit(sample.encoded, keys.max_seq_length, keys.truncation)
        except RowLost as lost:
            if lost.reason == "too_long" and keys.truncation == "error":
                hint = "raise max_seq_length, or set truncation to drop, left, right or split"
                raise UserError(Problem(lost.message, hint, "truncation", row.file, row.line)) from None
            ledger.lose(lost.reason, lost.message, row.file, row.line)
            return
        ledger.tokens_truncated += fitted.truncated
        ledger.answers_cut += fitted.answers_cut
        ledger.seam_merges += sample.encoded.seam_merges
        ledger.keep(fitted.samples)
        self._note_end_token(sample.content)
        target.input_ids += [s.input_ids for s in fitted.samples]
        target.labels += [s.labels for s in fitted.samples]

    def _note_end_token(self, content: Conversation | Text) -> None:
        is_chat = self._renderer is not None and isinstance(content, Conversation)
        end = self._renderer.end_token_id if is_chat else self._tokenizer.eos_token_id  # type: ignore[union-attr]
        if end is not None and end not in self.end_token_ids:
            self.end_token_ids.append(end)

    def _note_duplicate(self, encoded: Encoded, target: EncodedSet, known: set[bytes] | None) -> None:
        """Counts rows whose tokens stood before, here or in validation; `dedupe` leaves them out of training."""
        mark = fingerprint(encoded)
        is_training = known is not None
        if mark in target.fingerprints:
            target.ledger.duplicates += 1
            if is_training and self._keys.dedupe:
                raise RowLost("duplicate", "the same tokens stand in an earlier row")
        target.fingerprints.add(mark)
        if known and mark in known:
            target.ledger.in_validation += 1
            if self._keys.dedupe:
                raise RowLost("in_validation", "the same tokens stand in a validation row")


def _encodable(rendered: Rendered) -> Rendered:
    """The same. Raises `RowLost` for half of a surrogate pair, which JSON can write and no tokenizer takes."""
    try:
        rendered.text.encode("utf-8")
    except UnicodeEncodeError as error:
        half = rendered.text[error.start]
        raise RowLost("bad_encoding", f"{half!r} is half of a surrogate pair, and no character") from None
    return rendered


def fingerprint(encoded: Encoded) -> bytes:
    """16 bytes that are the same for the same tokens and labels."""
    digest = hashlib.blake2b(encoded.input_ids.tobytes(), digest_size=16)
    digest.update(encoded.labels.tobytes())
    return digest.digest()
