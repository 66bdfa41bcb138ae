"""Token ids put together from words whose ids are known, where that is certain to be what the tokenizer would say.

A byte-level BPE cuts a text at its added tokens, the rest into words by a regular expression, and then encodes each
word on its own:

    <|im_end|>\\nHow many apples   →   <|im_end|> | \\n | How | ␣many | ␣apples
                                          1         3   21     17      98 4

So a text's ids are its words' ids, one behind the other, and words recur. Of a text in ASCII Python finds the words
with the tokenizer's own expression, in a quarter of the time that the Rust tokenizer takes for all of it; ids that are
not remembered come from the tokenizer's own BPE. Everything else (other alphabets, SentencePiece, pre-tokenizers of
other kinds) is left to the Rust tokenizer: no id is ever guessed.
"""

from __future__ import annotations

import json
import re
from array import array
from collections.abc import Iterator, Sequence
from itertools import product
from typing import Any

from tokenizers import Tokenizer, models, pre_tokenizers

ID_BYTES = 4  # ids are int32 in the machine's byte order, as `array("i")` and numpy's int32 have them

_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"  # what `ByteLevel` cuts by
# Classes as far as they go in ASCII. No letter of it is of the kinds Lt, Lm, Lo, and no character is a mark.
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
    r"\s": r"\t-\r ",  # Unicode's white space; Python's own \s takes the separators 1C to 1F too
}
_ATOM = re.compile(r"\\p\{\w+\}|\\.|\[\^?|.", re.DOTALL)
_UNCHANGED_BY = {None, "NFC", "NFD", "NFKC", "NFKD"}  # normalizers to which a text in ASCII is as it should be
_MOST_WORDS = 1 << 16  # some 10 MB
_LONGEST = 24  # characters; longer words seldom recur
_TRIAL = 1 << 20  # ids, after which it must have shown that words recur


class WordIds:
    """Encodes texts in ASCII word by word.

    Args:
        backend: of the tokenizer, without truncation and padding.
    """

    def __init__(self, backend: Tokenizer) -> None:
        rules = _rules(backend)
        self._words: re.Pattern[str] | None = None
        if rules is None:
            return
        pattern, kinds = rules
        if _cuts_alike(pattern, backend):
            self._words = pattern
            self._separators = [
                re.compile("(" + "|".join(map(re.escape, sorted(kind, key=len, reverse=True))) + ")") for kind in kinds
            ]
            ids = {token.content: number for number, token in backend.get_added_tokens_decoder().items()}
            self._added = {token: packed([ids[token]]) for kind in kinds for token in kind}
            self._known = _Known(backend)

    @property
    def is_worthwhile(self) -> bool:
        """Whether words can be told apart here, and do recur: of random letters each would be looked up in vain."""
        return self._words is not None and (self._known.given < _TRIAL or self._known.misses * 32 < self._known.given)

    def encode(self, texts: Sequence[str]) -> list[bytes | None]:
        """The ids of each text as int32; None of one that is not in ASCII, or is cut by an unknown rule."""
        if not self.is_worthwhile:
            return [None] * len(texts)
        ids = [self._ids(text) if text.isascii() else None for text in texts]
        self._known.given += sum(len(one) for one in ids if one) // ID_BYTES
        return ids

    def _ids(self, text: str) -> bytes:
        find, known, added = self._words.findall, self._known.__getitem__, self._added  # type: ignore[union-attr]
        pieces = [text]
        for separator in self._separators:
            pieces = [p for piece in pieces for p in ([piece] if piece in added else separator.split(piece))]
        return b"".join([added[p] if p in added else b"".join(map(known, find(p))) for p in pieces if p])


class _Known(dict[str, bytes]):
    """The ids of words as int32; one that is not there yet is encoded by the tokenizer's model."""

    def __init__(self, backend: Tokenizer) -> None:
        super().__init__()
        self._tokenize = backend.model.tokenize
        self._spell = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False).pre_tokenize_str
        self.misses = self.given = 0

    def __missing__(self, word: str) -> bytes:
        self.misses += 1
        ids = packed([token.id for token in self._tokenize(self._spell(word)[0][0])])
        if len(word) <= _LONGEST:
            if len(self) >= _MOST_WORDS:
                self.clear()
            self[word] = ids
        return ids


def packed(ids: list[int]) -> bytes:
    """Ids as int32."""
    return array("i", ids).tobytes()


def _rules(backend: Tokenizer) -> tuple[re.Pattern[str], list[list[str]]] | None:
    """What a text in ASCII is cut by: the words' pattern, and the added tokens in the order in which they are sought.

    None where the tokenizer has a rule that is not known here.
    """
    normalizer, model, added = _state(backend.normalizer), backend.model, backend.get_added_tokens_decoder().values()
    source = _word_pattern(_state(backend.pre_tokenizer))
    pattern = _in_ascii(source) if source else None
    if (
        pattern is None
        or (normalizer and normalizer["type"]) not in _UNCHANGED_BY
        or not isinstance(model, models.BPE)
        or model.dropout  # then the same word has other ids each time
        or backend.encode_special_tokens
        or any(t.lstrip or t.rstrip or t.single_word or not t.content for t in added)
    ):
        return None
    # Those that are sought in the text as it is written come before those sought in the normalized text.
    kinds = [[t.content for t in added if t.normalized is normalized] for normalized in (False, True)]
    return pattern, [kind for kind in kinds if kind]


def _state(part: Any) -> Any:
    """A normalizer or pre-tokenizer as tokenizer.json has it."""
    return None if part is None else json.loads(part.__getstate__())


def _word_pattern(pre_tokenizer: Any) -> str | None:
    """The expression by which a byte-level pre-tokenizer cuts words; None of one that does anything else."""
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
    """An expression of the Rust tokenizer in Python's spelling, for texts in ASCII; None where a part is not known."""
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
    """Whether the pattern and the tokenizer cut a text that holds every three kinds of characters in a row alike."""
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
