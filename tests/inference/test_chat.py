"""The chat: its commands, its messages, and the stream of a reply."""

from __future__ import annotations

import io
import sys
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from sft.inference.chat import chat, run_chat, stream_reply
from sft.inference.generate import Sampling
from sft.model.tokenizer import remember_system_prompt
from tests.inference.qa_model import FACTS, IM_END, ask, with_answer


def converse(
    qa_model: tuple[Any, Any], typed: str, monkeypatch: pytest.MonkeyPatch
) -> tuple[str, list[dict[str, Any]]]:
    monkeypatch.setattr(sys, "stdin", io.StringIO(typed))
    screen = io.StringIO()
    messages = run_chat(*qa_model, Sampling(30), Console(file=screen, width=100))
    return screen.getvalue(), messages


def test_a_chat_begins_with_the_system_prompt_of_the_training(
    qa_model_dir: Path, qa_model: tuple[Any, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    remember_system_prompt(qa_model[1], "Be brief.")
    qa_model[1].save_pretrained(qa_model_dir)
    remember_system_prompt(qa_model[1], None)
    for typed, system in [("", None), ("x\n/reset\n", None), ("", "Sing."), ("", "")]:
        monkeypatch.setattr(sys, "stdin", io.StringIO(typed))
        text = "Be brief." if system is None else system
        messages = chat(qa_model_dir, Sampling(2), system=system)
        assert messages == ([{"role": "system", "content": text}] if text else [])


def test_a_chat_from_a_pipe_ends_with_its_input(qa_model: tuple[Any, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    shown, messages = converse(qa_model, "x\n", monkeypatch)
    assert shown.split() == ["48"]
    assert messages == with_answer("x", "48")


def test_chat_commands(qa_model: tuple[Any, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    _, messages = converse(qa_model, "x\n\n/reset\ncapital of France\n/quit\nx\n", monkeypatch)
    assert messages == with_answer("capital of France", "Paris")
    _, messages = converse(qa_model, "x\n/system Be brief.\n", monkeypatch)
    assert messages == [{"role": "system", "content": "Be brief."}]
    shown, _ = converse(qa_model, "/help\n", monkeypatch)
    assert "/reset" in shown


def test_a_chat_keeps_its_turns(qa_model: tuple[Any, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    _, messages = converse(qa_model, "x\nx\n", monkeypatch)
    assert [message["role"] for message in messages] == ["user", "assistant", "user", "assistant"]


def test_a_full_conversation_is_reported_and_the_chat_continues(
    qa_model: tuple[Any, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    shown, messages = converse(qa_model, "z" * 600 + "\nx\n", monkeypatch)
    assert "fills all positions" in shown
    assert messages == with_answer("x", "48")


def test_a_stream_can_be_closed_early(qa_model: tuple[Any, Any]) -> None:
    model, tokenizer = qa_model
    stream = stream_reply(model, tokenizer, ask("How many apples"), Sampling(400))
    first = next(stream)
    stream.close()  # type: ignore[attr-defined]
    assert FACTS["How many apples"].startswith(first.strip())
    assert model.generation_config.eos_token_id == [IM_END, 0]


def test_an_error_of_the_model_reaches_the_caller(qa_model: tuple[Any, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    model, tokenizer = qa_model
    monkeypatch.setattr(model, "generate", lambda **_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        list(stream_reply(model, tokenizer, ask("x")))
