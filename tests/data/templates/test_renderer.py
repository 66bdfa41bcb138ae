"""Rendered conversations, and the character spans that are trained."""

from __future__ import annotations

import pytest

from sft.data.formats.conversation import Conversation, RowLost
from sft.data.templates.renderer import ChatRenderer, Rendered, TurnRewritten
from sft.errors import UserError
from tests.builders import byte_level_tokenizer, spelled_tokenizer
from tests.data.formats.rows import conversation as conversation_of
from tests.template_zoo import FAMILIES, WITH_TOOLS, renderer_of, tokenizer_of

ROLES = {"s": "system", "u": "user", "a": "assistant", "t": "tool", "d": "developer"}
IM = ("<|im_start|>", "<|im_end|>")


def chat(*turns: str, **row: object) -> Conversation:
    """Makes a conversation: `chat("u Hi", "a Hello")`."""
    return conversation_of({"messages": [{"role": ROLES[t[0]], "content": t[2:]} for t in turns], **row})


TOOL_ROW = {
    "conversations": [
        {"from": "human", "value": "How many?"},
        {"from": "function_call", "value": '{"name": "count", "arguments": {"of": "Äpfel"}}'},
        {"from": "observation", "value": "3"},
        {"from": "gpt", "value": "Three."},
    ],
    "tools": '[{"name": "count"}]',
}

STEADY = [name for name, family in FAMILIES.items() if not family.rewrites]


def spoken(rendered: Rendered) -> list[str]:
    return [rendered.text[start:end] for start, end in rendered.spans]


def lost(name: str, conversation: Conversation, train_on: str = "assistant") -> RowLost:
    return lost_by(renderer_of(name), conversation, train_on)


def lost_by(renderer: ChatRenderer, conversation: Conversation, train_on: str = "assistant") -> RowLost:
    with pytest.raises(RowLost) as caught:
        renderer.render(conversation, train_on)
    return caught.value


@pytest.mark.parametrize("name", STEADY)
def test_each_answer_is_trained_with_its_end_token_and_nothing_after_it(name):
    family = FAMILIES[name]
    turns = ["u Hi", "a Hello", "u And\n\nthen? ", "a  Yes 🎉\n", "u é?", "a No"]
    rendered = renderer_of(name).render(chat(*(["s Be brief"] if family.system and not family.moves else []), *turns))
    assert spoken(rendered) == family.answers(["Hello", " Yes 🎉\n", "No"])


@pytest.mark.parametrize("name", STEADY)
def test_the_text_before_an_answer_is_the_prompt_that_a_server_sends(name):
    conversation = chat("u Hi", "a Hello", "u Is it?", "a Yes")
    rendered = renderer_of(name).render(conversation)
    for turn, (start, _) in zip((1, 3), rendered.spans, strict=True):
        prompt = tokenizer_of(name).apply_chat_template(
            conversation.messages[:turn], tokenize=False, add_generation_prompt=True
        )
        assert rendered.text[:start] == prompt


def test_the_whole_rendering_and_its_spans_written_out():
    rendered = renderer_of("chatml").render(chat("s Be brief", "u Hi", "a Hello", "u So", "a Yes"))
    assert rendered.text == (
        "<|im_start|>system\nBe brief<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
        "Hello<|im_end|>\n<|im_start|>user\nSo<|im_end|>\n<|im_start|>assistant\nYes<|im_end|>\n"
    )
    assert rendered.spans == [(90, 105), (158, 171)]


@pytest.mark.parametrize("name", ["chatml", "llama2", "phi3", "zephyr"])
def test_an_empty_system_message_is_rendered_as_it_is(name):
    rendered = renderer_of(name).render(chat("s ", "u Hi", "a Yes"))
    assert spoken(rendered) == [FAMILIES[name].said("Yes") + FAMILIES[name].end]
    assert rendered.text != renderer_of(name).render(chat("u Hi", "a Yes")).text


@pytest.mark.parametrize("name", STEADY)
@pytest.mark.parametrize("place", [1, 3])
def test_an_end_token_inside_an_answer_does_not_end_it(name, place):
    family = FAMILIES[name]
    turns = ["u Hi", "a Yes", "u So", "a No"]
    turns[place] = f"a Say {family.end} twice"
    assert spoken(renderer_of(name).render(chat(*turns))) == family.answers([t[2:] for t in turns[1::2]])


def test_equal_answers_and_questions_are_distinguished():
    rendered = renderer_of("words").render(chat("u Yes", "a Yes", "u Yes", "a Yes"))
    assert rendered.text == "user: Yes\nassistant: Yes</s>user: Yes\nassistant: Yes</s>"
    assert rendered.spans == [(21, 28), (49, 56)]


