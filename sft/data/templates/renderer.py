"""From a conversation to the text that the tokenizer's chat template makes of it, and the spans that are trained.

Which characters are the answers is read off the rendering itself, so no template needs `{% generation %}` marks and
none needs to be known here:

    conversation rendered whole    <|user|>Hi<|end|><|assistant|>Hello<|end|>\n
    rendered up to the answer,
    with its generation prompt     <|user|>Hi<|end|><|assistant|>
    trained span                                                 [Hello<|end|>]

An answer starts where the prompt ends that a server would send, and ends with the token that ends it; whatever the
template puts behind that token (a line feed, the text's own end) is not trained. The conversation up to the answer's
end must stand at the beginning of the whole: where a template rewrites earlier turns (it drops their thoughts, or
moves the system prompt to the last question) each answer becomes a text of its own, behind the prompt that it is
served with. What fits in neither way is a `template_mismatch`, never a guess.
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

_PROBE = "\x02answer\x03"  # text that no template rewrites and no user types


class Rewritten(RowLost):
    """A template that writes a turn otherwise as soon as others follow it, e.g. without its thoughts."""


@dataclass(frozen=True, slots=True)
class Rendered:
    """A conversation as one text, with character spans `[start, end)` of it.

    Attributes:
        spans: what is trained, from left to right.
        inert: control tokens that somebody typed, to be encoded as plain text.
        is_document: a text without messages, which gets the tokenizer's own BOS and its EOS.
    """

    text: str
    spans: list[Span]
    inert: tuple[Span, ...] = ()
    is_document: bool = False


class ChatRenderer:
    """Renders conversations with one tokenizer's chat template and finds the spans to train.

    Args:
        special_tokens_in_content: control tokens typed in messages are plain `text`, what they are (`allow`), or
            an `error`.

    Attributes:
        end_token: the text of the token that ends each answer, e.g. `<|im_end|>`.
        end_token_id: its id.
        control_tokens: those that are looked for in messages.

    Raises:
        UserError: the template cannot render a plain question and answer, or never ends an answer with a token.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, special_tokens_in_content: str = "text") -> None:
        self._template = TemplateEngine(tokenizer)
        self._tokenizer = tokenizer
        self._typed = special_tokens_in_content
        source = tokenizer.chat_template
        source = source if isinstance(source, str) else "\n".join(source.values())
        self.renders_calls = "tool_calls" in source
        self.renders_tools = self.renders_calls and "tools" in source
        self.renders_system = self._accepts_system()
        self.end_token, self._last_tail = self._find_end_token()
        self.end_token_id: int = tokenizer.get_added_vocab()[self.end_token]
        self.control_tokens = ControlTokens(tokenizer, source + self._written(), self.end_token)

    def render(self, conversation: Conversation, train_on: str = "assistant") -> Rendered:
        """The conversation's text with the spans that `train_on` asks for.

        Args:
            conversation: a normalized row.
            train_on: `assistant` (each answer), `last_assistant`, or `all` (every character).

        Raises:
            RowLost: `template_mismatch` when the template refuses the conversation or an answer does not stand
                behind its prompt (`Rewritten` when only what follows changes that); `no_trained_token` when nothing of
                it is to be trained; `control_token` when one is typed and that is an error.
        """
        messages, tools = self.fit_to_template(conversation)
        looks = self._typed != "allow"
        typed = self.control_tokens.find(messages, tools) if looks else None
        if typed is None and not (looks and self.control_tokens.begins(messages)):
            return self._render(messages, tools, conversation, train_on)
        if typed is not None and self._typed == "error":
            raise RowLost("control_token", f"a message holds the control token {typed!r}")
        rendered = self._render(*self.control_tokens.hide(messages, tools), conversation, train_on)
        text, inert = self.control_tokens.reveal(rendered.text)
        return Rendered(text, rendered.spans, tuple(inert))

    def render_parts(self, conversation: Conversation, train_on: str = "assistant") -> list[Rendered]:
        """The same as one text; or, where the template rewrites earlier turns, as one text for each trained answer.

        Each then ends with that answer, behind the prompt that a server would send for it.
        """
        try:
            return [self.render(conversation, train_on)]
        except Rewritten:
            turns = [i for i, trained in enumerate(conversation.trainable) if trained]
            turns = turns[-1:] if train_on == "last_assistant" else turns
            return [self.render(_until(conversation, turn), "last_assistant") for turn in turns]

    def _render(self, messages: list[Message], tools: Any, conversation: Conversation, train_on: str) -> Rendered:
        whole = self._apply(messages, tools)
        if train_on == "all":
            return Rendered(whole, [(0, len(whole))])
        offset = len(messages) - len(conversation.messages)  # a system message that carries the tools was put first
        turns = [i + offset for i, trained in enumerate(conversation.trainable) if trained]
        if train_on == "last_assistant":
            turns = [i for i in turns[-1:] if i == self._last_assistant(messages)]
        if not turns:
            raise RowLost("no_trained_token", f"no assistant turn is to be trained (train_on: {train_on})")
        return Rendered(whole, [self._span(whole, messages, turn, tools) for turn in turns])

    def _span(self, whole: str, messages: list[Message], turn: int, tools: list[dict[str, Any]] | None) -> Span:
        prompt = self._apply(messages[:turn], tools, add_generation_prompt=True)
        answered = whole if turn == len(messages) - 1 else self._apply(messages[: turn + 1], tools)
        start, end = len(prompt), len(answered) - len(self._last_tail) + len(self.end_token)
        if not answered.startswith(prompt):
            raise RowLost("template_mismatch", f"message {turn}: the prompt is {_difference(prompt, answered)}")
        if not answered.endswith(self._last_tail) or end - len(self.end_token) < start:
            raise RowLost("template_mismatch", f"message {turn}: its text does not end with {self._last_tail!r}")
        if not whole.startswith(answered[:end]):
            raise Rewritten("template_mismatch", f"message {turn} is {_difference(answered[:end], whole)}")
        return start, end

    def fit_to_template(self, conversation: Conversation) -> tuple[list[Message], list[dict[str, Any]] | None]:
        """Messages and tools for the template; tools and calls that it has no place for become plain text in messages.

        Raises:
            RowLost: `template_mismatch` when the template leaves out a message of some role.
        """
        messages, tools = conversation.messages, conversation.tools
        if not self.renders_calls:
            messages = [_call_as_text(m) for m in messages]
        if tools and not self.renders_tools:
            messages = _with_tools_in_system(messages, tools)
            tools = None
        if not self.renders_system and messages[0]["role"] == "system":
            raise RowLost("template_mismatch", "the chat template does not render system messages")
        self._require_rendered(messages, tools)
        return messages, tools

    def _require_rendered(self, messages: list[Message], tools: list[dict[str, Any]] | None) -> None:
        """Many templates step over messages of a role that they do not know: what the answer rests on would be gone.

        Others write a system message at the beginning and none behind it, so that each message is looked for.
        """
        suspects = {
            i: f"\x02message {i}\x03"
            for i, m in enumerate(messages)
            if m["role"] not in ("user", "assistant") and (i > 0 or m["role"] == "developer")
        }
        if not suspects:
            return
        probed = [{**m, "content": suspects[i]} if i in suspects else m for i, m in enumerate(messages)]
        text = self._apply(probed, tools)
        # A template may write a content as JSON, or in another way still.
        unseen = [i for i, probe in suspects.items() if probe not in text and json.dumps(probe)[1:-1] not in text]
        for i in unseen:
            others = [m if j == i else one for j, (m, one) in enumerate(zip(messages, probed, strict=True))]
            if self._apply(others, tools) == text:
                raise RowLost("template_mismatch", f"the chat template leaves message {i} out ({messages[i]['role']})")

    def _apply(self, messages: list[Message], tools: Any, add_generation_prompt: bool = False) -> str:
        try:
            return self._template.render(messages, tools, add_generation_prompt)
        except Exception as error:  # templates raise jinja2 errors of their own, and TypeErrors from inside filters
            raise RowLost("template_mismatch", f"the chat template refuses the conversation: {error}") from None

    @staticmethod
    def _last_assistant(messages: list[Message]) -> int:
        return max(i for i, m in enumerate(messages) if m["role"] == "assistant")

    def _accepts_system(self) -> bool:
        try:
            text = self._apply(
                [
                    {"role": "system", "content": _PROBE},
                    {"role": "user", "content": "a"},
                    {"role": "assistant", "content": "b"},
                ],
                None,
            )
        except RowLost:
            return False
        return _PROBE in text

    def _written(self) -> str:
        """What the template makes of a question and an answer: it may put its tokens together from parts."""
        dialogue = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
        system = [{"role": "system", "content": "c"}] if self.renders_system else []
        return self._apply([*system, *dialogue], None) + self._apply([*system, dialogue[0]], None, True)

    def _find_end_token(self) -> tuple[str, str]:
        """The token behind an answer, and all that stands behind the last answer of a conversation (token first)."""
        probe = [{"role": "user", "content": "a"}, {"role": "assistant", "content": _PROBE}]
        try:
            text = self._apply(probe, None)
        except RowLost as lost:
            raise UserError(Problem(lost.message, "mend the template, or set another", "chat_template")) from None
        if text.count(_PROBE) != 1:
            raise UserError(Problem("the chat template does not render an answer's text", key="chat_template"))
        tail = text[text.index(_PROBE) + len(_PROBE) :]
        found = [(tail.find(t), -len(t), t) for t in self._tokenizer.get_added_vocab() if t in tail]
        if not found:
            raise UserError(
                Problem(
                    f"the chat template ends an answer with {tail!r}, which holds no token of its own: the model "
                    "would never learn to stop",
                    "end each assistant turn with a special token, e.g. {{ eos_token }}, or set `chat_template: plain`",
                    "chat_template",
                )
            )
        token = min(found)[2]
        return token, tail[tail.index(token) :]


