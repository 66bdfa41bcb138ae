"""Turns texts with supervised spans into `input_ids` and `labels`, built together so that they stay aligned.

Tokens are cut where a server cuts them: each text is split into the prompt, encoded on its own, the answer as it is
generated, and the text after it. The segments of a thousand rows go through the Rust tokenizer at once, and a token is
supervised if its segment is:

    <|user|>Hi<|end|><|assistant|>  |  Hello<|end|>  |  \\n
    masked                             supervised       masked
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property, partial
from itertools import chain, pairwise

import numpy as np
from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerBase

from sft.data.documents import IGNORE_INDEX, Documents
from sft.data.encoding.segments import Encode, SegmentTokenizer, remove_added_tokens, reset_backend
from sft.data.templates.renderer import Rendered

ID_BYTES = 4  # ids are int32 in the machine's byte order, like `array("i")` and numpy's int32
_MAX_SHORT = 48  # characters; a text that a template puts between two messages is at most this long and is cached
_MAX_SHORT_TEXTS = 10_000


@dataclass(frozen=True, slots=True)
class Encoded:
    """One sample: `input_ids` and `labels`, both int32 of shape (T,), aligned: `labels[t]` is `input_ids[t]` or -100.

    The model predicts token t from the tokens before it, so the loss shifts: logits[t - 1] against labels[t].
    `labels[0]` is always -100, because nothing predicts the first token.
    """

    input_ids: np.ndarray
    labels: np.ndarray


@dataclass(slots=True)
class Batch:
    """The segments of some rows while they are tokenized.

    Attributes:
        ids: ids of each segment, in order, as int32; None until it is tokenized.
        is_supervised: whether the tokens of each segment are supervised.
        counts: segments of each row.
        pending: by method (see `Encoder.tokenize`), the indices and texts of the segments to tokenize.
    """

    ids: list[bytes | None] = field(default_factory=list)
    is_supervised: list[bool] = field(default_factory=list)
    counts: list[int] = field(default_factory=list)
    pending: dict[str, tuple[list[int], list[str]]] = field(default_factory=dict)

    def add(self, text: str, is_supervised: bool, method: str) -> None:
        """Adds a segment, to be tokenized by the method of that name."""
        indices, texts = self.pending.setdefault(method, ([], []))
        indices.append(len(self.ids))
        texts.append(text)
        self.add_ids(None, is_supervised)

    def add_ids(self, ids: bytes | None, is_supervised: bool) -> None:
        """Adds a segment whose ids are known."""
        self.ids.append(ids)
        self.is_supervised.append(is_supervised)


class Encoder:
    """Encodes rendered conversations and documents with one tokenizer's Rust backend.

    `split`, `tokenize` and `assemble` are the three steps of `encode`; `tokenize` is all Rust, and may run in another
    thread.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self._tokenizer = tokenizer
        self.backend: Tokenizer = reset_backend(tokenizer.backend_tokenizer)
        added = tokenizer.added_tokens_decoder.values()
        self._segments = SegmentTokenizer(self.backend, next((t.content for t in added if not t.rstrip), None))
        self._added = tuple(t.content for t in added)
        # These take the blanks after them, wherever the text is cut.
        self._greedy = tuple(t.content for t in added if t.rstrip)
        self._short: dict[str, bytes] = {}

    def encode(self, rendered: Sequence[Rendered]) -> Documents:
        """Encodes all texts."""
        return self.assemble(self.tokenize(self.split(rendered)))

    def encode_each(self, rendered: Sequence[Rendered]) -> list[Encoded]:
        """Encodes all texts into one sample each."""
        return [Encoded(ids, labels) for ids, labels in self.encode(rendered)]

    def split(self, rendered: Sequence[Rendered]) -> Batch:
        """Splits each text into its segments."""
        batch = Batch()
        for row in rendered:
            first = len(batch.ids)
            if row.is_document:
                batch.add(row.text, True, "document")
            elif row.inert:
                self._split_inert(batch, row)
            else:
                self._split(batch, row)
            batch.counts.append(len(batch.ids) - first)
        return batch

    def _split(self, batch: Batch, row: Rendered) -> None:
        text, at, method = row.text, 0, "at_start"
        for start, end in row.spans:
            if start > at:
                prompt, answer = text[at:start], text[start:end]
                self._add_masked(batch, prompt, method, text[:at])
                is_after_token = self._segments.prefixes and prompt.endswith(self._added)
                batch.add(answer, True, "after_token" if is_after_token else "after_text")
            else:
                batch.add(text[start:end], True, method)
            at, method = end, "after_token"
        if at < len(text):
            self._add_masked(batch, text[at:], method, text[:at])

    def _add_masked(self, batch: Batch, segment: str, method: str, before: str) -> None:
        if self._greedy and before.endswith(self._greedy):
            segment = segment.lstrip()
        if method == "after_token" and len(segment) <= _MAX_SHORT:
            batch.add_ids(self._ids_of_short(segment), False)
        else:
            batch.add(segment, False, method)

    def _ids_of_short(self, text: str) -> bytes:
        ids = self._short.get(text)
        if ids is None:
            if len(self._short) >= _MAX_SHORT_TEXTS:
                self._short.clear()
            ids = self._short[text] = as_int32(self._segments.after_token([text])[0]) if text else b""
        return ids

    def _split_inert(self, batch: Batch, row: Rendered) -> None:
        """Splits a text in which some control tokens are plain text: around each of them and around each answer."""
        inert, ends = set(row.inert), {end for _, end in row.spans}
        borders = sorted({0, len(row.text), *(at for span in (*row.inert, *row.spans) for at in span)})
        for start, end in pairwise(borders):
            method = "at_start" if start == 0 else "after_token" if start in ends else "after_text"
            if (start, end) in inert:
                method = "plain_at_start" if start == 0 else "plain_after_text"
            batch.add(row.text[start:end], any(s <= start and end <= e for s, e in row.spans), method)

    def tokenize(self, batch: Batch) -> Batch:
        """Tokenizes all pending segments in Rust, which uses all cores and releases the GIL; returns the batch."""
        methods: dict[str, Encode] = {
            "document": self._encode_documents,
            "at_start": self._segments.at_start,
            "after_token": self._segments.after_token,
            "after_text": self._segments.after_text,
            "plain_at_start": partial(self._encode_plain, method="at_start"),
            "plain_after_text": partial(self._encode_plain, method="after_text"),
        }
        for method, (indices, texts) in batch.pending.items():
            for index, ids in zip(indices, methods[method](texts), strict=True):
                batch.ids[index] = as_int32(ids)
        batch.pending.clear()
        return batch

    def _encode_documents(self, texts: list[str]) -> list[list[int]]:
        """Encodes documents: the tokenizer's own BOS (if it sets one) in front, EOS at the end."""
        eos = self._tokenizer.eos_token_id
        encoded = [e.ids for e in self.backend.encode_batch_fast(texts, add_special_tokens=True)]
        return [ids if eos is None or (ids and ids[-1] == eos) else [*ids, eos] for ids in encoded]

    def _encode_plain(self, texts: list[str], method: str) -> list[list[int]]:
        """Encodes the texts of control tokens as plain text."""
        encode: Encode = getattr(self._plain, method)
        encoded = encode(texts)
        for number, (text, ids) in enumerate(zip(texts, encoded, strict=True)):
            if not self._added_ids.isdisjoint(ids):  # the vocabulary itself has the text as one word
                encoded[number] = [*encode([text[0]])[0], *chain(*self._plain.after_text(list(text[1:])))]
        return encoded

    @cached_property
    def _plain(self) -> SegmentTokenizer:
        return SegmentTokenizer(remove_added_tokens(self.backend))

    @cached_property
    def _added_ids(self) -> frozenset[int]:
        return frozenset(self._tokenizer.get_added_vocab().values())

    @staticmethod
    def assemble(batch: Batch) -> Documents:
        """Joins the segments into tokens and labels; a document's row is the index of its text."""
        segments: list[bytes] = batch.ids  # type: ignore[assignment]
        counts = np.fromiter(map(len, segments), dtype=np.int64, count=len(segments)) // ID_BYTES
        input_ids = np.frombuffer(b"".join(segments), dtype=np.int32)
        is_supervised = np.repeat(np.array(batch.is_supervised, dtype=bool), counts)
        labels = np.where(is_supervised, input_ids, np.int32(IGNORE_INDEX))
        ends = np.concatenate([[0], np.cumsum(counts)])[np.cumsum(batch.counts, dtype=np.int64)]
        lengths = np.diff(ends, prepend=0)
        labels[(ends - lengths)[lengths > 0]] = IGNORE_INDEX
        return Documents(input_ids, labels, lengths, np.arange(len(lengths)))


def as_int32(ids: list[int]) -> bytes:
    """Returns ids as int32 bytes."""
    return array("i", ids).tobytes()
