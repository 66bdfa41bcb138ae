"""The shipped templates, to the letter, and where a template comes from."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from sft.data.templates import chat_templates
from sft.errors import UserError
from tests.builders import CHATML, byte_level_tokenizer

TURNS = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "Hi"},
    {"role": "assistant", "content": "Hello"},
    {"role": "user", "content": "Bye"},
]


def test_plain_renders_several_turns_with_eos_after_each_answer() -> None:
    tokenizer = byte_level_tokenizer(chat_template=None)
    chat_templates.install(tokenizer, "plain")
    assert tokenizer.apply_chat_template(TURNS, tokenize=False, add_generation_prompt=True) == (
        "### System:\nBe brief.\n\n### User:\nHi\n\n### Assistant:\nHello<|endoftext|>\n\n"
        "### User:\nBye\n\n### Assistant:\n"
    )


def test_plain_starts_with_bos_unless_it_is_eos() -> None:
    tokenizer = byte_level_tokenizer(chat_template=None)
    tokenizer.bos_token = "<|im_start|>"
    chat_templates.install(tokenizer, "plain")
    assert str(tokenizer.apply_chat_template(TURNS[1:2], tokenize=False)).startswith("<|im_start|>### User:")
    tokenizer.bos_token = tokenizer.eos_token
    assert str(tokenizer.apply_chat_template(TURNS[1:2], tokenize=False)).startswith("### User:")


def test_the_shipped_chatml_equals_the_common_one() -> None:
    ours, reference = byte_level_tokenizer(chat_template=None), byte_level_tokenizer(chat_template=CHATML)
    chat_templates.install(ours, "chatml")
    for generation_prompt in (False, True):
        rendered = ours.apply_chat_template(TURNS, tokenize=False, add_generation_prompt=generation_prompt)
        assert rendered == reference.apply_chat_template(TURNS, tokenize=False, add_generation_prompt=generation_prompt)


@pytest.mark.parametrize("name", chat_templates.shipped_names())
def test_shipped_templates_refuse_tool_calls(name: str) -> None:
    tokenizer = byte_level_tokenizer(chat_template=None)
    chat_templates.install(tokenizer, name)
    call: Any = {"role": "assistant", "content": "", "tool_calls": [{}]}
    with pytest.raises(Exception, match="knows no tool calls"):
        tokenizer.apply_chat_template([call], tokenize=False)


def test_the_tokenizers_own_template_stays_and_plain_is_the_default() -> None:
    tokenizer = byte_level_tokenizer()
    assert "own" in chat_templates.install(tokenizer, None)
    assert tokenizer.chat_template == CHATML
    tokenizer.chat_template = None
    assert "because the tokenizer has none" in chat_templates.install(tokenizer, None)
    assert "### User:" in tokenizer.apply_chat_template(TURNS, tokenize=False)


def test_a_file_and_inline_jinja(tmp_path: Path) -> None:
    template = "{% for m in messages %}[{{ m['content'] }}]{% endfor %}"
    (tmp_path / "mine.jinja").write_text(template)
    for value in (template, str(tmp_path / "mine.jinja")):
        tokenizer = byte_level_tokenizer()
        chat_templates.install(tokenizer, value)
        assert tokenizer.apply_chat_template(TURNS, tokenize=False) == "[Be brief.][Hi][Hello][Bye]"


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ("nowhere.jinja", "no such template file"),
        ("{% for m in messages %}", "not valid Jinja"),
        ("{{ messages.a.b }}", "fails on a plain exchange"),
        ("{{ raise_exception('no') }}", "refuses a plain exchange"),
        ("{{ messages[0]['content'] }}", "drops what the assistant says"),
    ],
)
def test_broken_templates_are_named(value: str, message: str) -> None:
    with pytest.raises(UserError, match=message) as caught:
        chat_templates.install(byte_level_tokenizer(), value)
    assert caught.value.problems[0].key == "chat_template"


def test_chatml_needs_its_tokens_and_says_how() -> None:
    backend = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate("<|im_startend>\n ")}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bare = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>")
    with pytest.raises(UserError, match="vocabulary does not hold") as caught:
        chat_templates.install(bare, "chatml")
    assert "special_tokens: ['<|im_start|>', '<|im_end|>']" in caught.value.problems[0].hint


def test_plain_needs_an_end_token() -> None:
    tokenizer = byte_level_tokenizer(chat_template=None)
    tokenizer.eos_token = None
    with pytest.raises(UserError, match="this tokenizer has none"):
        chat_templates.install(tokenizer, None)
