"""From text with trained spans to `input_ids` and `labels`, which grow together and cannot drift apart.

Tokens are cut where a server cuts them: each text is cut into its prompt as it is encoded on its own, the answer as
it is generated, and what follows; the pieces of a thousand rows go through the Rust tokenizer at once, and a token is
trained when its piece is:

    <|user|>Hi<|end|><|assistant|>  |  Hello<|end|>  |  \\n
    masked                             trained          masked
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import chain, pairwise

import numpy as np
from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerBase

from sft.data.documents import IGNORE_INDEX, Documents
from sft.data.encoding.segments import SegmentTokenizer, exact, plain
from sft.data.encoding.word_cache import ID_BYTES, WordIds, packed
from sft.data.templates.renderer import Rendered

_SHORT = 48  # characters; what a template puts between two messages is encoded once
_MOST_SHORT = 10_000
# Methods that are one and the same where `WordIds` knows the rules: such a tokenizer puts no blank in front of a text.
_BY_WORDS = {"first", "behind_token", "behind_text"}


@dataclass(frozen=True, slots=True)
class Encoded:
    """One sample: `input_ids` and `labels`, both int32 of shape (T,), aligned: `labels[t]` is `input_ids[t]` or -100.

    The model predicts token t from tokens before it, so the loss shifts: logits[t - 1] against labels[t].
    `labels[0]` is always -100, for nothing predicts the first token.
    """

    input_ids: np.ndarray
    labels: np.ndarray


@dataclass(slots=True)
class Batch:
    """The pieces of some rows on their way through the tokenizer.

    Attributes:
        ids: of each piece, in order, as int32; None until it has been encoded.
        trained: whether each piece is.
        pieces: of each row.
        waiting: by method, the pieces that are to be encoded and their texts.
    """

    ids: list[bytes | None] = field(default_factory=list)
    trained: list[bool] = field(default_factory=list)
    pieces: list[int] = field(default_factory=list)
    waiting: dict[str, tuple[list[int], list[str]]] = field(default_factory=dict)

    def add(self, text: str, trained: bool, method: str) -> None:
        """Notes one piece, to be encoded by the `SegmentTokenizer` method of that name."""
        numbers, texts = self.waiting.setdefault(method, ([], []))
        numbers.append(len(self.ids))
        texts.append(text)
        self.add_ids(None, trained)

    def add_ids(self, ids: bytes | None, trained: bool) -> None:
        """Notes one piece whose ids are known."""
        self.ids.append(ids)
        self.trained.append(trained)


class Encoder:
    """Encodes rendered conversations and documents with one tokenizer's Rust backend.

    `cut`, `run` and `assemble` are the three steps of `encode`; `run` is all Rust, and may run in another thread. Where
    that is busy, `run_words` takes work off it.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self._tokenizer = tokenizer
        self._backend: Tokenizer = exact(tokenizer.backend_tokenizer)
        added = tokenizer.added_tokens_decoder.values()
        self._encoder = SegmentTokenizer(self._backend, next((t.content for t in added if not t.rstrip), None))
        self._added = tuple(t.content for t in added)
        # These take the blanks behind them, wherever the text is cut.
        self._greedy = tuple(t.content for t in added if t.rstrip)
        self._words = WordIds(self._backend)
        self._short: dict[str, bytes] = {}

    def encode(self, rendered: Sequence[Rendered]) -> Documents:
        """All rows' tokens and labels."""
        return self.assemble(self.run(self.cut(rendered)))

    def encode_each(self, rendered: Sequence[Rendered]) -> list[Encoded]:
        """The same, row by row."""
        return [Encoded(ids, labels) for ids, labels in self.encode(rendered)]

    def cut(self, rendered: Sequence[Rendered]) -> Batch:
        """The pieces of each text."""
        batch = Batch()
        for row in rendered:
            first = len(batch.ids)
            if row.is_document:
                batch.add(row.text, True, "document")
            elif row.inert:
                self._cut_inert(batch, row)
            else:
                self._cut(batch, row)
            batch.pieces.append(len(batch.ids) - first)
        return batch

    def _cut(self, batch: Batch, row: Rendered) -> None:
        text, at, method = row.text, 0, "first"
        for start, end in row.spans:
            if start > at:
                prompt, answer = text[at:start], text[start:end]
                self._add_masked(batch, prompt, method, text[:at])
                is_behind_token = self._encoder.prefixes and prompt.endswith(self._added)
                batch.add(answer, True, "behind_token" if is_behind_token else "behind_text")
            else:
                batch.add(text[start:end], True, method)
            at, method = end, "behind_token"
        if at < len(text):
            self._add_masked(batch, text[at:], method, text[:at])

    def _add_masked(self, batch: Batch, piece: str, method: str, before: str) -> None:
        if self._greedy and before.endswith(self._greedy):
            piece = piece.lstrip()
        if method == "behind_token" and len(piece) <= _SHORT:
            batch.add_ids(self._ids_of_short(piece), False)
        else:
            batch.add(piece, False, method)

    def _ids_of_short(self, text: str) -> bytes:
        ids = self._short.get(text)
        if ids is None:
            if len(self._short) >= _MOST_SHORT:
                self._short.clear()
            ids = self._short[text] = packed(self._encoder.behind_token([text])[0]) if text else b""
        return ids

    def _cut_inert(self, batch: Batch, row: Rendered) -> None:
        """A text in which some control tokens are mere text: cut around each of them, and at each seam."""
        inert, ends = set(row.inert), {end for _, end in row.spans}
        borders = sorted({0, len(row.text), *(at for span in (*row.inert, *row.spans) for at in span)})
        for start, end in pairwise(borders):
            method = "first" if start == 0 else "behind_token" if start in ends else "behind_text"
            if (start, end) in inert:
                method = "plain_first" if start == 0 else "plain_behind_text"
            batch.add(row.text[start:end], any(s <= start and end <= e for s, e in row.spans), method)

    def run(self, batch: Batch) -> Batch:
        """The same, with every piece encoded; the Rust tokenizer uses all cores and leaves Python's lock to others."""
        methods = {
            "document": self._encode_documents,
            "first": self._encoder.first,
            "behind_token": self._encoder.behind_token,
            "behind_text": self._encoder.behind_text,
        }
        for method, (numbers, texts) in batch.waiting.items():
            encode = methods[method] if method in methods else self._encode_plain(method.removeprefix("plain_"))
            for number, ids in zip(numbers, encode(texts), strict=True):
                batch.ids[number] = packed(ids)
        batch.waiting.clear()
        return batch

    def run_words(self, batch: Batch) -> None:
        """Encodes in this thread those pieces that can be put together from words; the others go on waiting."""
        if not self._words.is_worthwhile:
            return
        for method in _BY_WORDS & batch.waiting.keys():
            numbers, texts = batch.waiting[method]
            for number, ids in zip(numbers, self._words.encode(texts), strict=True):
                batch.ids[number] = ids
            left = [i for i, number in enumerate(numbers) if batch.ids[number] is None]
            batch.waiting[method] = [numbers[i] for i in left], [texts[i] for i in left]

    def _encode_documents(self, texts: list[str]) -> list[list[int]]:
        """Documents, trained whole: the tokenizer's own BOS (if it sets one) in front, EOS at the end."""
        eos = self._tokenizer.eos_token_id
        encoded = [e.ids for e in self._backend.encode_batch_fast(texts, add_special_tokens=True)]
        return [ids if eos is None or (ids and ids[-1] == eos) else [*ids, eos] for ids in encoded]

    def _encode_plain(self, method: str) -> Callable[[list[str]], list[list[int]]]:
        """Encodes the texts of control tokens, none of them as the token."""
        encoder = self._plain

        def encode(texts: list[str]) -> list[list[int]]:
            encoded = getattr(encoder, method)(texts)
            for number, (text, ids) in enumerate(zip(texts, encoded, strict=True)):
                if not self._added_ids.isdisjoint(ids):  # the vocabulary itself holds the text as one word
                    rest = encoder.behind_text(list(text[1:]))
                    encoded[number] = [*getattr(encoder, method)([text[0]])[0], *chain(*rest)]
            return encoded

        return encode

    @cached_property
    def _plain(self) -> SegmentTokenizer:
        return SegmentTokenizer(plain(self._backend))

    @cached_property
    def _added_ids(self) -> frozenset[int]:
        return frozenset(self._tokenizer.get_added_vocab().values())

    @staticmethod
    def assemble(batch: Batch) -> Documents:
        """The texts' tokens and labels; a document's row is its place among the texts."""
        pieces: list[bytes] = batch.ids  # type: ignore[assignment]
        counts = np.fromiter(map(len, pieces), dtype=np.int64, count=len(pieces)) // ID_BYTES
        input_ids = np.frombuffer(b"".join(pieces), dtype=np.int32)
        labels = np.where(np.repeat(np.array(batch.trained, dtype=bool), counts), input_ids, np.int32(IGNORE_INDEX))
        ends = np.concatenate([[0], np.cumsum(counts)])[np.cumsum(batch.pieces, dtype=np.int64)]
        lengths = np.diff(ends, prepend=0)
        labels[(ends - lengths)[lengths > 0]] = IGNORE_INDEX
        return Documents(input_ids, labels, lengths, np.arange(len(lengths)))