def _until(conversation: Conversation, turn: int) -> Conversation:
    messages, trainable = conversation.messages[: turn + 1], conversation.trainable[: turn + 1]
    return replace(conversation, messages=messages, trainable=trainable)


def _call_as_text(message: Message) -> Message:
    if "tool_calls" not in message:
        return message
    calls = [json.dumps(c.get("function", c), ensure_ascii=False, default=str) for c in message["tool_calls"]]
    content = "\n".join([message["content"], *calls] if message["content"] else calls)
    return {**{k: v for k, v in message.items() if k != "tool_calls"}, "content": content}


def _with_tools_in_system(messages: list[Message], tools: list[dict[str, Any]]) -> list[Message]:
    listing = "Tools:\n" + "\n".join(json.dumps(t.get("function", t), ensure_ascii=False, default=str) for t in tools)
    if messages[0]["role"] == "system":
        return [{**messages[0], "content": f"{messages[0]['content']}\n\n{listing}"}, *messages[1:]]
    return [{"role": "system", "content": listing}, *messages]


def _difference(text: str, whole: str) -> str:
    at = max(0, len(_shared_start(whole, text)) - 20)
    return f"rendered as ...{text[at:][:60]!r}, the conversation has ...{whole[at:][:60]!r}"


def _shared_start(a: str, b: str) -> str:
    low, high = 0, min(len(a), len(b))
    while low < high:  # the longest shared start, by bisection: slices compare at memory speed
        middle = (low + high + 1) // 2
        low, high = (middle, high) if a[low:middle] == b[low:middle] else (low, middle - 1)
    return a[:low]


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
