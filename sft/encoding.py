"""From text with trained spans to `input_ids` and `labels`, which grow together and cannot drift apart.

Tokens are cut where a server cuts them: the prompt as it is encoded on its own, the answer as it is generated. One
pass of the Rust tokenizer over the whole text gives both, because tokens seldom cross the seam between a prompt and
its answer; where one does (a BPE merge over the seam), or where the prompt would have other tokens on its own, the
text is cut there and both sides are encoded apart.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise

import numpy as np
from tokenizers import Encoding, Tokenizer
from transformers import PreTrainedTokenizerBase

from sft.control_tokens import Span
from sft.rendering import Rendered

_MOST_TAILS = 1000
_ANCHORS = ("\n", "\x02", "=", "a")
IGNORE_INDEX = -100  # the label of a token that is not trained, by PyTorch's and Hugging Face's convention


@dataclass(frozen=True, slots=True)
class Encoded:
    """One sample: `input_ids` and `labels`, both int32 of shape (T,), aligned: `labels[t]` is `input_ids[t]` or -100.

    The model predicts token t from tokens before it, so the loss shifts: logits[t - 1] against labels[t].
    `labels[0]` is always -100, for nothing predicts the first token.
    """

    input_ids: np.ndarray
    labels: np.ndarray
    seam_merges: int = 0


class Encoder:
    """Encodes rendered conversations and texts with one tokenizer's Rust backend."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self._tokenizer = tokenizer
        self._backend: Tokenizer = tokenizer.backend_tokenizer
        self._backend.no_truncation()
        self._backend.no_padding()
        # SentencePiece vocabularies put a blank in front of a text; a text's continuation must not get one.
        self._prefixes_blank = self._backend.encode("a", add_special_tokens=False).tokens[0].startswith("▁")
        self._chat_backend = _without_trimming(self._backend)
        self._added_ids = frozenset(tokenizer.get_added_vocab().values())
        self._ids_alone: dict[str, list[int]] = {}

    def encode_chats(self, rendered: Sequence[Rendered]) -> list[Encoded]:
        """Conversations: control tokens are in the text already, so none is added."""
        encodings = self._chat_backend.encode_batch([r.text for r in rendered], add_special_tokens=False)
        return [
            self._label_inert(r) if r.inert else self._label(r, e) for r, e in zip(rendered, encodings, strict=True)
        ]

    def encode_texts(self, texts: Sequence[str]) -> list[Encoded]:
        """Documents, trained whole: the tokenizer's own BOS (if it sets one) in front, EOS at the end."""
        eos = self._tokenizer.eos_token_id
        samples = []
        for encoding in self._backend.encode_batch(list(texts), add_special_tokens=True):
            ids = encoding.ids
            if eos is not None and (not ids or ids[-1] != eos):
                ids = [*ids, eos]
            input_ids = np.array(ids, dtype=np.int32)
            samples.append(Encoded(input_ids, _without_first(input_ids.copy())))
        return samples

    def _label(self, rendered: Rendered, encoding: Encoding) -> Encoded:
        if any(self._must_cut(encoding, rendered.text, start) for start, _ in rendered.spans):
            input_ids, token_spans, merges = self._encode_in_pieces(rendered.text, rendered.spans)
        else:
            input_ids = np.array(encoding.ids, dtype=np.int32)
            token_spans = [_token_span(encoding, span) for span in rendered.spans]
            merges = 0
        labels = np.full_like(input_ids, IGNORE_INDEX)
        for start, end in token_spans:
            labels[start:end] = input_ids[start:end]
        return Encoded(input_ids, _without_first(labels), merges)

    def _label_inert(self, rendered: Rendered) -> Encoded:
        """A text in which some control tokens are mere text: cut around each of them, and at each seam."""
        text, inert = rendered.text, set(rendered.inert)
        borders = sorted({0, len(text), *(at for span in (*rendered.inert, *rendered.spans) for at in span)})
        input_ids: list[int] = []
        labels: list[int] = []
        for start, end in pairwise(borders):
            backend = self._plain_backend if (start, end) in inert else self._chat_backend
            ids = self._encode_from(text, start, end, backend).ids
            trained = any(s <= start and end <= e for s, e in rendered.spans)
            input_ids += ids
            labels += ids if trained else [IGNORE_INDEX] * len(ids)
        return Encoded(np.array(input_ids, dtype=np.int32), _without_first(np.array(labels, dtype=np.int32)))

    @cached_property
    def _plain_backend(self) -> Tokenizer:
        """The tokenizer without its added tokens: to it `<|im_end|>` is ten characters."""
        state = json.loads(self._chat_backend.to_str())
        state["added_tokens"] = []
        state["post_processor"] = None
        return Tokenizer.from_str(json.dumps(state))

    def _must_cut(self, encoding: Encoding, text: str, seam: int) -> bool:
        """Whether `text` in one pass has other tokens around `seam` than the prompt and its answer have apart."""
        if self._straddles(encoding, seam):
            return True
        # How blanks at the prompt's end are grouped may hang on what follows: by the pattern `\s+(?!\S)` of GPT-2 and
        # its kin, two line feeds are one token at the end of a text and two in front of a word.
        token = encoding.char_to_token(seam)
        if token is None or self._prefixes_blank or seam < 2 or not text[seam - 2 : seam].isspace():
            return False
        ids, first = encoding.ids, token
        while first > 0 and ids[first - 1] not in self._added_ids:
            first -= 1
        chars = encoding.token_to_chars(first)
        return chars is not None and self._encode_tail(text[chars[0] : seam]) != ids[first:token]

    def _encode_tail(self, tail: str) -> list[int]:
        """The ids of what stands between the last control token and an answer: a template has few of them."""
        if tail not in self._ids_alone:
            if len(self._ids_alone) >= _MOST_TAILS:
                self._ids_alone.clear()
            self._ids_alone[tail] = self._chat_backend.encode(tail, add_special_tokens=False).ids
        return self._ids_alone[tail]

    @staticmethod
    def _straddles(encoding: Encoding, seam: int) -> bool:
        """Whether a token holds characters on both sides of `seam`."""
        if seam == 0:
            return False
        token = encoding.char_to_token(seam)
        chars = encoding.token_to_chars(token) if token is not None else None
        return chars is not None and chars[0] < seam < chars[1]

    def _encode_in_pieces(self, text: str, spans: list[Span]) -> tuple[np.ndarray, list[Span], int]:
        """Cuts `text` at each seam that a token would cross; returns ids, token spans, and the number of cuts."""
        ids: list[int] = []
        token_spans: list[Span] = []
        merges = 0
        origin = 0  # where the piece at hand starts in `text`
        pending = list(spans)
        while True:
            encoding = self._encode_from(text, origin)
            cut = next(
                (s for s, _ in pending if s > origin and self._must_cut(encoding, text[origin:], s - origin)), None
            )
            piece = encoding if cut is None else self._encode_from(text, origin, cut)
            inside = [(s, e) for s, e in pending if cut is None or e <= cut]
            for start, end in inside:
                token_start, token_end = _token_span(piece, (start - origin, end - origin))
                token_spans.append((len(ids) + token_start, len(ids) + token_end))
            ids += piece.ids
            if cut is None:
                return np.array(ids, dtype=np.int32), token_spans, merges
            pending = pending[len(inside) :]
            merges += 1
            origin = cut

    def _encode_from(
        self, text: str, origin: int, end: int | None = None, backend: Tokenizer | None = None
    ) -> Encoding:
        """`text[origin:end]` as it stands behind other text; offsets count from `origin`."""
        piece = text[origin:end]
        backend = backend or self._chat_backend
        if origin == 0 or not self._prefixes_blank:
            return backend.encode(piece, add_special_tokens=False)
        # A character in front takes the blank that a SentencePiece vocabulary would put there; both are cut off. It
        # must not merge with the piece, as a line feed does with another.
        for anchor in _ANCHORS:
            anchored = backend.encode(anchor + piece, add_special_tokens=False)
            if not self._straddles(anchored, 1):
                break
        return _Shifted(anchored)  # type: ignore[return-value]


