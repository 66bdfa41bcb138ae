"""Exact match: replies compared with the right answers, with the prompts of the training."""

from __future__ import annotations

from typing import Any

import pytest

from sft.data.formats.conversation import Conversation
from sft.inference.exact_match import exact_match
from tests.inference.qa_model import ask, with_answer


def conversation_of(question: str, answer: str, **options: Any) -> Conversation:
    return Conversation("chat", with_answer(question, answer), [False, True], **options)


def test_only_equal_replies_count(qa_model: tuple[Any, Any]) -> None:
    done: list[int] = []
    examples = exact_match(
        *qa_model,
        [
            conversation_of("x", " 48\n"),
            conversation_of("capital of France", "paris"),
            conversation_of("How many apples", "Two apples are left."),
            conversation_of("x", "4"),
        ],
        on_progress=done.append,
    )
    assert ([one.is_right for one in examples], sum(done)) == ([True, False, True, False], 4)
    second = examples[1]
    assert (second.question, second.answer, second.reply) == (ask("capital of France"), "paris", "Paris")
    assert str(second) == "'capital of France' -> 'Paris' (wrong, expected 'paris')"
    assert str(examples[0]) == "'x' -> '48' (right)"


def test_no_questions_give_no_matches(qa_model: tuple[Any, Any]) -> None:
    assert exact_match(*qa_model, []) == []


@pytest.mark.parametrize("last", [{"role": "user", "content": "x"}, {"role": "assistant", "tool_calls": [{}]}])
def test_a_conversation_must_end_with_an_answer_in_words(qa_model: tuple[Any, Any], last: dict[str, Any]) -> None:
    conversation = Conversation("chat", [*ask("x"), last], [False, True])
    assert not conversation.ends_with_answer
    with pytest.raises(ValueError, match="conversation 0"):
        exact_match(*qa_model, [conversation])


def test_tools_are_in_the_question_as_in_training(qa_model: tuple[Any, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """The tokenizer's template does not support tools, so they are written into the prompt as text."""
    model, tokenizer = qa_model
    tool = {"type": "function", "function": {"name": "add", "parameters": {"type": "object", "properties": {}}}}
    asked: list[list[int]] = []
    generate = model.generate

    def recording(input_ids: Any, **options: Any) -> Any:
        asked.extend(input_ids.tolist())
        return generate(input_ids=input_ids, **options)

    monkeypatch.setattr(model, "generate", recording)
    exact_match(model, tokenizer, [conversation_of("x", "48", tools=[tool])])
    exact_match(model, tokenizer, [conversation_of("x", "48")])
    with_tools, without = map(tokenizer.decode, asked)
    assert '"add"' in with_tools
    assert '"add"' not in without
