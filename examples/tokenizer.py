"""The tokenizer of the example model: whole words it knows, and single characters for all else.

A byte-level BPE with no merges at all: a piece of text that is in the vocabulary as it stands is one token
(`ignore_merges`), and any other piece falls to its bytes. So sentences are short, a made-up word or a number is read
letter by letter, which is what string tasks need, and every text can be written and read back.
"""

from __future__ import annotations

import re
from collections.abc import Iterable

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


def known_pieces(sentences: Iterable[str]) -> list[str]:
    """The words of `sentences` as byte-level symbols, sorted; the first of each also as it is after a space.

    Letters that stand alone are left out: as an answer they must be the same token as within a word.
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
    """Builds the tokenizer that knows the words of `sentences`.

    The end of a turn is also the end of a document: `<|im_end|>` is the EOS. Pretraining on plain text, which ends each
    document with it, has so taught the base model to end before tuning teaches it when. LoRA trains no embedding, and
    a control token that was never a target would stay out of its reach. `<|im_start|>` is only read, never predicted.

    Args:
        sentences: texts whose words become tokens.
        max_length: `model_max_length`, in tokens.
    """
    symbols = [*CONTROL_TOKENS, *sorted(pre_tokenizers.ByteLevel.alphabet()), *known_pieces(sentences)]
    vocabulary = {symbol: index for index, symbol in enumerate(dict.fromkeys(symbols))}
    backend = Tokenizer(models.BPE(vocab=vocabulary, merges=[], ignore_merges=True))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        pad_token=PAD,
        eos_token=END,
        additional_special_tokens=[START],
        model_max_length=max_length,
        clean_up_tokenization_spaces=False,
    )
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer
