"""Chat templates like those of the model families, each with a matching tokenizer, for the tests of masks."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import pytest
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from sft.data.encoding.encoder import Encoder
from sft.data.templates.renderer import ChatRenderer
from tests.builders import spelled_tokenizer
from tests.conftest import SHARED_DATA


@dataclass(frozen=True)
class Family:
    """One way of writing conversations.

    Attributes:
        kind: kind of the tokenizer, see `spelled_tokenizer`.
        control_tokens: control tokens besides BOS and EOS.
        added: added tokens that are not flagged special.
        file: a real SentencePiece model in the folder of shared data, instead of a spelled tokenizer.
        end: the text of the token that ends an answer.
        said: what the template makes of an answer's text, up to its end token.
        said_last: the same for the last answer of a conversation, if that differs.
        system: whether it supports a system message.
        rewrites: whether an answer is rendered differently once others follow it.
        tools: whether it supports tools and calls.
        moves: whether a system message and tools move to the last question.
    """

    template: str
    end: str
    kind: str = "byte_level"
    control_tokens: tuple[str, ...] = ()
    bos: str | None = None
    eos: str = "</s>"
    said: Callable[[str], str] = str
    said_last: Callable[[str], str] | None = None
    system: bool = True
    tools: bool = False
    rewrites: bool = False
    moves: bool = False
    trim_offsets: bool = False
    added: tuple[str, ...] = ()
    file: str | None = None

    def answers(self, texts: Sequence[str]) -> list[str]:
        """Returns what is trained of a conversation with these answers, each after a question."""
        last = self.said_last or self.said
        return [self.said(text) + self.end for text in texts[:-1]] + [last(text) + self.end for text in texts[-1:]]


@cache
def tokenizer_of(name: str) -> PreTrainedTokenizerFast:
    """Returns the family's tokenizer with its template; it is cached and must not be changed."""
    family = FAMILIES[name]
    if family.file:
        tokenizer = _sentencepiece_tokenizer(family)
    else:
        tokenizer = spelled_tokenizer(
            family.kind,
            family.template,
            family.control_tokens,
            bos=family.bos,
            eos=family.eos,
            trim_offsets=family.trim_offsets,
        )
    tokenizer.add_tokens(list(family.added))
    return tokenizer


@cache
def renderer_of(name: str) -> ChatRenderer:
    """Returns the family's renderer; cached, because it tries the template."""
    return ChatRenderer(tokenizer_of(name))


@cache
def encoder_of(name: str) -> Encoder:
    """Returns the family's encoder; cached, because it reads the vocabulary."""
    return Encoder(tokenizer_of(name))


def _sentencepiece_tokenizer(family: Family) -> PreTrainedTokenizerFast:
    """Makes a tokenizer from the model's vocabulary that prepends spaces as the family's fast tokenizer does."""
    file = SHARED_DATA / "tokenizers" / str(family.file)
    if not file.is_file():
        pytest.skip("the real vocabularies are only available on development machines")
    pytest.importorskip("sentencepiece")
    from transformers.convert_slow_tokenizer import SentencePieceExtractor

    parts: Any = SentencePieceExtractor(str(file)).extract(None)
    model = models.BPE(parts["vocab"], parts["merges"], unk_token="<unk>", fuse_unk=True, byte_fallback=True)
    backend = Tokenizer(model)
    if family.kind == "prepend":
        backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    else:
        backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    backend.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token=family.bos,
        eos_token=family.eos,
        unk_token="<unk>",
        additional_special_tokens=list(family.control_tokens),
    )
    tokenizer.chat_template = family.template
    return tokenizer


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
# Qwen 2.5: a system prompt of its own, tools under it, tool results together in a user's turn.
_CHATML_HEAD = (
    "{% set has_system = messages and messages[0]['role'] == 'system' %}"
    "{% if has_system or tools or DEFAULT %}<|im_start|>system\n"
    "{{ messages[0]['content'] if has_system else DEFAULT }}"
    "{% if tools %}{{ '\n<tools>' }}{% for t in tools %}{{ '\n' + (t['function'] | tojson) }}{% endfor %}"
    "{{ '\n</tools>' }}{% endif %}{{ '<|im_end|>\n' }}{% endif %}"
)
_CHATML_TOOL = (
    "{% if loop.previtem is undefined or loop.previtem['role'] != 'tool' %}<|im_start|>user{% endif %}"
    "{{ '\n<tool_response>\n' + m['content'] + '\n</tool_response>' }}"
    "{% if loop.nextitem is undefined or loop.nextitem['role'] != 'tool' %}{{ '<|im_end|>\n' }}{% endif %}"
)
_CHATML_CALLS = (
    "{% for c in m['tool_calls'] or [] %}{{ '\n' if m['content'] or not loop.first }}"
    "{{ '<tool_call>\n' + (c['function'] | tojson) + '\n</tool_call>' }}{% endfor %}"
)
_QWEN25 = (
    _CHATML_HEAD.replace("DEFAULT", "'Be assistant'")
    + "{% for m in (messages[1:] if has_system else messages) %}{% if m['role'] == 'tool' %}"
    + _CHATML_TOOL
    + "{% else %}{% set text = m['content'] %}{{ '<|im_start|>' + m['role'] + '\n' + text }}"
    + _CHATML_CALLS
    + "{{ '<|im_end|>\n' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
# Qwen 3: thoughts stay behind the last question only, and the last answer has a block for them even if it is empty.
_QWEN3 = (
    _CHATML_HEAD.replace("DEFAULT", "''")
    + "{% set last = namespace(question=-1) %}{% for m in messages %}{% if m['role'] == 'user' %}"
    "{% set last.question = loop.index0 - (1 if has_system else 0) %}{% endif %}{% endfor %}"
    "{% for m in (messages[1:] if has_system else messages) %}{% if m['role'] == 'tool' %}"
    + _CHATML_TOOL
    + "{% else %}{% set text = m['content'] %}{% set thought = m['reasoning_content'] or '' %}"
    "{% if m['role'] == 'assistant' and '</think>' in text and not thought %}"
    "{% set thought = text.split('</think>')[0].split('<think>')[-1] %}"
    "{% set text = text.split('</think>')[-1].lstrip('\n') %}{% endif %}"
    "{% if m['role'] == 'assistant' and loop.index0 > last.question and (loop.last or thought) %}"
    "{% set text = '<think>\n' + thought.strip('\n') + '\n</think>\n\n' + text.lstrip('\n') %}{% endif %}"
    "{{ '<|im_start|>' + m['role'] + '\n' + text }}" + _CHATML_CALLS + "{{ '<|im_end|>\n' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
# Llama 3.1: a system header always, tools in the first question, one call a turn, results from `ipython`.
_LLAMA31 = (
    "{% set has_system = messages and messages[0]['role'] == 'system' %}"
    "{{ bos_token + '<|start_header_id|>system<|end_header_id|>\n\n' }}"
    "{{ 'Environment: ipython\n' if tools }}{{ messages[0]['content'] | trim if has_system }}<|eot_id|>"
    "{% for m in (messages[1:] if has_system else messages) %}"
    "{{ '<|start_header_id|>' + ('ipython' if m['role'] == 'tool' else m['role']) + '<|end_header_id|>\n\n' }}"
    "{% if tools and loop.first and m['role'] == 'user' %}"
    "{% for t in tools %}{{ (t['function'] | tojson) + '\n\n' }}{% endfor %}{% endif %}"
    "{% if m['tool_calls'] %}{% if m['tool_calls'] | length != 1 %}{{ raise_exception('one call a turn') }}{% endif %}"
    "{% set call = m['tool_calls'][0]['function'] %}"
    "{{ '{\"name\": \"' + call['name'] + '\", \"parameters\": ' + (call['arguments'] | tojson) + '}' }}"
    "{% else %}{{ m['content'] | trim }}{% endif %}<|eot_id|>{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
)
# Gemma 3: a system message becomes the beginning of the first question.
_GEMMA_FOLDED = (
    "{{ bos_token }}{% set has_system = messages and messages[0]['role'] == 'system' %}"
    "{% for m in (messages[1:] if has_system else messages) %}"
    "<start_of_turn>{{ 'model' if m['role'] == 'assistant' else m['role'] }}\n"
    "{{ messages[0]['content'] + '\n\n' if has_system and loop.first }}{{ m['content'] | trim }}<end_of_turn>\n"
    "{% endfor %}{% if add_generation_prompt %}<start_of_turn>model\n{% endif %}"
)
_PHI4 = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}<|im_sep|>{{ m['content'] }}<|im_end|>{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant<|im_sep|>{% endif %}"
)
# DeepSeek: bars of full width, a system prompt without a header, thoughts cut off everywhere, and no header in front
# of an answer that follows a tool's result.
_DEEPSEEK = (
    "{{ bos_token }}{% for m in messages if m['role'] == 'system' %}{{ m['content'] }}{% endfor %}"
    "{% for t in tools or [] %}{{ '\n' + (t['function'] | tojson) }}{% endfor %}"
    "{% for m in messages if m['role'] != 'system' %}"
    "{% if m['role'] == 'user' %}<｜User｜>{{ m['content'] }}"
    "{% elif m['role'] == 'tool' %}<｜tool▁output▁begin｜>{{ m['content'] }}<｜tool▁output▁end｜>"
    "{% else %}{% if loop.previtem is undefined or loop.previtem['role'] != 'tool' %}<｜Assistant｜>{% endif %}"
    "{{ m['content'].split('</think>')[-1] }}"
    "{% for c in m['tool_calls'] or [] %}<｜tool▁call▁begin｜>{{ c['function']['name'] }}<｜tool▁sep｜>"
    "{{ c['function']['arguments'] | tojson }}<｜tool▁call▁end｜>{% endfor %}{{ eos_token }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt and not (messages and messages[-1]['role'] == 'tool') %}<｜Assistant｜>{% endif %}"
)
_COMMAND_R = (
    "{{ bos_token }}{% for m in messages %}<|START_OF_TURN_TOKEN|>"
    "{{ {'system': '<|SYSTEM_TOKEN|>', 'user': '<|USER_TOKEN|>', 'assistant': '<|CHATBOT_TOKEN|>'}[m['role']] }}"
    "{{ m['content'] | trim }}<|END_OF_TURN_TOKEN|>{% endfor %}"
    "{% if add_generation_prompt %}<|START_OF_TURN_TOKEN|><|CHATBOT_TOKEN|>{% endif %}"
)
# Mistral v1: `[INST]` is text; one BOS; a system message stands in the first question.
_MISTRAL_V1 = (
    "{{ bos_token }}{% set has_system = messages and messages[0]['role'] == 'system' %}"
    "{% for m in (messages[1:] if has_system else messages) %}"
    "{% if (m['role'] == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('turns must alternate') }}{% endif %}"
    "{% if m['role'] == 'user' %}{{ '[INST] ' }}"
    "{{ messages[0]['content'] + '\n\n' if has_system and loop.first }}{{ m['content'] + ' [/INST]' }}"
    "{% else %}{{ ' ' + (m['content'] | trim) + eos_token }}{% endif %}{% endfor %}"
)
# Mistral v3: `[INST]` and its kin are tokens; tools and a system message stand at the last question.
_MISTRAL_V3 = (
    "{{ bos_token }}{% set has_system = messages and messages[0]['role'] == 'system' %}"
    "{% set last = namespace(question=-1) %}{% for m in messages %}{% if m['role'] == 'user' %}"
    "{% set last.question = loop.index0 %}{% endif %}{% endfor %}"
    "{% for m in messages %}{% if m['role'] == 'user' %}"
    "{% if tools and loop.index0 == last.question %}"
    "{{ '[AVAILABLE_TOOLS] ' + (tools | tojson) + '[/AVAILABLE_TOOLS]' }}{% endif %}"
    "{{ '[INST] ' + (messages[0]['content'] + '\n\n' if has_system and loop.index0 == last.question else '') }}"
    "{{ m['content'] + '[/INST]' }}"
    "{% elif m['tool_calls'] %}{{ '[TOOL_CALLS] [' }}{% for c in m['tool_calls'] %}"
    "{{ (c['function'] | tojson) + ('' if loop.last else ', ') }}{% endfor %}{{ ']' + eos_token }}"
    "{% elif m['role'] == 'tool' %}"
    "{{ '[TOOL_RESULTS] {\"content\": ' + (m['content'] | tojson) + '}[/TOOL_RESULTS]' }}"
    "{% elif m['role'] == 'assistant' %}{{ ' ' + (m['content'] | trim) + eos_token }}{% endif %}{% endfor %}"
)
_LLAMA3_TOKENS = ("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>")
_CHATML_TOKENS = ("<|im_start|>", "<|im_end|>")
_CALL_TOKENS = ("<tool_call>", "</tool_call>", "<tool_response>", "</tool_response>")
_DEEPSEEK_TOOL_TOKENS = (
    *("<｜tool▁call▁begin｜>", "<｜tool▁sep｜>", "<｜tool▁call▁end｜>"),
    *("<｜tool▁output▁begin｜>", "<｜tool▁output▁end｜>"),
)
_MISTRAL_V3_TOKENS = (
    *("[INST]", "[/INST]", "[TOOL_CALLS]", "[AVAILABLE_TOOLS]", "[/AVAILABLE_TOOLS]"),
    *("[TOOL_RESULTS]", "[/TOOL_RESULTS]"),
)

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
    "qwen25": Family(
        _QWEN25,
        "<|im_end|>",
        control_tokens=_CHATML_TOKENS,
        eos="<|endoftext|>",
        tools=True,
        added=_CALL_TOKENS,
    ),
    "qwen3": Family(
        _QWEN3,
        "<|im_end|>",
        rewrites=True,
        control_tokens=_CHATML_TOKENS,
        eos="<|endoftext|>",
        said_last=lambda text: "<think>\n\n</think>\n\n" + text.lstrip("\n"),
        tools=True,
        added=(*_CALL_TOKENS, "<think>", "</think>"),
    ),
    "llama31": Family(
        _LLAMA31,
        "<|eot_id|>",
        "byte_level_lines",
        control_tokens=_LLAMA3_TOKENS,
        bos="<|begin_of_text|>",
        eos="<|end_of_text|>",
        said=str.strip,
        tools=True,
    ),
    "gemma_folded": Family(
        _GEMMA_FOLDED,
        "<end_of_turn>",
        "metaspace_first",
        control_tokens=("<start_of_turn>", "<end_of_turn>"),
        bos="<bos>",
        eos="<eos>",
        said=str.strip,
    ),
    "phi4": Family(_PHI4, "<|im_end|>", control_tokens=(*_CHATML_TOKENS, "<|im_sep|>"), eos="<|endoftext|>"),
    "deepseek": Family(
        _DEEPSEEK,
        "<｜end▁of▁sentence｜>",
        control_tokens=("<｜User｜>", "<｜Assistant｜>", *_DEEPSEEK_TOOL_TOKENS),
        bos="<｜begin▁of▁sentence｜>",
        eos="<｜end▁of▁sentence｜>",
        said=lambda text: text.split("</think>")[-1],
        tools=True,
        added=("<think>", "</think>"),
    ),
    "command_r": Family(
        _COMMAND_R,
        "<|END_OF_TURN_TOKEN|>",
        control_tokens=("<|START_OF_TURN_TOKEN|>", "<|SYSTEM_TOKEN|>", "<|USER_TOKEN|>", "<|CHATBOT_TOKEN|>"),
        bos="<BOS_TOKEN>",
        eos="<|END_OF_TURN_TOKEN|>",
        said=str.strip,
    ),
    "mistral_v1": Family(
        _MISTRAL_V1, "</s>", "prepend", bos="<s>", said=lambda text: f" {text.strip()}", file="tokenizer.model.v1"
    ),
    "mistral_v3": Family(
        _MISTRAL_V3,
        "</s>",
        "metaspace_first",
        control_tokens=_MISTRAL_V3_TOKENS,
        bos="<s>",
        said=lambda text: f" {text.strip()}",
        tools=True,
        moves=True,
        file="mistral_instruct_tokenizer_240323.model.v3",
    ),
    "words": Family(_WORDS, "</s>"),
    "words_trimmed_offsets": Family(_WORDS, "</s>", trim_offsets=True),
    "words_metaspace": Family(_WORDS, "</s>", "metaspace_first"),
    "words_metaspace_always": Family(_WORDS, "</s>", "metaspace_always"),
    "words_prepend": Family(_WORDS, "</s>", "prepend"),
}

WITH_TOOLS = (
    "{% if tools %}<|im_start|>tools\n{{ tools | tojson }}<|im_end|>\n{% endif %}"
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}"
    "{% if m['tool_calls'] %}{% for c in m['tool_calls'] %}<call>{{ c['function']['name'] }} "
    "{{ c['function']['arguments'] | tojson }}</call>{% endfor %}{% endif %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
"""A ChatML template that renders tools and calls."""
