"""A tokenizer's chat template as transformers runs it, without what a plain conversation can do without."""

from __future__ import annotations

from typing import Any

from transformers import PreTrainedTokenizerBase
from transformers.utils.chat_template_utils import _compile_jinja_template

from sft.data.formats.conversation import Message


class TemplateEngine:
    """Renders conversations of one tokenizer as `apply_chat_template` does."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self._tokenizer = tokenizer
        # Messages of two texts need none of the conversions that apply_chat_template makes, nor the copy of Jinja's
        # globals that each render makes: together four fifths of its time (that both ways give the same text is tested
        # for every family).
        self._plain = _compile_jinja_template(tokenizer.get_chat_template())
        self._variables = {**self._plain.globals, **tokenizer.special_tokens_map, "tools": None, "documents": None}

    def render(self, messages: list[Message], tools: Any, add_generation_prompt: bool = False) -> str:
        """The conversation's text. Raises whatever the template raises."""
        if tools is None and all(map(_is_plain, messages)):
            variables = {**self._variables, "messages": messages, "add_generation_prompt": add_generation_prompt}
            return "".join(self._plain.root_render_func(self._plain.new_context(variables, shared=True)))
        # A batch of one: alone, transformers refuses the empty conversation that stands before an opening answer.
        batch = self._tokenizer.apply_chat_template(
            [messages], tools=tools, tokenize=False, add_generation_prompt=add_generation_prompt
        )
        return str(batch[0])


def _is_plain(message: Message) -> bool:
    return len(message) == 2 and type(message["content"]) is str
