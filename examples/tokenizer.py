"""The tokenizer of the example model: one token for each word of its sentences, single bytes for everything else.

A byte-level BPE without merges: a word that is in the vocabulary is one token (`ignore_merges`), and any other word is
split into its bytes. So sentences are short, a made-up word or a number is read letter by letter, as string tasks need,
and every text can be encoded and decoded without loss.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any

from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

PAD, START, END = "<|endoftext|>", "<|im_start|>", "<|im_end|>"
CONTROL_TOKENS = (PAD, START, END)
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n"
    "{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def list_words(sentences: Iterable[str]) -> list[str]:
    """Returns the words of `sentences` as byte-level symbols, sorted; the first word of each also with a space before.

    Single letters are excluded: as an answer they must be the same token as within a word.
    """
    splitter = pre_tokenizers.ByteLevel(add_prefix_space=False)
    pieces = {
        piece
        for sentence in sentences
        for text in (sentence, f" {sentence}")
        for piece, _ in splitter.pre_tokenize_str(text)
    }
    return sorted(piece for piece in pieces if re.fullmatch("Ġ?[A-Za-z]{2,}", piece))


def build_tokenizer(sentences: Iterable[str], max_length: int) -> PreTrainedTokenizerFast:
    """Builds the tokenizer whose tokens are the words of `sentences`.

    `<|im_end|>` ends a turn and is the EOS. Pretraining ends each document with it, so the base model has learned to
    predict it. LoRA trains no embeddings, and could hardly teach a token that was never a target. `<|im_start|>` is
    only read, never predicted.

    Args:
        sentences: texts whose words become tokens.
        max_length: `model_max_length`, in tokens.
    """
    symbols = [*CONTROL_TOKENS, *sorted(pre_tokenizers.ByteLevel.alphabet()), *list_words(sentences)]
    vocabulary = {symbol: index for index, symbol in enumerate(dict.fromkeys(symbols))}
    backend = Tokenizer(models.BPE(vocab=vocabulary, merges=[], ignore_merges=True))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    return with_chat_template(backend, model_max_length=max_length, clean_up_tokenization_spaces=False)


def with_chat_template(backend: Tokenizer, **settings: Any) -> PreTrainedTokenizerFast:
    """Wraps a tokenizer that has the control tokens, and gives it ChatML's template."""
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token=PAD, eos_token=END, additional_special_tokens=[START], **settings
    )
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer
