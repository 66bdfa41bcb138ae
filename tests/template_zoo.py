"""Chat templates in the manners of the model families, each with a tokenizer to match, for the tests of masks."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

from transformers import PreTrainedTokenizerFast

from tests.builders import spelled_tokenizer


@dataclass(frozen=True)
class Family:
    """One manner of writing conversations.

    Attributes:
        kind: the tokenizer's, see `spelled_tokenizer`.
        control_tokens: besides BOS and EOS.
        end: the text of the token that ends an answer.
        said: what the template makes of an answer's text, up to its end token.
        system: whether it takes a system message.
    """

    template: str
    end: str
    kind: str = "byte_level"
    control_tokens: tuple[str, ...] = ()
    bos: str | None = None
    eos: str = "</s>"
    said: Callable[[str], str] = str
    system: bool = True
    trim_offsets: bool = False


@cache
def tokenizer_of(name: str) -> PreTrainedTokenizerFast:
    """The family's tokenizer with its template; not to be changed."""
    family = FAMILIES[name]
    return spelled_tokenizer(
        family.kind,
        family.template,
        family.control_tokens,
        bos=family.bos,
        eos=family.eos,
        trim_offsets=family.trim_offsets,
    )


_CHATML = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
_LLAMA3 = (
    "{{ bos_token }}{% for m in messages %}<|start_header_id|>{{ m['role'] }}<|end_header_id|>\n\n"
    "{{ m['content'] | trim }}<|eot_id|>{% endfor %}"
    "{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}"
)
_LLAMA2 = (
    "{% set first = 1 if messages[0]['role'] == 'system' else 0 %}"
    "{% for m in messages[first:] %}"
    "{% if (m['role'] == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('turns must alternate') }}{% endif %}"
    "{% if m['role'] == 'user' %}{{ bos_token + '[INST] ' }}"
    "{% if first and loop.first %}{{ '<<SYS>>\n' + messages[0]['content'] + '\n<</SYS>>\n\n' }}{% endif %}"
    "{{ m['content'] + ' [/INST]' }}"
    "{% else %}{{ ' ' + m['content'] + ' ' + eos_token }}{% endif %}{% endfor %}"
)
_GEMMA = (
    "{{ bos_token }}{% for m in messages %}"
    "{% if m['role'] == 'system' %}{{ raise_exception('no system messages') }}{% endif %}"
    "<start_of_turn>{{ 'model' if m['role'] == 'assistant' else m['role'] }}\n{{ m['content'] | trim }}<end_of_turn>\n"
    "{% endfor %}{% if add_generation_prompt %}<start_of_turn>model\n{% endif %}"
)
_PHI3 = (
    "{% for m in messages %}<|{{ m['role'] }}|>\n{{ m['content'] }}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% else %}{{ eos_token }}{% endif %}"
)
_ZEPHYR = (
    "{% for m in messages %}{% if m['role'] in ('system', 'user', 'assistant') %}"
    "<|{{ m['role'] }}|>\n{{ m['content'] }}{{ eos_token }}\n{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
)
# Thoughts stay in the last turn only, as Qwen3's template has it.
_THINKING = (
    "{% for m in messages %}"
    "{% set text = m['content'] %}"
    "{% if '</think>' in text and not loop.last %}{% set text = text.split('</think>')[-1].lstrip('\n') %}{% endif %}"
    "<|im_start|>{{ m['role'] }}\n{{ text }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
# Plain words as headers: the prompt ends with a blank, which byte pairs merge with the answer's first word.
_WORDS = (
    "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}{{ eos_token if m['role'] == 'assistant' else '\n' }}"
    "{% endfor %}{% if add_generation_prompt %}assistant: {% endif %}"
)
_LLAMA3_TOKENS = ("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>")
_CHATML_TOKENS = ("<|im_start|>", "<|im_end|>")

FAMILIES = {
    "chatml": Family(_CHATML, "<|im_end|>", control_tokens=_CHATML_TOKENS, eos="<|endoftext|>"),
    "llama3": Family(
        _LLAMA3,
        "<|eot_id|>",
        "byte_level_lines",
        control_tokens=_LLAMA3_TOKENS,
        bos="<|begin_of_text|>",
        eos="<|end_of_text|>",
        said=str.strip,
    ),
    # The same with GPT-2's pattern, by which the line feeds at a prompt's end are one token, and two before a word.
    "gpt2_lines": Family(
        _LLAMA3.replace("{{ bos_token }}", ""), "<|eot_id|>", control_tokens=_LLAMA3_TOKENS, said=str.strip
    ),
    "llama2_legacy": Family(_LLAMA2, "</s>", "prepend", bos="<s>", said=lambda text: f" {text} "),
    "llama2": Family(_LLAMA2, "</s>", "metaspace_first", bos="<s>", said=lambda text: f" {text} "),
    "llama2_always": Family(_LLAMA2, "</s>", "metaspace_always", bos="<s>", said=lambda text: f" {text} "),
    "gemma": Family(
        _GEMMA,
        "<end_of_turn>",
        "metaspace_first",
        control_tokens=("<start_of_turn>", "<end_of_turn>"),
        bos="<bos>",
        eos="<eos>",
        said=str.strip,
        system=False,
    ),
    "phi3": Family(
        _PHI3,
        "<|end|>",
        "prepend",
        control_tokens=("<|system|>", "<|user|>", "<|assistant|>", "<|end|>"),
        eos="<|endoftext|>",
    ),
    "zephyr": Family(_ZEPHYR, "</s>", "metaspace_first"),
    "thinking": Family(_THINKING, "<|im_end|>", control_tokens=_CHATML_TOKENS, eos="<|endoftext|>"),
    "words": Family(_WORDS, "</s>"),
    "words_trimmed_offsets": Family(_WORDS, "</s>", trim_offsets=True),
    "words_metaspace": Family(_WORDS, "</s>", "metaspace_first"),
    "words_metaspace_always": Family(_WORDS, "</s>", "metaspace_always"),
    "words_prepend": Family(_WORDS, "</s>", "prepend"),
}
