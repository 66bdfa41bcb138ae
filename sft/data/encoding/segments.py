"""Token ids of a text that stands at the start, or behind other text: the difference is a blank.

SentencePiece vocabularies (and byte-level ones with `add_prefix_space`) put a blank in front of a text. A piece that
goes on where another ended must not get one, or the two would not be the text that they were cut from.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from functools import cached_property
from typing import Any

from tokenizers import Encoding, Tokenizer

_ANCHORS = ("\n", "\x02", "=", "a")


class SegmentTokenizer:
    """Encodes pieces of texts, in batches, with a tokenizer's Rust backend. No special token is added.

    Args:
        backend: without truncation and padding.
        token: the text of any token that is matched before the vocabulary is (an added token), if there is one.
    """

    def __init__(self, backend: Tokenizer, token: str | None = None) -> None:
        self._backend = backend
        self.prefixes = backend.encode("a", add_special_tokens=False).tokens[0] != "a"
        behind = backend.encode(f"{token}a", add_special_tokens=False).tokens[1:] if token else []
        self._prefixes_behind_token = bool(behind) and behind[0] != "a"

    def first(self, texts: list[str]) -> list[list[int]]:
        """The ids of texts that stand at the start."""
        return [e.ids for e in self._backend.encode_batch_fast(texts, add_special_tokens=False)]

    def behind_token(self, texts: list[str]) -> list[list[int]]:
        """The ids of texts that stand behind an added token, where some tokenizers put a blank and some do not."""
        return self.first(texts) if self._prefixes_behind_token == self.prefixes else self.behind_text(texts)

    def behind_text(self, texts: list[str]) -> list[list[int]]:
        """The ids of texts that go on where another text ended."""
        return self._encode_rest(texts)

    @cached_property
    def _encode_rest(self) -> Callable[[list[str]], list[list[int]]]:
        if not self.prefixes:
            return self.first
        state = json.loads(self._backend.to_str())
        if _stop_prefixing(state.get("pre_tokenizer")):
            rest = SegmentTokenizer(Tokenizer.from_str(json.dumps(state)))
            if not rest.prefixes:
                return rest.first
        return self._anchored

    def _anchored(self, texts: list[str]) -> list[list[int]]:
        encodings = self._with_offsets.encode_batch([_ANCHORS[0] + t for t in texts], add_special_tokens=False)
        return [self._without_anchor(text, e) for text, e in zip(texts, encodings, strict=True)]

    def _without_anchor(self, text: str, encoding: Encoding) -> list[int]:
        """The ids behind the anchor, a character that takes the blank; it must not merge with what follows."""
        for anchor in _ANCHORS[1:]:
            if not any(start < 1 < end for start, end in encoding.offsets[:4]):
                break
            encoding = self._with_offsets.encode(anchor + text, add_special_tokens=False)
        first = next((i for i, (start, _) in enumerate(encoding.offsets) if start >= 1), len(encoding.ids))
        return list(encoding.ids[first:])

    @cached_property
    def _with_offsets(self) -> Tokenizer:
        """The tokenizer with offsets that count the blank in front of a word to the word's token.

        Some tokenizers (GPT-NeoX, RoBERTa) trim it off, which hides that a token crosses from the anchor.
        """
        state = json.loads(self._backend.to_str())
        state["post_processor"] = None
        return Tokenizer.from_str(json.dumps(state))


def exact(backend: Tokenizer) -> Tokenizer:
    """The tokenizer without truncation and padding, whose added tokens are matched in the text as it is written.

    Unless flagged special they are matched behind the normalizer, to some of which `＜｜end｜＞` is `<|end|>`.
    """
    backend.no_truncation()
    backend.no_padding()
    if backend.normalizer is None:
        return backend
    state = json.loads(backend.to_str())
    if not any(token["normalized"] for token in state["added_tokens"]):
        return backend
    state["added_tokens"] = [{**token, "normalized": False} for token in state["added_tokens"]]
    return Tokenizer.from_str(json.dumps(state))


def plain(backend: Tokenizer) -> Tokenizer:
    """The tokenizer without its added tokens: to it `<|im_end|>` is ten characters."""
    state = json.loads(backend.to_str())
    state["added_tokens"] = []
    state["post_processor"] = None
    return Tokenizer.from_str(json.dumps(state))


def _stop_prefixing(pre_tokenizer: Any) -> bool:
    """Has a pre-tokenizer that puts a blank before the first word put none; whether there was one."""
    if not isinstance(pre_tokenizer, dict):
        return False
    steps: Sequence[Any] = pre_tokenizer.get("pretokenizers", ())
    found = [_stop_prefixing(step) for step in steps]
    if pre_tokenizer.get("type") == "Metaspace" and pre_tokenizer.get("prepend_scheme") == "first":
        pre_tokenizer["prepend_scheme"] = "never"
        return True
    return any(found)
