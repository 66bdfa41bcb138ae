"""Tokenizes ASCII texts in Python from cached words, while the Rust tokenizer is busy; the ids are the same.

A byte-level BPE cuts a text at its added tokens, cuts the rest into words by a regular expression, and tokenizes each
word on its own:

    <|im_end|>\\nHow many apples   →   <|im_end|> | \\n | How | ␣many | ␣apples
                                          1         3   21     17      98 4

So the ids of a text are the ids of its words, and words recur. In an ASCII text Python finds the words with the
tokenizer's own expression, in a quarter of the time that the Rust tokenizer takes for the whole text; ids that are not
cached come from the tokenizer's own BPE. Everything else (other alphabets, SentencePiece, other pre-tokenizers) is left
to the Rust tokenizer: no id is ever guessed.

`WordCache.tokenize` is all that other modules use, and nothing but speed depends on it.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from itertools import product
from typing import Any

from tokenizers import Tokenizer, models, pre_tokenizers

from sft.data.encoding.encoder import ID_BYTES, Batch, as_int32

_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"  # of `ByteLevel`
# The ASCII part of each class. ASCII has no letters of the kinds Lt, Lm and Lo, and no marks.
_CLASSES = {
    r"\p{L}": "A-Za-z",
    r"\p{Lu}": "A-Z",
    r"\p{Ll}": "a-z",
    r"\p{Lt}": "",
    r"\p{Lm}": "",
    r"\p{Lo}": "",
    r"\p{M}": "",
    r"\p{N}": "0-9",
    r"\d": "0-9",
    r"\s": r"\t-\r ",  # Unicode's white space; Python's own \s also matches the separators 1C to 1F
}
_ATOM = re.compile(r"\\p\{\w+\}|\\.|\[\^?|.", re.DOTALL)
_ASCII_SAFE = {None, "NFC", "NFD", "NFKC", "NFKD"}  # normalizers that do not change ASCII
# Methods of `SegmentTokenizer`; all do the same for tokenizers whose rules are known, which put no blank before a text.
_METHODS = ("at_start", "after_token", "after_text")
_MAX_LENGTH = 24  # characters; longer words seldom recur


class WordCache:
    """Tokenizes ASCII texts word by word.

    Args:
        backend: of the tokenizer, without truncation and padding.
        max_words: words in the cache, about 10 MB; a full one is cleared.
        trial: ids after which it is given up unless words have recurred.
    """

    def __init__(self, backend: Tokenizer, max_words: int = 1 << 16, trial: int = 1 << 20) -> None:
        self._trial = trial
        rules = _rules(backend)
        self._pattern: re.Pattern[str] | None = None
        if rules is None:
            return
        pattern, kinds = rules
        if _cuts_alike(pattern, backend):
            self._pattern = pattern
            self._separators = [
                re.compile("(" + "|".join(map(re.escape, sorted(kind, key=len, reverse=True))) + ")") for kind in kinds
            ]
            ids = {token.content: number for number, token in backend.get_added_tokens_decoder().items()}
            self._added = {token: as_int32([ids[token]]) for kind in kinds for token in kind}
            self._ids = _WordIds(backend, max_words)

    @property
    def is_active(self) -> bool:
        """Whether the tokenizer's rules are known, and words recur (random letters do not)."""
        return self._pattern is not None and (self._ids.given < self._trial or self._ids.misses * 32 < self._ids.given)

    def tokenize(self, batch: Batch) -> None:
        """Tokenizes the pending segments of a batch that are ASCII; the others stay pending."""
        for method in _METHODS:
            if method in batch.pending and self.is_active:
                indices, texts = batch.pending[method]
                for index, ids in zip(indices, self.encode(texts), strict=True):
                    batch.ids[index] = ids
                left = [i for i, index in enumerate(indices) if batch.ids[index] is None]
                batch.pending[method] = [indices[i] for i in left], [texts[i] for i in left]

    def encode(self, texts: Sequence[str]) -> list[bytes | None]:
        """Returns the ids of each text as int32; None if it is not ASCII, or the tokenizer has an unknown rule."""
        if not self.is_active:
            return [None] * len(texts)
        ids = [self._encode(text) if text.isascii() else None for text in texts]
        self._ids.given += sum(len(one) for one in ids if one) // ID_BYTES
        return ids

    def _encode(self, text: str) -> bytes:
        find, known, added = self._pattern.findall, self._ids.__getitem__, self._added  # type: ignore[union-attr]
        pieces = [text]
        for separator in self._separators:
            pieces = [p for piece in pieces for p in ([piece] if piece in added else separator.split(piece))]
        return b"".join([added[p] if p in added else b"".join(map(known, find(p))) for p in pieces if p])


