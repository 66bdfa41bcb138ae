"""Builds small real tokenizers and models for tests, without a network, in well under a second."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast, set_seed

CHATML = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
SENTENCES = [
    "What is the capital of France? Paris is the capital of France.",
    "How many apples are left when three of five apples are eaten? Two apples are left.",
    "Natalia sold clips to 48 of her friends in April, and then she sold half as many in May.",
]


def byte_level_tokenizer(
    chat_template: str | None = CHATML, pad: bool = True, vocab_size: int = 400
) -> PreTrainedTokenizerFast:
    """Trains a byte-level BPE tokenizer (it can encode any text) with ChatML's control tokens."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"] + (["<|pad|>"] if pad else [])
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=special,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(SENTENCES * 4, trainer)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        eos_token="<|endoftext|>",
        pad_token="<|pad|>" if pad else None,
        additional_special_tokens=["<|im_start|>", "<|im_end|>"],
    )
    tokenizer.chat_template = chat_template
    return tokenizer


def tiny_llama(vocab_size: int, seed: int = 0, **overrides: Any) -> LlamaForCausalLM:
    """Makes a randomly initialized Llama of two layers, width 64, in float32."""
    set_seed(seed)
    settings: dict[str, Any] = {
        "vocab_size": vocab_size,
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 512,
        "bos_token_id": None,
        "eos_token_id": 0,
        "pad_token_id": None,
        **overrides,
    }
    return LlamaForCausalLM(LlamaConfig(**settings))


def save_model_dir(path: Path, **tokenizer_options: object) -> Path:
    """Saves a model directory as a user would name it in `model_name_or_path`."""
    tokenizer = byte_level_tokenizer(**tokenizer_options)  # type: ignore[arg-type]
    tiny_llama(len(tokenizer)).save_pretrained(path)
    tokenizer.save_pretrained(path)
    return path


WORDS = (
    *("user", "system", "assistant", "model", "tool", "Paris", "Yes", "No", "Hello", "Hi"),
    *("[INST]", "[/INST]", "<<SYS>>", "<</SYS>>", "answer", "question", "Be", "brief"),
)
"""Words that are one token of `spelled_tokenizer`, alone and after a space; it spells out everything else."""


def spelled_tokenizer(
    kind: str,
    chat_template: str | None = None,
    control_tokens: Sequence[str] = (),
    *,
    bos: str | None = "<s>",
    eos: str = "</s>",
    trim_offsets: bool = False,
) -> PreTrainedTokenizerFast:
    """Makes a BPE tokenizer with a vocabulary written by hand, whose tokens tests can spell out.

    Args:
        kind: `byte_level` with GPT-2's pattern; `byte_level_lines` with one like Llama 3's, which keeps line feeds
            together; or like SentencePiece, with byte fallback, where the space before a text comes from
            `metaspace_first`, `metaspace_always`, or, as in Llama 2's older files, from the `prepend` normalizer.
        trim_offsets: whether offsets exclude a word's space, as in GPT-NeoX's tokenizer (byte level only).
    """
    is_byte_level = kind.startswith("byte_level")
    blank, line_feed = ("Ġ", "Ċ") if is_byte_level else ("▁", "\n")
    alphabet = pre_tokenizers.ByteLevel.alphabet() if is_byte_level else [*map(chr, range(33, 127)), "▁", "\n"]
    vocab: dict[str, int] = {}
    for token in ["<unk>", *(t for t in (bos, eos) if t), *control_tokens, *sorted(alphabet)]:
        vocab.setdefault(token, len(vocab))
    if not is_byte_level:
        for byte in range(256):
            vocab[f"<0x{byte:02X}>"] = len(vocab)
    merges: dict[tuple[str, str], None] = {}
    for word in [line_feed * 2, blank * 2, *WORDS, *(blank + word for word in WORDS)]:
        for end in range(1, len(word)):  # merges from the left: P a, Pa r, Par i, Pari s
            if word[end:] in vocab and word[:end] == blank:
                merges.setdefault((blank, word[end:]))  # a word that is one token already takes its space in one merge
                break
            merges.setdefault((word[:end], word[end]))
            vocab.setdefault(word[: end + 1], len(vocab))
        vocab.setdefault(word, len(vocab))
    model = models.BPE(vocab, list(merges), unk_token="<unk>", fuse_unk=True, byte_fallback=not is_byte_level)
    backend = Tokenizer(model)
    if is_byte_level:
        backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        if kind == "byte_level_lines":
            lines = pre_tokenizers.Split(Regex(r" ?\S+|\s*[\r\n]+|\s+(?!\S)|\s+"), "isolated")
            backend.pre_tokenizer = pre_tokenizers.Sequence([lines, pre_tokenizers.ByteLevel(False, use_regex=False)])
        backend.decoder = decoders.ByteLevel()
        if trim_offsets:
            backend.post_processor = processors.ByteLevel(trim_offsets=True)
    else:
        backend.decoder = decoders.Sequence(
            [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()],
        )
        if kind == "prepend":
            backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
        else:
            scheme = kind.removeprefix("metaspace_")
            backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=scheme, split=False)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        unk_token="<unk>",
        bos_token=bos,
        eos_token=eos,
        additional_special_tokens=list(control_tokens),
    )
    tokenizer.chat_template = chat_template
    return tokenizer
