"""A file of prompts is answered into a file or to stdout."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from sft.errors import UserError
from sft.inference.batch import run_batch
from sft.inference.generate import Sampling
from sft.model.tokenizer import remember_system_prompt
from tests.inference.qa_model import ask
from tests.runs import write_rows


def test_a_batch_from_a_file_to_a_file(qa_model_dir: Path, tmp_path: Path) -> None:
    system = [{"role": "system", "content": "s"}, *ask("x")]
    rows: list[dict[str, Any]] = [{"prompt": "x"}, {"messages": system}]
    write_rows(tmp_path / "p.jsonl", rows)
    run_batch(qa_model_dir, tmp_path / "p.jsonl", tmp_path / "new" / "out.jsonl", Sampling(8))
    written = [json.loads(line) for line in (tmp_path / "new" / "out.jsonl").read_text().splitlines()]
    assert written[0] == {"prompt": "x", "response": "48"}
    assert written[1]["messages"] == system
    assert written[1].keys() == {"messages", "response"}


def test_a_batch_to_stdout_prints_only_json_lines(
    qa_model_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "p.txt").write_text("x\n")
    run_batch(qa_model_dir, tmp_path / "p.txt", None, Sampling(8))
    assert json.loads(capsys.readouterr().out) == {"prompt": "x", "response": "48"}


def test_the_system_prompt_of_the_training_is_the_default(
    qa_model_dir: Path, tmp_path: Path, qa_model: tuple[Any, Any], caplog: pytest.LogCaptureFixture
) -> None:
    tokenizer = qa_model[1]
    own = {"role": "system", "content": "mine"}
    rows: list[dict[str, Any]] = [{"prompt": "x"}, {"messages": [own, *ask("x")]}]
    write_rows(tmp_path / "p.jsonl", rows)

    def first_messages(system: str | None) -> list[Any]:
        written = run_batch(qa_model_dir, tmp_path / "p.jsonl", tmp_path / "out", Sampling(1), system=system)
        return [row["messages"][0] if "messages" in row else row["prompt"] for row in written]

    assert first_messages(None) == ["x", own]
    remember_system_prompt(tokenizer, "Be brief.")
    tokenizer.save_pretrained(qa_model_dir)
    caplog.set_level("INFO")
    assert first_messages(None) == [{"role": "system", "content": "Be brief."}, own]
    assert caplog.text.count("System prompt, as in training: 'Be brief.'") == 1
    assert first_messages("Sing.") == [{"role": "system", "content": "Sing."}, own]
    assert first_messages("") == ["x", own]
    remember_system_prompt(tokenizer, None)  # trained again, without one
    tokenizer.save_pretrained(qa_model_dir)
    assert first_messages(None) == ["x", own]


def test_mistakes_are_found_before_the_model_is_loaded(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no such file"):
        run_batch(tmp_path / "no model", tmp_path / "no prompts.txt", None)
    (tmp_path / "p.txt").write_text("x\n")
    with pytest.raises(UserError, match="is a folder"):
        run_batch(tmp_path / "no model", tmp_path / "p.txt", tmp_path)