def test_reasoning_is_trained_where_the_template_keeps_it():
    """It is dropped once a question follows: then each answer becomes a text of its own, as it is served."""
    thought = "<think>\nhm\n</think>\n\n"
    conversation = chat("u Hi", f"a {thought}Hello", "u So", f"a {thought}Yes")
    first, second = renderer_of("thinking").render_parts(conversation)
    assert spoken(first) == [f"{thought}Hello<|im_end|>"]
    assert spoken(second) == [f"{thought}Yes<|im_end|>"]
    assert second.text.count("hm") == 1
    (last,) = renderer_of("thinking").render_parts(conversation, "last_assistant")
    assert last == second
    with pytest.raises(TurnRewritten, match=r"message 1 is rendered as .*hm.*, the conversation has"):
        renderer_of("thinking").render(conversation)


def test_train_on_last_assistant_and_all():
    conversation = chat("u Hi", "a Hello", "u So", "a Yes")
    assert spoken(renderer_of("chatml").render(conversation, "last_assistant")) == ["Yes<|im_end|>"]
    whole = renderer_of("chatml").render(conversation, "all")
    assert whole.spans == [(0, len(whole.text))]


def test_turns_with_weight_0_or_train_false_are_not_trained():
    messages = [
        {"role": "user", "content": "Hi"},
        {"role": "assistant", "content": "Hello", "weight": 0},
        {"role": "user", "content": "So"},
        {"role": "assistant", "content": "Yes", "train": True},
        {"role": "user", "content": "Then"},
        {"role": "assistant", "content": "No", "train": False},
    ]
    conversation = conversation_of({"messages": messages})
    assert spoken(renderer_of("chatml").render(conversation)) == ["Yes<|im_end|>"]
    # The last answer must not be trained: no earlier one takes its place.
    assert lost("chatml", conversation, "last_assistant").reason == "no_trained_token"


def test_a_conversation_may_end_with_a_question_or_hold_two_answers_in_a_row():
    assert spoken(renderer_of("chatml").render(chat("u Hi", "a Hello", "u So"))) == ["Hello<|im_end|>"]
    assert spoken(renderer_of("chatml").render(chat("u Hi", "a Hello", "a Yes"))) == [
        "Hello<|im_end|>",
        "Yes<|im_end|>",
    ]
    assert spoken(renderer_of("phi3").render(chat("u Hi", "a Hello", "u So"))) == ["Hello<|end|>"]


def test_an_opening_answer_is_trained_after_the_generation_prompt_alone():
    rendered = renderer_of("chatml").render(chat("a Hello", "u Hi", "a Yes"))
    assert spoken(rendered) == ["Hello<|im_end|>", "Yes<|im_end|>"]
    assert rendered.text[: rendered.spans[0][0]] == "<|im_start|>assistant\n"
    assert lost("llama2", chat("a Hello", "u Hi", "a Yes")).reason == "template_mismatch"


def test_an_answer_followed_by_the_same_speakers_tool_call_ends_before_it():
    """Templates that render either the text or the calls of a message (Llama 3.1, Mistral) show the text only."""
    template = (
        "{% for m in messages %}<|im_start|>{{ m['role'] }}\n"
        "{% if m['tool_calls'] %}{{ m['tool_calls'][0]['function']['name'] }}{% else %}{{ m['content'] }}{% endif %}"
        "<|im_end|>{% endfor %}{# tools #}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    turns = [
        ("human", "Hi"),
        ("gpt", "Let me see"),
        ("function_call", '{"name": "look"}'),
        ("observation", "3"),
        ("gpt", "3"),
    ]
    conversation = conversation_of({"conversations": [{"from": who, "value": said} for who, said in turns]})
    rendered = ChatRenderer(spelled_tokenizer("byte_level", template, IM)).render(conversation)
    assert spoken(rendered) == ["Let me see<|im_end|>", "look<|im_end|>", "3<|im_end|>"]


def test_a_template_that_never_ends_an_answer_is_an_error():
    template = "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}"
    with pytest.raises(UserError, match=r"chat_template: .*ends an answer with '\\n'.*never learn to stop"):
        ChatRenderer(byte_level_tokenizer(template))


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("{{ raise_exception('no') }}", "refuses the conversation: no"),
        ("{{ messages[0]['content'] }}<|im_end|>", "does not render an answer's text"),
        ("{% for m in messages %}{{ m['content'] + 1 }}{% endfor %}", "refuses the conversation"),
    ],
)
def test_a_template_that_cannot_render_an_answer_is_an_error(template, message):
    with pytest.raises(UserError, match=message) as caught:
        ChatRenderer(byte_level_tokenizer(template))
    assert caught.value.problems[0].key == "chat_template"


def test_a_prompt_that_is_not_a_prefix_of_the_conversation_is_a_mismatch():
    template = (
        "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n<think>\n{% endif %}"
    )
    with pytest.raises(RowLost, match=r"message 1: the prompt is rendered as .*<think>") as caught:
        ChatRenderer(byte_level_tokenizer(template)).render(chat("u Hi", "a Hello"))
    assert caught.value.reason == "template_mismatch"


