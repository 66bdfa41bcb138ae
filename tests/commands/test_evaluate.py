"""`evaluate` and `merge`: the run's own numbers again."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

import sft_main
from tests.builders import byte_level_tokenizer, tiny_llama


def test_evaluate_gives_the_run_its_own_numbers_again(
    config_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    sft_main.main(["--config_file", str(config_file)])
    capsys.readouterr()
    assert sft_main.main(["evaluate", "--config_file", str(config_file), "--json"]) == 0
    results = json.loads(capsys.readouterr().out)
    saved = json.loads((tmp_path / "out" / "logs" / "eval_results.json").read_text())
    assert results["eval_loss"] == pytest.approx(saved["eval_loss"], abs=1e-6)
    assert results["eval_tokens"] == saved["eval_tokens"]
    assert results["datasets"]["validation"]["eval_tokens"] == saved["eval_tokens"]


def test_evaluate_logs_what_it_measures_and_warns_if_the_config_trains_something_else(
    config_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    sft_main.main(["--config_file", str(config_file), "max_steps=1"])
    capsys.readouterr()
    assert sft_main.main(["evaluate", "--config_file", str(config_file)]) == 0
    said = capsys.readouterr().err
    assert f"Measuring the adapter in {tmp_path / 'out'}" in " ".join(said.split())
    assert "something else" not in said
    assert sft_main.main(["evaluate", "--config_file", str(config_file), "lora_config=null"]) == 0
    assert "The config trains a whole model, and output_dir holds something else" in " ".join(
        capsys.readouterr().err.split()
    )


def test_a_base_is_evaluated_with_the_prompts_of_training(
    config_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A base as it comes: no pad token, no template, and without the token that the config adds."""
    tokenizer = byte_level_tokenizer(chat_template=None, pad=False)
    tiny_llama(len(tokenizer)).save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    keys = [f"model_name_or_path={tmp_path / 'base'}", "chat_template=chatml", "special_tokens=[<|new|>]"]
    keys += ["lora_config=null", "max_steps=1", "learning_rate=0", "dtype=float32"]
    assert sft_main.main(["--config_file", str(config_file), *keys]) == 0
    saved = json.loads((tmp_path / "out" / "logs" / "eval_results.json").read_text())
    capsys.readouterr()
    evaluate = ["evaluate", "--config_file", str(config_file), "--model", str(tmp_path / "base"), "--json"]
    assert sft_main.main([*evaluate, *keys]) == 0
    results = json.loads(capsys.readouterr().out)
    assert results["eval_loss"] == pytest.approx(saved["eval_loss"], abs=1e-6)
    assert results["eval_tokens"] == saved["eval_tokens"]


def test_merge_then_evaluate_gives_the_adapters_numbers(
    config_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    sft_main.main(["--config_file", str(config_file)])
    merged = tmp_path / "merged"
    assert sft_main.main(["merge", "--model", str(tmp_path / "out"), "--output_dir", str(merged)]) == 0
    capsys.readouterr()
    sft_main.main(["evaluate", "--config_file", str(config_file), "--model", str(merged), "--json"])
    results = json.loads(capsys.readouterr().out)
    saved = json.loads((tmp_path / "out" / "logs" / "eval_results.json").read_text())
    assert results["eval_loss"] == pytest.approx(saved["eval_loss"], abs=1e-4)
