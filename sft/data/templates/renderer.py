"""Renders conversations with the tokenizer's chat template and finds the spans of the answers to train.

The spans are found by rendering prefixes of the conversation. No template needs `{% generation %}` marks, and none is
special-cased:

    whole conversation             <|user|>Hi<|end|><|assistant|>Hello<|end|>\n
    up to the answer,
    with its generation prompt     <|user|>Hi<|end|><|assistant|>
    supervised span                                              [Hello<|end|>]

An answer starts where the prompt that a server would send ends, and ends with its end token; what the template writes
after that token (a line feed, the end of the text) is masked. The conversation up to the end of the answer must be a
prefix of the whole text. Some templates rewrite earlier turns (they drop their reasoning, or move the system prompt to
the last question): then each answer becomes a text of its own, after the prompt that it is served with. Everything else
is a `template_mismatch`, never a guess.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from typing import Any

from transformers import PreTrainedTokenizerBase
from transformers.utils.chat_template_utils import _compile_jinja_template

from sft.data.formats.conversation import Conversation, Message, RowLost
from sft.data.templates.control_tokens import ControlTokens, Span
from sft.errors import Problem, UserError

_PROBE = "\x02answer\x03"  # text that no template changes and no user types
_SAMPLE: list[Message] = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]


class TurnRewritten(RowLost):
    """Raised when the template renders a turn differently once others follow it, e.g. without its reasoning."""


@dataclass(frozen=True, slots=True)
class Rendered:
    """A conversation as one text, with character spans `[start, end)`.

    Attributes:
        spans: the supervised characters, from left to right.
        inert: control tokens typed in messages, to be encoded as plain text.
        is_document: whether it is a text without messages, which gets the tokenizer's own BOS and EOS.
    """

    text: str
    spans: list[Span]
    inert: tuple[Span, ...] = ()
    is_document: bool = False


def _is_plain(message: Message) -> bool:
    return len(message) == 2 and type(message["content"]) is str


class ChatRenderer:
    """Renders conversations with one tokenizer's chat template and finds the spans to train.

    Args:
        special_tokens_in_content: what control tokens typed in messages become: plain `text`, control tokens (`allow`),
            or an `error`.

    Attributes:
        end_token: the text of the token that ends each answer, e.g. `<|im_end|>`.
        end_token_id: its id.
        control_tokens: the control tokens that are searched for in messages.

    Raises:
        UserError: the template cannot render a question and an answer, or ends an answer without a special token.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, special_tokens_in_content: str = "text") -> None:
        # Messages with only a role and a text need neither the conversions of apply_chat_template nor its copy of
        # Jinja's globals on each call: four fifths of its time. Tests compare both ways for every template family.
        self._plain = _compile_jinja_template(tokenizer.get_chat_template())
        self._variables = {**self._plain.globals, **tokenizer.special_tokens_map, "tools": None, "documents": None}
        self._tokenizer, self._policy = tokenizer, special_tokens_in_content
        source = tokenizer.chat_template
        source = source if isinstance(source, str) else "\n".join(source.values())
        self.renders_calls = "tool_calls" in source
        self.renders_tools = self.renders_calls and "tools" in source
        self.renders_system = self._accepts_system()
        self.end_token, self._last_tail = self._find_end_token()
        self.end_token_id: int = tokenizer.get_added_vocab()[self.end_token]
        self.control_tokens = ControlTokens(tokenizer, source + self._render_sample(), self.end_token)

    def render(self, conversation: Conversation, train_on: str = "assistant") -> Rendered:
        """Returns the conversation's text with the spans that `train_on` selects.

        Args:
            train_on: `assistant` (each answer), `last_assistant`, or `all` (every character).

        Raises:
            RowLost: `template_mismatch` when the template rejects the conversation or an answer does not follow its
                prompt (`TurnRewritten` when only later turns change that); `no_trained_token` when nothing is selected;
                `control_token` when one is typed and the policy is `error`.
        """
        messages, tools = self.fit_to_template(conversation)
        if self._policy == "allow":
            return self._render(messages, tools, conversation, train_on)
        typed = self.control_tokens.find(messages, tools)
        if typed is None and not self.control_tokens.ends_inside(messages):
            return self._render(messages, tools, conversation, train_on)
        if typed is not None and self._policy == "error":
            raise RowLost("control_token", f"a message contains the control token {typed!r}")
        rendered = self._render(*self.control_tokens.escape(messages, tools), conversation, train_on)
        text, inert = self.control_tokens.unescape(rendered.text)
        return Rendered(text, rendered.spans, tuple(inert))

    def render_parts(self, conversation: Conversation, train_on: str = "assistant") -> list[Rendered]:
        """Renders the conversation as one text, or as one for each answer if the template rewrites earlier turns.

        Each of these ends with its answer, after the prompt that a server would send for it.
        """
        try:
            return [self.render(conversation, train_on)]
        except TurnRewritten:
            turns = [i for i, trained in enumerate(conversation.trainable) if trained]
            turns = turns[-1:] if train_on == "last_assistant" else turns
            return [self.render(_cut_after(conversation, turn), "last_assistant") for turn in turns]

    def _render(self, messages: list[Message], tools: Any, conversation: Conversation, train_on: str) -> Rendered:
        whole = self._apply(messages, tools)
        if train_on == "all":
            return Rendered(whole, [(0, len(whole))])
        offset = len(messages) - len(conversation.messages)  # a system message with the tools may have been prepended
        turns = [i + offset for i, trained in enumerate(conversation.trainable) if trained]
        if train_on == "last_assistant":
            turns = [i for i in turns[-1:] if all(m["role"] != "assistant" for m in messages[i + 1 :])]
        if not turns:
            raise RowLost("no_trained_token", f"no assistant turn is to be trained (train_on: {train_on})")
        return Rendered(whole, [self._find_span(whole, messages, turn, tools) for turn in turns])

    def _find_span(self, whole: str, messages: list[Message], turn: int, tools: list[dict[str, Any]] | None) -> Span:
        prompt = self._apply(messages[:turn], tools, add_generation_prompt=True)
        answered = whole if turn == len(messages) - 1 else self._apply(messages[: turn + 1], tools)
        start, end = len(prompt), len(answered) - len(self._last_tail) + len(self.end_token)
        if not answered.startswith(prompt):
            raise RowLost("template_mismatch", f"message {turn}: the prompt is {_difference(prompt, answered)}")
        if not answered.endswith(self._last_tail) or end - len(self.end_token) < start:
            raise RowLost("template_mismatch", f"message {turn}: its text does not end with {self._last_tail!r}")
        if not whole.startswith(answered[:end]):
            raise TurnRewritten("template_mismatch", f"message {turn} is {_difference(answered[:end], whole)}")
        return start, end

    def fit_to_template(self, conversation: Conversation) -> tuple[list[Message], list[dict[str, Any]] | None]:
        """Returns messages and tools for the template; tools and calls that it cannot render become text in messages.

        Raises:
            RowLost: `template_mismatch` when the template skips a message.
        """
        messages, tools = conversation.messages, conversation.tools
        if not self.renders_calls:
            messages = [_write_calls_as_text(m) for m in messages]
        if tools and not self.renders_tools:
            messages, tools = _write_tools_in_system(messages, tools), None
        if not self.renders_system and messages[0]["role"] == "system":
            raise RowLost("template_mismatch", "the chat template does not render system messages")
        self._require_rendered(messages, tools)
        return messages, tools

    def _require_rendered(self, messages: list[Message], tools: list[dict[str, Any]] | None) -> None:
        """Raises `RowLost` if the template skips a message: the answer would lack what it depends on.

        Many templates skip roles that they do not know, others every system message but the first.
        """
        probes = {
            i: f"\x02message {i}\x03"
            for i, m in enumerate(messages)
            if m["role"] not in ("user", "assistant") and (i > 0 or m["role"] == "developer")
        }
        if not probes:
            return
        probed = [{**m, "content": probes[i]} if i in probes else m for i, m in enumerate(messages)]
        text = self._apply(probed, tools)
        # A template may write a content as JSON, or in yet another form: then the text depends on it.
        unseen = [i for i, probe in probes.items() if probe not in text and json.dumps(probe)[1:-1] not in text]
        for i in unseen:
            others = [m if j == i else one for j, (m, one) in enumerate(zip(messages, probed, strict=True))]
            if self._apply(others, tools) == text:
                raise RowLost("template_mismatch", f"the chat template skips message {i} ({messages[i]['role']})")

    def _apply(self, messages: list[Message], tools: Any, add_generation_prompt: bool = False) -> str:
        """Renders messages exactly as the tokenizer's `apply_chat_template` does, but faster."""
        options = {"tools": tools, "add_generation_prompt": add_generation_prompt}
        try:
            if tools is None and all(map(_is_plain, messages)):
                context = self._plain.new_context({**self._variables, "messages": messages, **options}, shared=True)
                return "".join(self._plain.root_render_func(context))
            # A batch of one: on its own, transformers rejects the empty conversation that precedes an opening answer.
            return str(self._tokenizer.apply_chat_template([messages], tokenize=False, **options)[0])
        except Exception as error:  # jinja2's errors, and TypeErrors from filters
            raise RowLost("template_mismatch", f"the chat template refuses the conversation: {error}") from None

    def _accepts_system(self) -> bool:
        try:
            return _PROBE in self._apply([{"role": "system", "content": _PROBE}, *_SAMPLE], None)
        except RowLost:
            return False

    def _render_sample(self) -> str:
        """Renders a question and an answer: the template's source may assemble its tokens from parts."""
        system = [{"role": "system", "content": "c"}] if self.renders_system else []
        return self._apply([*system, *_SAMPLE], None) + self._apply([*system, _SAMPLE[0]], None, True)

    def _find_end_token(self) -> tuple[str, str]:
        """Returns the token that ends an answer, and all text from it to the end of the conversation."""
        try:
            text = self._apply([_SAMPLE[0], {"role": "assistant", "content": _PROBE}], None)
        except RowLost as lost:
            raise UserError(Problem(lost.message, "fix the template, or set another", "chat_template")) from None
        if text.count(_PROBE) != 1:
            raise UserError(Problem("the chat template does not render an answer's text", key="chat_template"))
        tail = text[text.index(_PROBE) + len(_PROBE) :]
        found = [(tail.find(t), -len(t), t) for t in self._tokenizer.get_added_vocab() if t in tail]
        if not found:
            ends = f"the chat template ends an answer with {tail!r}"
            message = f"{ends}, which contains no special token: the model would never learn to stop"
            hint = "end each assistant turn with a special token, e.g. {{ eos_token }}, or set `chat_template: plain`"
            raise UserError(Problem(message, hint, "chat_template"))
        token = min(found)[2]
        return token, tail[tail.index(token) :]