class _WordIds(dict[str, bytes]):
    """Ids of words as int32; the tokenizer's model tokenizes a word that is missing."""

    def __init__(self, backend: Tokenizer, max_words: int) -> None:
        super().__init__()
        self._max_words = max_words
        self._tokenize = backend.model.tokenize
        self._spell = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False).pre_tokenize_str
        self.misses = self.given = 0

    def __missing__(self, word: str) -> bytes:
        self.misses += 1
        ids = as_int32([token.id for token in self._tokenize(self._spell(word)[0][0])])
        if len(word) <= _MAX_LENGTH:
            if len(self) >= self._max_words:
                self.clear()
            self[word] = ids
        return ids


def _rules(backend: Tokenizer) -> tuple[re.Pattern[str], list[list[str]]] | None:
    """Returns what cuts an ASCII text: the pattern of words, and the added tokens in the order they are searched for.

    None if the tokenizer has any other rule.
    """
    normalizer, model, added = _state(backend.normalizer), backend.model, backend.get_added_tokens_decoder().values()
    source = _word_pattern(_state(backend.pre_tokenizer))
    pattern = _in_ascii(source) if source else None
    if (
        pattern is None
        or (normalizer and normalizer["type"]) not in _ASCII_SAFE
        or not isinstance(model, models.BPE)
        or model.dropout  # then the same word has other ids each time
        or backend.encode_special_tokens
        or any(t.lstrip or t.rstrip or t.single_word or not t.content for t in added)
    ):
        return None
    # Tokens matched in the text as it is written come before those matched in the normalized text.
    kinds = [[t.content for t in added if t.normalized is normalized] for normalized in (False, True)]
    return pattern, [kind for kind in kinds if kind]


def _state(part: Any) -> Any:
    """Returns a normalizer or pre-tokenizer as in tokenizer.json."""
    return None if part is None else json.loads(part.__getstate__())


def _word_pattern(pre_tokenizer: Any) -> str | None:
    """Returns the expression by which a byte-level pre-tokenizer cuts words; None if it does anything else."""
    match pre_tokenizer:
        case {"type": "ByteLevel", "add_prefix_space": False, "use_regex": True}:
            return _GPT2
        case {
            "type": "Sequence",
            "pretokenizers": [
                {"type": "Split", "pattern": {"Regex": str(source)}, "behavior": "Isolated", "invert": False},
                {"type": "ByteLevel", "add_prefix_space": False, "use_regex": False},
            ],
        }:
            return source
    return None


def _in_ascii(source: str) -> re.Pattern[str] | None:
    """Translates an expression of the Rust tokenizer to Python's syntax, for ASCII; None if a part is not known."""
    spelled: list[str] = []
    is_inside = False
    for atom in _ATOM.findall(source):
        if atom[0] == "[":
            if is_inside:  # a class within a class
                return None
            is_inside = True
        elif atom == "]":
            is_inside = False
        elif atom == r"\S":
            if is_inside:
                return None
            atom = rf"[^{_CLASSES[chr(92) + 's']}]"
        elif atom in _CLASSES:
            inner = _CLASSES[atom]
            if not (is_inside or inner):
                return None
            atom = inner if is_inside else f"[{inner}]"
        elif (len(atom) > 1 and atom not in (r"\r", r"\n", r"\t", r"\/")) or atom in "^$.":
            return None
        spelled.append(atom)
    # `{1,3}+` repeats for Oniguruma and is possessive for Python.
    text = "".join(spelled)
    if "}+" in text or "&&" in text or "[]" in text or "[^]" in text:
        return None
    try:
        found = re.compile(text, re.ASCII)
    except re.error:
        return None
    return found if found.groups == 0 else None


def _cuts_alike(pattern: re.Pattern[str], backend: Tokenizer) -> bool:
    """Whether the pattern and the tokenizer cut alike, on a text with every sequence of three kinds of characters."""
    probe = "".join(_probe())
    spell = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False).pre_tokenize_str
    cut = [piece for piece, _ in backend.pre_tokenizer.pre_tokenize_str(probe)]  # type: ignore[union-attr]
    words = pattern.findall(probe)
    return "".join(words) == probe and cut == [spell(word)[0][0] for word in words]


def _probe() -> Iterator[str]:
    kinds = "aS1' \n\r\t.-_/<\x0b\x1c\x00"
    yield from ("".join(three) for three in product(kinds, repeat=3))
    yield from (f"x{end}{after}" for end in ("'s", "'T", "'re", "'VE", "'m", "'Ll", "'d") for after in ("a", "1", " "))
    yield from (f"{before}{chr(code)}{before}" for code in range(128) for before in ("a", " ", "1", ".", "\n"))
