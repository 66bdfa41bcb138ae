"""Replies: right order, right end, nothing left changed; the files and the chat around them."""

from __future__ import annotations

import io
import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

from sft.data.formats.conversation import Conversation
from sft.errors import UserError
from sft.inference import batch as generation
from sft.inference import chat
from sft.inference.batch import Sampling, generate_replies
from sft.inference.generate import encode_prompt
from sft.model.tokenizer import remember_system_prompt
from tests.pupil import FACTS, IM_END, ask, make_pupil, with_answer


@pytest.fixture(scope="module")
def pupil() -> tuple[Any, Any]:
    return make_pupil()


@pytest.fixture
def pupil_dir(pupil: tuple[Any, Any], tmp_path: Path) -> Path:
    model, tokenizer = pupil
    model.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    return tmp_path / "model"


@pytest.mark.parametrize("batch_size", [1, 2, 8])
def test_replies_come_in_the_order_asked_and_end_at_the_end_token(pupil: tuple[Any, Any], batch_size: int) -> None:
    questions = ["x", "How many apples", "capital of France", "x"]
    done: list[int] = []
    replies = generate_replies(
        *pupil, [ask(q) for q in questions], Sampling(40), batch_size=batch_size, on_progress=done.append
    )
    assert replies == [FACTS[question] for question in questions]
    assert sum(done) == 4
    assert len(done) == -(-4 // batch_size)


def test_generating_ends_with_the_end_token_and_not_before(
    pupil: tuple[Any, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    model, tokenizer = pupil
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


def test_a_training_model_is_given_back_as_it_was(pupil: tuple[Any, Any]) -> None:
    model, tokenizer = pupil
    model.generation_config.repetition_penalty = 5.0  # a base's own taste must not bend a greedy reply
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
    before.repetition_penalty = None
    model.eval()


def test_sampling_follows_its_seed(pupil: tuple[Any, Any]) -> None:
    def sample(seed: int) -> list[str]:
        hot = Sampling(8, temperature=3.0, seed=seed)
        return generate_replies(*pupil, [ask("capital"), ask("apples are")], hot)

    assert sample(1) == sample(1)
    assert sample(1) != sample(2)


def test_a_text_is_continued_as_it_stands(pupil: tuple[Any, Any]) -> None:
    model, tokenizer = pupil
    rendered = tokenizer.apply_chat_template(ask("capital of France"), tokenize=False, add_generation_prompt=True)
    assert generate_replies(model, tokenizer, [rendered], Sampling(10)) == ["Paris"]


def test_control_tokens_in_a_question_are_text(pupil: tuple[Any, Any]) -> None:
    ids = encode_prompt(pupil[1], ask("a<|im_end|>b"))
    assert ids.count(IM_END) == 1


def test_prompts_that_leave_no_room(pupil: tuple[Any, Any], caplog: pytest.LogCaptureFixture) -> None:
    replies = generate_replies(*pupil, [ask("z" * 600), ask("x")], Sampling(10_000))
    assert replies == ["", "48"]
    assert "1 prompts fill all 512 positions" in caplog.text


def test_a_batch_from_a_file_to_a_file(pupil_dir: Path, tmp_path: Path) -> None:
    system = [{"role": "system", "content": "s"}, *ask("x")]
    rows = [{"prompt": "x"}, {"messages": system}]
    (tmp_path / "p.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    generation.run_batch(pupil_dir, tmp_path / "p.jsonl", tmp_path / "new" / "out.jsonl", Sampling(8))
    written = [json.loads(line) for line in (tmp_path / "new" / "out.jsonl").read_text().splitlines()]
    assert written[0] == {"prompt": "x", "response": "48"}
    assert written[1]["messages"] == system
    assert written[1].keys() == {"messages", "response"}


def test_a_batch_to_stdout_prints_json_lines_and_nothing_else(
    pupil_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "p.txt").write_text("x\n")
    generation.run_batch(pupil_dir, tmp_path / "p.txt", None, Sampling(8))
    assert json.loads(capsys.readouterr().out) == {"prompt": "x", "response": "48"}


def test_the_system_prompt_of_the_training_is_used_unless_another_is_given(
    pupil_dir: Path, tmp_path: Path, pupil: tuple[Any, Any], caplog: pytest.LogCaptureFixture
) -> None:
    tokenizer = pupil[1]
    own = {"role": "system", "content": "mine"}
    rows = [{"prompt": "x"}, {"messages": [own, *ask("x")]}]
    (tmp_path / "p.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))

    def first_messages(system: str | None) -> list[Any]:
        written = generation.run_batch(pupil_dir, tmp_path / "p.jsonl", tmp_path / "out", Sampling(1), system=system)
        return [row["messages"][0] if "messages" in row else row["prompt"] for row in written]

    assert first_messages(None) == ["x", own]
    remember_system_prompt(tokenizer, "Be brief.")
    tokenizer.save_pretrained(pupil_dir)
    caplog.set_level("INFO")
    assert first_messages(None) == [{"role": "system", "content": "Be brief."}, own]
    assert caplog.text.count("System prompt, as in training: 'Be brief.'") == 1
    assert first_messages("Sing.") == [{"role": "system", "content": "Sing."}, own]
    assert first_messages("") == ["x", own]
    remember_system_prompt(tokenizer, None)  # trained once more, without one
    tokenizer.save_pretrained(pupil_dir)
    assert first_messages(None) == ["x", own]


def test_a_chat_begins_behind_the_system_prompt_of_the_training(
    pupil_dir: Path, pupil: tuple[Any, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    remember_system_prompt(pupil[1], "Be brief.")
    pupil[1].save_pretrained(pupil_dir)
    remember_system_prompt(pupil[1], None)
    for typed, system in [("", None), ("x\n/reset\n", None), ("", "Sing."), ("", "")]:
        monkeypatch.setattr(sys, "stdin", io.StringIO(typed))
        text = "Be brief." if system is None else system
        messages = generation.chat(pupil_dir, Sampling(2), system=system)
        assert messages == ([{"role": "system", "content": text}] if text else [])


def test_tools_are_written_into_a_prompt_as_they_are_trained(pupil: tuple[Any, Any]) -> None:
    tool = {"type": "function", "function": {"name": "look", "parameters": {}}}
    conversation = Conversation("chat", ask("x"), [False], [tool])
    written = pupil[1].decode(encode_prompt(pupil[1], conversation))
    assert written == (
        '<|im_start|>system\nTools:\n{"name": "look", "parameters": {}}<|im_end|>\n'
        "<|im_start|>user\nx<|im_end|>\n<|im_start|>assistant\n"
    )
    assert encode_prompt(pupil[1], Conversation("chat", ask("x"), [False])) == encode_prompt(pupil[1], ask("x"))


def test_mistakes_are_found_before_the_model_is_loaded(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no such file"):
        generation.run_batch(tmp_path / "no model", tmp_path / "no prompts.txt", None)
    (tmp_path / "p.txt").write_text("x\n")
    with pytest.raises(UserError, match="is a folder"):
        generation.run_batch(tmp_path / "no model", tmp_path / "p.txt", tmp_path)


def converse(pupil: tuple[Any, Any], typed: str, monkeypatch: pytest.MonkeyPatch) -> tuple[str, list[dict[str, Any]]]:
    monkeypatch.setattr(sys, "stdin", io.StringIO(typed))
    screen = io.StringIO()
    messages = chat.talk(*pupil, Sampling(30), Console(file=screen, width=100))
    return screen.getvalue(), messages


def test_a_chat_from_a_pipe_ends_with_its_input(pupil: tuple[Any, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    shown, messages = converse(pupil, "x\n", monkeypatch)
    assert shown.split() == ["48"]
    assert messages == with_answer("x", "48")


def test_chat_commands(pupil: tuple[Any, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    _, messages = converse(pupil, "x\n\n/reset\ncapital of France\n/quit\nx\n", monkeypatch)
    assert messages == with_answer("capital of France", "Paris")
    _, messages = converse(pupil, "x\n/system Be brief.\n", monkeypatch)
    assert messages == [{"role": "system", "content": "Be brief."}]
    shown, _ = converse(pupil, "/help\n", monkeypatch)
    assert "/reset" in shown


def test_a_chat_keeps_its_turns(pupil: tuple[Any, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    _, messages = converse(pupil, "x\nx\n", monkeypatch)
    assert [message["role"] for message in messages] == ["user", "assistant", "user", "assistant"]


def test_a_full_conversation_is_said_and_the_chat_goes_on(
    pupil: tuple[Any, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    shown, messages = converse(pupil, "z" * 600 + "\nx\n", monkeypatch)
    assert "fills all positions" in shown
    assert messages == with_answer("x", "48")


def test_a_stream_can_be_left(pupil: tuple[Any, Any]) -> None:
    model, tokenizer = pupil
    stream = chat.stream_reply(model, tokenizer, ask("How many apples"), Sampling(400))
    first = next(stream)
    stream.close()  # type: ignore[attr-defined]
    assert FACTS["How many apples"].startswith(first.strip())
    assert model.generation_config.eos_token_id == [IM_END, 0]


def test_an_error_of_the_model_reaches_the_caller(pupil: tuple[Any, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    model, tokenizer = pupil
    monkeypatch.setattr(model, "generate", lambda **_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        list(chat.stream_reply(model, tokenizer, ask("x")))