def test_a_system_message_that_the_template_refuses_is_a_mismatch():
    assert not renderer_of("gemma").renders_system
    error = lost("gemma", chat("s Be brief", "u Hi", "a Yes"))
    assert (error.reason, error.message) == ("template_mismatch", "the chat template does not render system messages")


def test_turns_that_the_template_refuses_are_a_mismatch_in_the_templates_words():
    error = lost("llama2", chat("u Hi", "u Hi", "a Yes"))
    assert error.reason == "template_mismatch"
    assert error.message.endswith("turns must alternate")


@pytest.mark.parametrize(
    "turns",
    [
        ("u Hi", "a Hello", "t 3 apples", "a Yes"),
        ("d Be brief", "u Hi", "a Yes"),
        ("u Hi", "t 3 apples", "a Yes"),
    ],
)
def test_messages_that_the_template_skips_silently_are_a_mismatch(turns):
    error = lost("zephyr", chat(*turns))
    assert error.reason == "template_mismatch"
    assert "skips" in error.message
    assert spoken(renderer_of("chatml").render(chat(*turns)))[-1] == "Yes<|im_end|>"


def test_a_skipped_system_message_in_mid_conversation_is_a_mismatch():
    template = (
        "{% if messages[0]['role'] == 'system' %}{{ messages[0]['content'] }}{% endif %}"
        "{% for m in messages if m['role'] != 'system' %}"
        "<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    one = ChatRenderer(byte_level_tokenizer(template))
    assert one.renders_system
    assert spoken(one.render(chat("s Be brief", "u Hi", "a Yes"))) == ["Yes<|im_end|>"]
    for turns in (("u Hi", "s Be brief", "a Yes"), ("s Be brief", "u Hi", "a Yes", "u So", "s Be long", "a No")):
        with pytest.raises(RowLost, match=r"template_mismatch: .* skips message \d \(system\)") as caught:
            one.render(chat(*turns))
        assert f"message {len(turns) - 2} " in caught.value.message


def test_each_of_several_messages_of_one_role_is_searched_for():
    """Two tool results in a row, of which the second is skipped; and results that the template writes as JSON."""
    template = (
        "{%% for m in messages %%}%s<|im_start|>{{ m['role'] }}\n{{ %s }}<|im_end|>%s{%% endfor %%}"
        "{%% if add_generation_prompt %%}<|im_start|>assistant\n{%% endif %%}"
    )
    skips = "{% if m['role'] != 'tool' or loop.previtem['role'] != 'tool' %}", "m['content']", "{% endif %}"
    writes_json = "", "m['content'] | tojson if m['role'] == 'tool' else m['content']", ""
    turns = ("u Hi", "a Wait", "t 3", "t 4", "a Yes")
    error = lost_by(ChatRenderer(byte_level_tokenizer(template % skips)), chat(*turns))
    assert (error.reason, error.message) == ("template_mismatch", "the chat template skips message 3 (tool)")
    rendered = ChatRenderer(byte_level_tokenizer(template % writes_json)).render(chat(*turns))
    assert '<|im_start|>tool\n"4"<|im_end|>' in rendered.text


def test_a_template_with_tools_renders_them_and_the_call_is_trained():
    conversation = conversation_of(TOOL_ROW)
    rendered = ChatRenderer(byte_level_tokenizer(WITH_TOOLS)).render(conversation)
    assert '<|im_start|>tools\n[{"type": "function", "function": {"name": "count"}}]<|im_end|>' in rendered.text
    assert spoken(rendered) == ['<call>count {"of": "Äpfel"}</call><|im_end|>', "Three.<|im_end|>"]


def test_for_a_template_without_tools_the_tools_and_calls_become_text():
    conversation = conversation_of(TOOL_ROW)
    rendered = renderer_of("chatml").render(conversation)
    assert rendered.text.startswith(
        '<|im_start|>system\nTools:\n{"name": "count"}<|im_end|>\n<|im_start|>user\nHow many?'
    )
    assert spoken(rendered) == ['{"name": "count", "arguments": {"of": "Äpfel"}}<|im_end|>', "Three.<|im_end|>"]


def test_tools_come_after_the_rows_own_system_message():
    conversation = conversation_of({**TOOL_ROW, "system": "Be brief"})
    text = renderer_of("chatml").render(conversation).text
    assert text.startswith('<|im_start|>system\nBe brief\n\nTools:\n{"name": "count"}<|im_end|>\n')
    assert text.count("<|im_start|>system") == 1


def test_tools_for_a_template_with_neither_tools_nor_system_messages_are_a_mismatch():
    conversation = conversation_of(TOOL_ROW)
    assert lost("gemma", conversation).reason == "template_mismatch"