def _cut_after(conversation: Conversation, turn: int) -> Conversation:
    messages, trainable = conversation.messages[: turn + 1], conversation.trainable[: turn + 1]
    return replace(conversation, messages=messages, trainable=trainable)


def _write_calls_as_text(message: Message) -> Message:
    if "tool_calls" not in message:
        return message
    calls = [json.dumps(c.get("function", c), ensure_ascii=False, default=str) for c in message["tool_calls"]]
    content = "\n".join([message["content"], *calls] if message["content"] else calls)
    return {**{k: v for k, v in message.items() if k != "tool_calls"}, "content": content}


def _write_tools_in_system(messages: list[Message], tools: list[dict[str, Any]]) -> list[Message]:
    listing = "Tools:\n" + "\n".join(json.dumps(t.get("function", t), ensure_ascii=False, default=str) for t in tools)
    if messages[0]["role"] == "system":
        return [{**messages[0], "content": f"{messages[0]['content']}\n\n{listing}"}, *messages[1:]]
    return [{"role": "system", "content": listing}, *messages]


def _difference(text: str, whole: str) -> str:
    at = max(0, _shared_length(whole, text) - 20)
    return f"rendered as ...{text[at:][:60]!r}, the conversation has ...{whole[at:][:60]!r}"


def _shared_length(a: str, b: str) -> int:
    low, high = 0, min(len(a), len(b))
    while low < high:  # bisection: slices compare at memory speed
        middle = (low + high + 1) // 2
        low, high = (middle, high) if a[low:middle] == b[low:middle] else (low, middle - 1)
    return low
