"""Exact match: replies compared with the right answers, asked as they were trained."""

from __future__ import annotations

from typing import Any

import pytest

from sft.data.formats.conversation import Conversation
from sft.inference.exact_match import exact_match
from tests import pupil as pupils


@pytest.fixture(scope="module")
def pupil() -> tuple[Any, Any]:
    return pupils.make_pupil()


def with_answer(question: str, answer: str, **options: Any) -> Conversation:
    return Conversation("chat", pupils.with_answer(question, answer), [False, True], **options)


def test_exact_match_counts_to_the_letter(pupil: tuple[Any, Any]) -> None:
    done: list[int] = []
    result = exact_match(
        *pupil,
        [
            with_answer("x", " 48\n"),
            with_answer("capital of France", "paris"),
            with_answer("How many apples", "Two apples are left."),
            with_answer("x", "4"),
        ],
        on_progress=done.append,
    )
    assert (result.right, len(result.examples), sum(done)) == (2, 4, 4)
    second = result.examples[1]
    assert (second.question, second.answer, second.reply) == (pupils.ask("capital of France"), "paris", "Paris")
    assert str(second) == "'capital of France' -> 'Paris' (wrong, expected 'paris')"
    assert str(result.examples[0]) == "'x' -> '48' (right)"


def test_nothing_asked_is_nothing_right(pupil: tuple[Any, Any]) -> None:
    assert exact_match(*pupil, []).right == 0


@pytest.mark.parametrize("last", [{"role": "user", "content": "x"}, {"role": "assistant", "tool_calls": [{}]}])
def test_a_conversation_without_an_answer_in_words(pupil: tuple[Any, Any], last: dict[str, Any]) -> None:
    conversation = Conversation("chat", [*pupils.ask("x"), last], [False, True])
    assert not conversation.ends_with_answer
    with pytest.raises(ValueError, match="conversation 0"):
        exact_match(*pupil, [conversation])


def test_tools_are_in_the_question_as_in_training(pupil: tuple[Any, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """The tokenizer's own template has no place for tools, so that they are written as text: another question."""
    model, tokenizer = pupil
    tool = {"type": "function", "function": {"name": "add", "parameters": {"type": "object", "properties": {}}}}
    asked: list[list[int]] = []
    generate = model.generate

    def listening(input_ids: Any, **options: Any) -> Any:
        asked.extend(input_ids.tolist())
        return generate(input_ids=input_ids, **options)

    monkeypatch.setattr(model, "generate", listening)
    exact_match(model, tokenizer, [with_answer("x", "48", tools=[tool])])
    exact_match(model, tokenizer, [with_answer("x", "48")])
    with_tools, without = map(tokenizer.decode, asked)
    assert '"add"' in with_tools
    assert '"add"' not in without
