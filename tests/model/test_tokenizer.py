"""Special tokens and the pad token."""

from __future__ import annotations

import pytest

from sft.errors import UserError
from sft.model.tokenizer import add_special_tokens, set_pad_token
from tests.builders import byte_level_tokenizer


def test_the_tokenizers_own_pad_token_stays() -> None:
    tokenizer = byte_level_tokenizer(pad=True)
    assert "own" in set_pad_token(tokenizer)
    assert tokenizer.pad_token == "<|pad|>"


def test_a_pad_like_token_in_the_vocabulary_is_preferred() -> None:
    tokenizer = byte_level_tokenizer(pad=True)
    tokenizer.pad_token = None
    size = len(tokenizer)
    set_pad_token(tokenizer)
    assert tokenizer.pad_token == "<|pad|>"
    assert len(tokenizer) == size


def test_the_unknown_token_comes_before_eos_but_not_when_it_is_eos() -> None:
    tokenizer = byte_level_tokenizer(pad=False)
    tokenizer.unk_token = "<|im_start|>"
    set_pad_token(tokenizer)
    assert tokenizer.pad_token == "<|im_start|>"
    tokenizer = byte_level_tokenizer(pad=False)
    tokenizer.unk_token = tokenizer.eos_token
    assert "EOS is still trained" in set_pad_token(tokenizer)
    assert tokenizer.pad_token == tokenizer.eos_token


def test_no_token_is_added_for_padding() -> None:
    tokenizer = byte_level_tokenizer(pad=False)
    size = len(tokenizer)
    set_pad_token(tokenizer)
    assert (tokenizer.pad_token, len(tokenizer)) == ("<|endoftext|>", size)


def test_a_tokenizer_without_any_such_token_is_an_error() -> None:
    tokenizer = byte_level_tokenizer(pad=False)
    tokenizer.eos_token = None
    with pytest.raises(UserError, match="cannot be padded") as caught:
        set_pad_token(tokenizer)
    assert caught.value.problems[0].key == "special_tokens"


def test_added_tokens_are_single_and_only_new_ones_are_reported() -> None:
    tokenizer = byte_level_tokenizer()
    size = len(tokenizer)
    assert add_special_tokens(tokenizer, ["<|im_end|>", "<|tool|>"]) == ("<|tool|>",)
    assert len(tokenizer) == size + 1
    assert tokenizer.encode("a<|tool|>b", add_special_tokens=False)[1] == size


def test_a_mapping_names_the_slots_of_tokens() -> None:
    tokenizer = byte_level_tokenizer()
    assert add_special_tokens(tokenizer, {"eos_token": "<|im_end|>", "additional_special_tokens": ["<|x|>"]}) == (
        "<|x|>",
    )
    assert tokenizer.eos_token == "<|im_end|>"
    assert len(tokenizer.encode("<|im_start|>", add_special_tokens=False)) == 1


def test_wrong_slots_and_values_are_all_reported() -> None:
    with pytest.raises(UserError) as caught:
        add_special_tokens(byte_level_tokenizer(), {"eso_token": "x", "eos_token": ["<|a|>"]})
    assert [p.key for p in caught.value.problems] == ["special_tokens.eso_token", "special_tokens.eos_token"]
