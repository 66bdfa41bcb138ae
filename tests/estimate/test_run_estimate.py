"""The numbers of `estimate`, for real configs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from transformers import LlamaForCausalLM

import sft_main
from sft.estimate import run_estimate
from tests.builders import save_model_dir
from tests.runs import arithmetic, write_config, write_rows


@pytest.fixture
def keys(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    monkeypatch.setenv("SFT_CACHE", str(tmp_path / "cache"))
    return {
        "model_name_or_path": str(save_model_dir(tmp_path / "model")),
        "dtype": "float32",
        "train_file": str(write_rows(tmp_path / "train.jsonl", arithmetic(60))),
        "output_dir": str(tmp_path / "out"),
        "max_seq_length": 128,
        "packing": False,
        "per_device_train_batch_size": 4,
        "gradient_accumulation_steps": 2,
        "num_train_epochs": 2,
        "logging_steps": 1,
    }


def estimated(tmp_path: Path, keys: dict[str, Any], capsys: pytest.CaptureFixture[str]) -> dict[str, Any]:
    config = write_config(tmp_path / "run.yaml", **keys)
    assert sft_main.main(["estimate", "--config_file", str(config), "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def test_weights_gradients_and_optimizer_are_exact(
    keys: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    told = estimated(tmp_path, keys, capsys)
    model = LlamaForCausalLM.from_pretrained(keys["model_name_or_path"])
    weights = 4 * sum(p.numel() for p in model.parameters())
    buffers = 4 * sum(b.numel() for b in model.buffers())
    assert told["memory"]["weights"] == weights + buffers
    assert told["memory"]["gradients"] == weights
    assert told["memory"]["optimizer"] == 2 * weights
    assert told["memory"]["peak"] >= sum(told["memory"][name] for name in ("weights", "gradients", "process"))
    assert told["fits"]
    assert (told["steps_per_epoch"], told["total_steps"]) == (8, 16)
    assert told["total_tokens"] == 2 * told["tokens_per_epoch"]
    assert told["longest_pass"]["rows"] == 4
    assert told["longest_pass"]["tokens"] > told["longest_pass"]["trained_tokens"] > 0
    assert not (tmp_path / "out").exists(), "an estimate leaves nothing"


def test_masters_adapters_and_quantized_weights_are_counted(
    keys: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    full = estimated(tmp_path, keys, capsys)["memory"]
    masters = estimated(tmp_path, {**keys, "dtype": "bfloat16"}, capsys)["memory"]
    assert masters["gradients"] == full["gradients"]
    assert masters["optimizer"] == full["optimizer"] * 3 // 2
    lora = estimated(tmp_path, {**keys, "lora_config": {"r": 4}}, capsys)["memory"]
    assert lora["gradients"] == 4 * 8192
    assert lora["optimizer"] == 2 * lora["gradients"]
    packed = {"load_in_4bit": True, "bnb_4bit_use_double_quant": False}
    qlora = estimated(tmp_path, {**keys, "lora_config": {"r": 4}, "quantization_config": packed}, capsys)["memory"]
    linear = 2 * (2 * 64 * 64 + 2 * 32 * 64 + 3 * 64 * 128)
    assert lora["weights"] - qlora["weights"] == pytest.approx(linear * (4 - 0.5 - 4 / 64), rel=0.02)


def test_split_masters_are_counted(keys: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """With 8-bit states 2 bytes per weight; bfloat16 gradients, but the head's, if a step is one micro-batch."""
    keys = {**keys, "dtype": "bfloat16", "optim": "adamw_8bit"}
    whole = estimated(tmp_path, {**keys, "optim": "adamw_torch"}, capsys)["memory"]
    summed = estimated(tmp_path, keys, capsys)["memory"]
    single = estimated(tmp_path, {**keys, "gradient_accumulation_steps": 1}, capsys)["memory"]
    model: Any = LlamaForCausalLM.from_pretrained(keys["model_name_or_path"])
    weights = sum(p.numel() for p in model.parameters())
    head = model.get_output_embeddings().weight.numel()
    assert summed["gradients"] == whole["gradients"] == 4 * weights
    assert single["gradients"] == 2 * (weights - head) + 4 * head
    assert 4 * weights < summed["optimizer"] < 6 * weights < whole["optimizer"]


def test_a_batch_size_that_is_not_chosen_yet_is_assumed(
    keys: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    keys = {**keys, "per_device_train_batch_size": "auto", "global_batch_size": 8}
    del keys["gradient_accumulation_steps"]
    told = estimated(tmp_path, keys, capsys)
    assert (told["longest_pass"]["rows"], told["global_batch_size"], told["total_steps"]) == (1, 8, 16)
    assert told["assumes_batch_size"]
    config = write_config(tmp_path / "run.yaml", **keys)
    assert sft_main.main(["estimate", "--config_file", str(config)]) == 0
    shown = " ".join(capsys.readouterr().err.split())
    assert "auto is chosen when the run starts; assumed here: 1 sequences per micro-batch, 8 per step" in shown
    assert "auto is chosen when the run starts; these rows are assumed" in shown


def test_the_minimum_time_follows_from_the_operations(
    keys: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """6 operations for each weight but the input embedding's and each token, 4 for frozen ones (`sft.training.mfu`)."""
    monkeypatch.setattr(run_estimate, "measure_flops_per_second", lambda *_: 1e9)
    told = estimated(tmp_path, keys, capsys)
    model: Any = LlamaForCausalLM.from_pretrained(keys["model_name_or_path"])
    weights = sum(p.numel() for p in model.parameters()) - model.get_input_embeddings().weight.numel()
    assert told["seconds_at_least"] == pytest.approx(6 * weights * told["total_tokens"] / 1e9)
    assert not told["assumes_batch_size"]


def test_check_has_the_estimate_too(keys: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    told = estimated(tmp_path, keys, capsys)
    config = write_config(tmp_path / "run.yaml", **keys)
    assert sft_main.main(["check", "--config_file", str(config), "--json"]) == 0
    checked = json.loads(capsys.readouterr().out)["estimate"]
    assert checked.keys() == told.keys()
    varying = {"process", "peak"}
    for name in told["memory"].keys() - varying:
        assert checked["memory"][name] == told["memory"][name]
    assert (checked["total_steps"], checked["longest_pass"]) == (told["total_steps"], told["longest_pass"])


def test_the_peak_on_a_cpu_is_called_a_lower_bound(
    keys: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = write_config(tmp_path / "run.yaml", use_cpu=True, **keys)
    assert sft_main.main(["estimate", "--config_file", str(config)]) == 0
    assert "The peak is a lower bound: malloc keeps more" in " ".join(capsys.readouterr().err.split())
