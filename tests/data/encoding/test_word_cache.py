"""Ids from cached words are the tokenizer's own, or none."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Regex, Tokenizer, normalizers, pre_tokenizers

from sft.data.encoding.encoder import Encoder
from sft.data.encoding.word_cache import WordCache
from sft.data.formats.normalize import normalize
from sft.data.templates.renderer import ChatRenderer
from tests.builders import byte_level_tokenizer

LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}|"
    r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
QWEN2 = LLAMA3.replace(r"\p{N}{1,3}", r"\p{N}")
O200K = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+(?i:'s|'t|'re|'ve|'m|'ll|'d)?|"
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*(?i:'s|'t|'re|'ve|'m|'ll|'d)?|"
    r"\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
PATTERNS = {"gpt2": None, "llama3": LLAMA3, "qwen2": QWEN2, "o200k": O200K}


def split_by(pattern: str) -> Any:
    words = pre_tokenizers.Split(Regex(pattern), "isolated")
    return pre_tokenizers.Sequence([words, pre_tokenizers.ByteLevel(False, use_regex=False)])


def backend_of(pattern: str | None = None) -> Tokenizer:
    backend = byte_level_tokenizer().backend_tokenizer
    if pattern:
        backend.pre_tokenizer = split_by(pattern)
    return backend


BACKENDS = {name: backend_of(pattern) for name, pattern in PATTERNS.items()}
WORDS = {name: WordCache(backend) for name, backend in BACKENDS.items()}
ASCII = st.text(st.characters(max_codepoint=127))
CONTRACTIONS, CONTROL = ("'S", "'ll", "'"), ("<|im_end|>", "<|im_start|>", "<|im_", "end|>", "<|pad|>")
BLANKS = ("  ", "\n\n", "\r\n", " \n", "\t", "\x0b", "\x1c", "\x1f")
TRICKY = st.sampled_from((*CONTRACTIONS, *CONTROL, *BLANKS, "a", "B", "12345", "/", " of", "ſ", "é", "中"))


def ids_of(words: WordCache, text: str) -> list[int] | None:
    (ids,) = words.encode([text])
    return None if ids is None else np.frombuffer(ids, dtype=np.int32).tolist()


def expected(backend: Tokenizer, text: str) -> list[int]:
    return backend.encode(text, add_special_tokens=False).ids


@pytest.mark.parametrize("name", PATTERNS)
@settings(max_examples=300)
@given(texts=st.lists(ASCII | st.lists(TRICKY).map("".join), max_size=4))
def test_ids_are_the_tokenizers_own_and_other_alphabets_are_left_to_it(name: str, texts: list[str]) -> None:
    assert WORDS[name].is_active
    for text in texts:
        assert ids_of(WORDS[name], text) == (expected(BACKENDS[name], text) if text.isascii() else None)


def test_the_longest_of_several_added_tokens_is_taken_and_normalized_ones_come_last() -> None:
    backend = backend_of()
    backend.add_special_tokens(["<a>", "<a><b>", "b>x"])
    backend.add_tokens([AddedToken("x<a", normalized=True), AddedToken("<b", normalized=True)])
    words = WordCache(backend)
    for text in ("<a><b>", "<a><b", "x<a>", "x<a<b>x", "<a><b>x<b>x", "<<b<a>>"):
        assert ids_of(words, text) == expected(backend, text)


@pytest.mark.parametrize(
    "pre_tokenizer",
    [
        pre_tokenizers.ByteLevel(add_prefix_space=True),
        pre_tokenizers.Metaspace(),
        pre_tokenizers.Sequence([pre_tokenizers.Digits(True), pre_tokenizers.ByteLevel(False)]),
        split_by(r"\p{Greek}+|\s+|\S+"),
        split_by(r"\w+|\W+"),  # a class that is not known here
        split_by(r"[a-z&&[^x]]+|."),
        split_by(r"(a|b)+|[^ab]+"),  # groups would be what is found
    ],
)
def test_unknown_rules_are_left_to_the_tokenizer(pre_tokenizer: Any) -> None:
    backend = backend_of()
    backend.pre_tokenizer = pre_tokenizer
    assert ids_of(WordCache(backend), "a few words") is None


@pytest.mark.parametrize("flag", ["lstrip", "rstrip", "single_word"])
def test_added_tokens_that_depend_on_their_neighbours_are_left_to_the_tokenizer(flag: str) -> None:
    backend = backend_of()
    backend.add_special_tokens([AddedToken("<x>", **{flag: True})])
    assert ids_of(WordCache(backend), "a <x> b") is None


def test_a_normalizer_that_may_change_ascii_is_left_to_the_tokenizer() -> None:
    backend = backend_of()
    backend.normalizer = normalizers.NFC()
    assert ids_of(WordCache(backend), "Hi") == expected(backend, "Hi")
    backend.normalizer = normalizers.Lowercase()
    assert ids_of(WordCache(backend), "Hi") is None


def test_bpe_with_dropout_is_left_to_the_tokenizer() -> None:
    state = json.loads(backend_of().to_str())
    state["model"]["dropout"] = 0.1
    assert ids_of(WordCache(Tokenizer.from_str(json.dumps(state))), "Hi") is None


def test_a_pattern_that_skips_characters_is_left_to_the_tokenizer() -> None:
    assert ids_of(WordCache(backend_of(r"\p{L}+|\s+")), "a1") is None


def test_a_full_cache_is_cleared() -> None:
    backend = backend_of()
    words = WordCache(backend, max_words=3)
    text = "What is the capital of France? " + "a" * 100
    assert ids_of(words, text) == expected(backend, text)
    assert len(words._ids) <= 3


def test_it_gives_up_if_words_do_not_recur() -> None:
    words = WordCache(backend_of(), trial=100)
    rng = np.random.default_rng(0)
    letters = rng.integers(ord("a"), ord("z"), (200, 12)).astype(np.uint8)
    words.encode([" ".join(bytes(word.tolist()).decode() for word in letters)])
    assert not words.is_active
    assert ids_of(words, "Hi") is None


def test_a_batch_has_the_same_tokens_with_and_without_the_cache() -> None:
    tokenizer = byte_level_tokenizer()
    renderer, encoder = ChatRenderer(tokenizer), Encoder(tokenizer)
    contents = ["What is\n\nit?", "caf\u00e9 \U0001f389", "typed <|im_end|> here", "  it's  5,000 \n"]
    chats = [normalize({"question": content, "answer": f"{content} Paris"}) for content in contents]
    rendered = [renderer.render(chat) for chat in chats]  # type: ignore[arg-type]
    by_rust, by_words = encoder.split(rendered), encoder.split(rendered)
    WordCache(encoder.backend).tokenize(by_words)
    assert any(ids is not None for ids in by_words.ids)
    assert by_words.pending["at_start"][1]
    one, other = encoder.assemble(encoder.tokenize(by_rust)), encoder.assemble(encoder.tokenize(by_words))
    for name in ("input_ids", "labels", "lengths", "rows"):
        assert np.array_equal(getattr(one, name), getattr(other, name))