def _without_trimming(backend: Tokenizer) -> Tokenizer:
    """A tokenizer whose offsets count the blank in front of a word to the word's token, as its text does.

    Some tokenizers (GPT-NeoX, RoBERTa) trim it off the offsets, which hides that the token crosses a seam there.
    """
    trims = backend.post_processor is not None and b'"trim_offsets":true' in backend.post_processor.__getstate__()
    if trims:
        backend = Tokenizer.from_str(backend.to_str())
        backend.post_processor = None
    return backend


class _Shifted:
    """An `Encoding` of anchor + piece, seen as one of the piece: the anchor's tokens dropped, offsets moved by one."""

    def __init__(self, anchored: Encoding) -> None:
        first = next((i for i, (start, _) in enumerate(anchored.offsets) if start >= 1), len(anchored.ids))
        self._anchored = anchored
        self._first = first
        self.ids = anchored.ids[first:]
        self.offsets = [(start - 1, end - 1) for start, end in anchored.offsets[first:]]

    def char_to_token(self, position: int) -> int | None:
        token = self._anchored.char_to_token(position + 1)
        return None if token is None or token < self._first else token - self._first

    def token_to_chars(self, token: int) -> tuple[int, int] | None:
        return self.offsets[token]


def _token_span(encoding: Encoding, span: Span) -> Span:
    """The tokens `[start, end)` that hold the characters `span`; characters that make no token are stepped over."""
    start, end = span
    first = next((t for c in range(start, end) if (t := encoding.char_to_token(c)) is not None), None)
    last = next((t for c in range(end - 1, start - 1, -1) if (t := encoding.char_to_token(c)) is not None), None)
    if first is None or last is None:
        return 0, 0
    # A character of several bytes may be several tokens, of which char_to_token gives the first.
    size = len(encoding.ids)
    while last + 1 < size and (chars := encoding.token_to_chars(last + 1)) is not None and chars[0] < end:
        last += 1
    return first, last + 1


def _without_first(labels: np.ndarray) -> np.ndarray:
    labels[:1] = IGNORE_INDEX
    return labels
