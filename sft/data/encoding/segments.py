"""Tokenizes segments of a text, at its start or inside it: the difference is a blank.

SentencePiece vocabularies (and byte-level ones with `add_prefix_space`) put a blank in front of a text. A segment that
continues another must not get one, or the two would not join to the text they were cut from.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from functools import cached_property
from typing import Any

from tokenizers import Encoding, Tokenizer

Encode = Callable[[list[str]], list[list[int]]]
_ANCHORS = ("\n", "\x02", "=", "a")


class SegmentTokenizer:
    """Tokenizes segments of texts, in batches, with a tokenizer's Rust backend. No special token is added.

    Args:
        backend: without truncation and padding.
        token: the text of any added token (matched before the vocabulary is), if there is one.
    """

    def __init__(self, backend: Tokenizer, token: str | None = None) -> None:
        self._backend = backend
        self.prefixes = backend.encode("a", add_special_tokens=False).tokens[0] != "a"
        after = backend.encode(f"{token}a", add_special_tokens=False).tokens[1:] if token else []
        self._prefixes_after_token = bool(after) and after[0] != "a"

    def at_start(self, texts: list[str]) -> list[list[int]]:
        """Tokenizes texts that nothing precedes."""
        return [e.ids for e in self._backend.encode_batch_fast(texts, add_special_tokens=False)]

    def after_token(self, texts: list[str]) -> list[list[int]]:
        """Tokenizes texts that follow an added token, where some tokenizers put a blank and some do not."""
        return self.at_start(texts) if self._prefixes_after_token == self.prefixes else self.after_text(texts)

    def after_text(self, texts: list[str]) -> list[list[int]]:
        """Tokenizes texts that continue another text."""
        return self._encode_rest(texts)

    @cached_property
    def _encode_rest(self) -> Encode:
        if not self.prefixes:
            return self.at_start
        pre_tokenizer = json.loads(self._backend.to_str()).get("pre_tokenizer")
        if _stop_prefixing(pre_tokenizer):
            rest = SegmentTokenizer(_with_parts(self._backend, pre_tokenizer=pre_tokenizer))
            if not rest.prefixes:
                return rest.at_start
        return self._anchored

    def _anchored(self, texts: list[str]) -> list[list[int]]:
        encodings = self._with_offsets.encode_batch([_ANCHORS[0] + t for t in texts], add_special_tokens=False)
        return [self._without_anchor(text, e) for text, e in zip(texts, encodings, strict=True)]

    def _without_anchor(self, text: str, encoding: Encoding) -> list[int]:
        """Returns the ids after the anchor, a character that takes the blank; it must not merge with the text."""
        for anchor in _ANCHORS[1:]:
            if not any(start < 1 < end for start, end in encoding.offsets[:4]):
                break
            encoding = self._with_offsets.encode(anchor + text, add_special_tokens=False)
        first = next((i for i, (start, _) in enumerate(encoding.offsets) if start >= 1), len(encoding.ids))
        return list(encoding.ids[first:])

    @cached_property
    def _with_offsets(self) -> Tokenizer:
        """The tokenizer with offsets in which the blank before a word belongs to the word's token.

        Some tokenizers (GPT-NeoX, RoBERTa) trim it off, which hides that a token spans the anchor and the text.
        """
        return _with_parts(self._backend, post_processor=None)


def reset_backend(backend: Tokenizer) -> Tokenizer:
    """Turns off truncation and padding, and matches added tokens in the text as it is written.

    Those not flagged special are else matched after the normalizer, which may turn `＜｜end｜＞` into `<|end|>`.
    """
    backend.no_truncation()
    backend.no_padding()
    if backend.normalizer is None:
        return backend
    added = json.loads(backend.to_str())["added_tokens"]
    if not any(token["normalized"] for token in added):
        return backend
    return _with_parts(backend, added_tokens=[{**token, "normalized": False} for token in added])


def remove_added_tokens(backend: Tokenizer) -> Tokenizer:
    """Copies the tokenizer without its added tokens: to the copy, `<|im_end|>` is ten characters."""
    return _with_parts(backend, added_tokens=[], post_processor=None)


def _with_parts(backend: Tokenizer, **parts: Any) -> Tokenizer:
    """Copies the tokenizer with other parts, named as in tokenizer.json."""
    return Tokenizer.from_str(json.dumps(json.loads(backend.to_str()) | parts))


def _stop_prefixing(pre_tokenizer: Any) -> bool:
    """Changes a pre-tokenizer that puts a blank before the first word to put none; returns whether it did."""
    if not isinstance(pre_tokenizer, dict):
        return False
    steps: Sequence[Any] = pre_tokenizer.get("pretokenizers", ())
    found = [_stop_prefixing(step) for step in steps]
    if pre_tokenizer.get("type") == "Metaspace" and pre_tokenizer.get("prepend_scheme") == "first":
        pre_tokenizer["prepend_scheme"] = "never"
        return True
    return any(found)
