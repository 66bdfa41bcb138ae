"""Replies of a loaded model: their order and end, and the model's state afterwards."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from sft.data.formats.conversation import Conversation
from sft.inference.generate import Sampling, encode_prompt, generate_replies
from tests.inference.qa_model import FACTS, IM_END, ask


@pytest.mark.parametrize("batch_size", [1, 2, 8])
def test_replies_keep_the_order_of_the_prompts_and_end_at_the_end_token(
    qa_model: tuple[Any, Any], batch_size: int
) -> None:
    questions = ["x", "How many apples", "capital of France", "x"]
    done: list[int] = []
    replies = generate_replies(
        *qa_model, [ask(q) for q in questions], Sampling(40), batch_size=batch_size, on_progress=done.append
    )
    assert replies == [FACTS[question] for question in questions]
    assert sum(done) == 4
    assert len(done) == -(-4 // batch_size)


def test_generation_stops_at_the_end_token_and_not_before(
    qa_model: tuple[Any, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    model, tokenizer = qa_model
    made: list[int] = []
    generate = model.generate

    def counted(input_ids: torch.Tensor, **settings: Any) -> torch.Tensor:
        output = generate(input_ids=input_ids, **settings)
        made.append(output.shape[1] - input_ids.shape[1])
        return output

    monkeypatch.setattr(model, "generate", counted)
    for stops in (None, [0]):  # the generation config's <|im_end|>, and an end token that is never produced
        generate_replies(model, tokenizer, [ask("x")], Sampling(12), stop_token_ids=stops)
    assert made == [len(tokenizer.encode("48")) + 1, 12]


def test_the_state_of_a_model_in_training_is_restored(
    qa_model: tuple[Any, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    model, tokenizer = qa_model
    monkeypatch.setattr(model.generation_config, "repetition_penalty", 5.0)  # must not change a greedy reply
    before = model.generation_config
    model.train()
    torch.manual_seed(3)
    state = torch.get_rng_state()
    assert generate_replies(model, tokenizer, [ask("How many apples")], Sampling(40)) == [FACTS["How many apples"]]
    generate_replies(model, tokenizer, [ask("x")], Sampling(4, temperature=1.0))
    assert model.training
    assert model.config.use_cache is False
    assert model.generation_config is before
    assert torch.equal(torch.get_rng_state(), state)
    model.eval()


def test_sampling_follows_its_seed(qa_model: tuple[Any, Any]) -> None:
    def sample(seed: int) -> list[str]:
        hot = Sampling(8, temperature=3.0, seed=seed)
        return generate_replies(*qa_model, [ask("capital"), ask("apples are")], hot)

    assert sample(1) == sample(1)
    assert sample(1) != sample(2)


def test_a_text_is_continued_without_a_template(qa_model: tuple[Any, Any]) -> None:
    model, tokenizer = qa_model
    rendered = tokenizer.apply_chat_template(ask("capital of France"), tokenize=False, add_generation_prompt=True)
    assert generate_replies(model, tokenizer, [rendered], Sampling(10)) == ["Paris"]


def test_control_tokens_in_a_question_are_text(qa_model: tuple[Any, Any]) -> None:
    ids = encode_prompt(qa_model[1], ask("a<|im_end|>b"))
    assert ids.count(IM_END) == 1


def test_prompts_that_fill_all_positions_get_no_reply(
    qa_model: tuple[Any, Any], caplog: pytest.LogCaptureFixture
) -> None:
    replies = generate_replies(*qa_model, [ask("z" * 600), ask("x")], Sampling(10_000))
    assert replies == ["", "48"]
    assert "1 prompts fill all 512 positions" in caplog.text


def test_tools_are_written_into_a_prompt_as_in_training(qa_model: tuple[Any, Any]) -> None:
    tool = {"type": "function", "function": {"name": "look", "parameters": {}}}
    conversation = Conversation("chat", ask("x"), [False], [tool])
    written = qa_model[1].decode(encode_prompt(qa_model[1], conversation))
    assert written == (
        '<|im_start|>system\nTools:\n{"name": "look", "parameters": {}}<|im_end|>\n'
        "<|im_start|>user\nx<|im_end|>\n<|im_start|>assistant\n"
    )
    assert encode_prompt(qa_model[1], Conversation("chat", ask("x"), [False])) == encode_prompt(qa_model[1], ask("x"))
