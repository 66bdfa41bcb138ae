"""A saved model or adapter loads as it was trained, in whatever folder the process starts."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoTokenizer, GenerationConfig

import model_manager
from sft.config.schema import LoraKeys, ModelKeys, QuantizationKeys
from sft.errors import UserError
from sft.model.saving import generation_config, stop_tokens
from sft.model.trained_models import find_base
from tests.builders import byte_level_tokenizer, tiny_llama
from tests.model.trained_models import IM_END, logits, trained


def test_stop_tokens_are_the_trained_ones_first_and_unique() -> None:
    tokenizer = byte_level_tokenizer()
    assert stop_tokens(tokenizer, [IM_END]) == [IM_END, tokenizer.eos_token_id]
    assert stop_tokens(tokenizer, [tokenizer.eos_token_id]) == [tokenizer.eos_token_id]
    assert stop_tokens(tokenizer, []) == [tokenizer.eos_token_id]


def test_a_base_with_sampling_settings_and_do_sample_false_can_be_saved(tmp_path: Path) -> None:
    tokenizer = byte_level_tokenizer()
    model = tiny_llama(len(tokenizer))
    model.generation_config.temperature = 0.6
    model.generation_config.repetition_penalty = 1.1
    generation_config(model, tokenizer, [IM_END]).save_pretrained(tmp_path)
    saved = GenerationConfig.from_pretrained(tmp_path)
    assert (saved.eos_token_id, saved.repetition_penalty) == ([IM_END, 0], 1.1)


@pytest.mark.parametrize("lora", [None, LoraKeys(r=2)], ids=["full", "adapter"])
def test_a_saved_model_is_complete_and_stops_on_the_trained_token(
    model_dir: Path, tmp_path: Path, lora: LoraKeys | None
) -> None:
    model, tokenizer = trained(ModelKeys(model_name_or_path=str(model_dir), dtype="float32"), lora)
    model_manager.save_final_model(model, tokenizer, tmp_path, [IM_END])
    files = {path.name for path in tmp_path.iterdir()}
    tokenizer_files = {"tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "generation_config.json"}
    if lora is None:
        assert files == tokenizer_files | {"config.json", "model.safetensors"}
        assert json.loads((tmp_path / "config.json").read_text())["use_cache"] is True
        assert model.config.use_cache is False
    else:
        assert files == tokenizer_files | {
            "adapter_config.json",
            "adapter_model.safetensors",
            "base_model.json",
            "README.md",
        }
    saved = json.loads((tmp_path / "generation_config.json").read_text())
    assert saved["eos_token_id"] == [IM_END, tokenizer.eos_token_id]
    assert saved["pad_token_id"] == tokenizer.pad_token_id
    assert AutoTokenizer.from_pretrained(tmp_path).chat_template == tokenizer.chat_template

    again, its_tokenizer = model_manager.load_trained(tmp_path)
    assert torch.equal(logits(again), logits(model))
    assert not again.training
    assert again.generation_config.eos_token_id == [IM_END, tokenizer.eos_token_id]
    assert its_tokenizer.get_vocab() == tokenizer.get_vocab()


CASES: dict[str, tuple[dict[str, Any], dict[str, Any] | None]] = {
    "dora": ({"use_dora": True}, None),
    "pissa": ({"init_lora_weights": "pissa"}, None),
    "randomized pissa": ({"init_lora_weights": "pissa_niter_4"}, None),
    "whole embeddings": ({"modules_to_save": ["embed_tokens", "lm_head"]}, None),
    "4 bits": ({}, {"load_in_4bit": True}),
    "8 bits": ({}, {"load_in_8bit": True}),
}


@pytest.mark.parametrize("case", CASES)
def test_adapters_of_each_kind_load_as_they_were_saved(model_dir: Path, tmp_path: Path, case: str) -> None:
    settings, quantization = CASES[case]
    keys = ModelKeys(model_name_or_path=str(model_dir), special_tokens=["<|a|>", "<|b|>"], dtype="float32")
    model, tokenizer = trained(
        keys, LoraKeys(r=2, **settings), QuantizationKeys(**quantization) if quantization else None
    )
    model_manager.save_final_model(model, tokenizer, tmp_path, [IM_END])
    probe = torch.tensor([[7, 8, len(tokenizer) - 2, len(tokenizer) - 1, 9]])
    expected = logits(model, probe)
    again, _ = model_manager.load_trained(tmp_path)
    assert torch.equal(logits(again, probe), expected)
    if quantization is None:
        merged, _ = model_manager.load_trained(tmp_path, merge_for_speed=True)
        assert not hasattr(merged, "peft_config")
        assert torch.allclose(logits(merged, probe), expected, atol=1e-4)
        assert merged.generation_config.eos_token_id == [IM_END, tokenizer.eos_token_id]
    else:
        kinds = {type(module).__name__ for module in again.modules()}
        assert "Linear4bit" in kinds or "Linear8bitLt" in kinds


def test_an_adapter_finds_its_base_from_another_folder_and_after_a_move(
    model_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tree = tmp_path / "tree"
    shutil.copytree(model_dir, tree / "base")
    monkeypatch.chdir(tree)
    model, tokenizer = trained(ModelKeys(model_name_or_path="base", dtype="float32"), LoraKeys(r=2))
    model_manager.save_final_model(model, tokenizer, "run/out", [IM_END])
    expected = logits(model)
    monkeypatch.chdir(tmp_path)
    assert torch.equal(logits(model_manager.load_trained(tree / "run" / "out")[0]), expected)
    tree.rename(tmp_path / "moved")
    assert torch.equal(logits(model_manager.load_trained("moved/run/out")[0]), expected)
    shutil.rmtree(tmp_path / "moved" / "base")
    with pytest.raises(UserError, match="base model of this adapter is not at") as caught:
        model_manager.load_trained("moved/run/out")
    assert caught.value.problems[0].file == str(Path("moved/run/out/adapter_config.json"))


def test_an_adapter_remembers_the_commit_of_its_base(model_dir: Path, tmp_path: Path) -> None:
    """Of a base from a hub: the branch `main` may change."""
    model, tokenizer = trained(ModelKeys(model_name_or_path=str(model_dir), dtype="float32"), LoraKeys(r=2))
    model_manager.save_final_model(model, tokenizer, tmp_path, [IM_END])
    assert find_base(tmp_path)[1]["revision"] is None, "a folder has no commits"
    model.get_base_model().config._commit_hash = "0123abcd"
    model_manager.save_final_model(model, tokenizer, tmp_path, [IM_END])
    assert find_base(tmp_path)[1]["revision"] == "0123abcd"


def test_an_adapter_that_peft_saved_loads(model_dir: Path, tmp_path: Path) -> None:
    keys = ModelKeys(model_name_or_path=str(model_dir), dtype="float32")
    model, tokenizer = trained(keys, LoraKeys(r=2))
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    assert torch.equal(logits(model_manager.load_trained(tmp_path)[0]), logits(model))


def test_an_adapter_with_missing_weights_is_refused(model_dir: Path, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    model, tokenizer = trained(ModelKeys(model_name_or_path=str(model_dir), dtype="float32"), LoraKeys(r=2))
    model_manager.save_final_model(model, tokenizer, tmp_path, [IM_END])
    weights = load_file(tmp_path / "adapter_model.safetensors")
    weights.pop(sorted(weights)[0])
    save_file(weights, tmp_path / "adapter_model.safetensors")
    with pytest.raises(UserError, match="is incomplete"):
        model_manager.load_trained(tmp_path)


def test_folders_without_a_model_are_refused(model_dir: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no such folder"):
        model_manager.load_trained(tmp_path / "nowhere")
    with pytest.raises(UserError, match="neither a model nor an adapter"):
        model_manager.load_trained(tmp_path)
    shutil.copy(model_dir / "config.json", tmp_path)
    with pytest.raises(UserError, match="tokenizer"):
        model_manager.load_trained(tmp_path)
