"""A merged model computes what base and adapter compute, for each kind of adapter and base."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import model_manager
from sft.config.schema import LoraKeys, ModelKeys, QuantizationKeys
from sft.errors import UserError
from sft.model import merging
from tests.builders import byte_level_tokenizer, tiny_llama
from tests.model.trained_models import IM_END, logits, trained

LORA: dict[str, dict[str, Any]] = {
    "lora": {},
    "dora": {"use_dora": True},
    "rslora": {"use_rslora": True},
    "pissa": {"init_lora_weights": "pissa"},
    "whole embeddings": {"modules_to_save": ["embed_tokens", "lm_head"]},
    "whole head": {"modules_to_save": ["lm_head"]},
    "lora on the head": {"target_modules": ["q_proj", "lm_head"]},
    "lora on the embeddings": {"target_modules": ["q_proj", "embed_tokens"]},
}


def saved_adapter(
    folder: Path, lora: dict[str, Any], quantization: dict[str, Any] | None, tied: bool, dtype: Any = "float32"
) -> tuple[Path, torch.Tensor, torch.Tensor]:
    """An adapter with two added tokens; returns its folder, probe tokens (1, T), and its logits on them."""
    tokenizer = byte_level_tokenizer()
    tiny_llama(len(tokenizer), tie_word_embeddings=tied).save_pretrained(folder / "base")
    tokenizer.save_pretrained(folder / "base")
    keys = ModelKeys(model_name_or_path=str(folder / "base"), special_tokens=["<|a|>", "<|b|>"], dtype=dtype)
    model, tokenizer = trained(keys, LoraKeys(r=2, **lora), QuantizationKeys(**quantization) if quantization else None)
    model_manager.save_final_model(model, tokenizer, folder / "adapter", [IM_END])
    probe = torch.tensor([[7, 8, len(tokenizer) - 2, 9, len(tokenizer) - 1, 10, IM_END]])
    return folder / "adapter", probe, logits(model, probe)


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("kind", LORA)
def test_each_kind_of_adapter_computes_the_same_after_merging(tmp_path: Path, kind: str, tied: bool) -> None:
    adapter, probe, expected = saved_adapter(tmp_path, LORA[kind], None, tied)
    report = model_manager.merge(adapter, tmp_path / "merged")
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    assert (logits(merged, probe) - expected).abs().max() < 1e-4
    in_memory, _ = model_manager.load_trained(adapter, merge_for_speed=True)
    assert (logits(in_memory, probe) - expected).abs().max() < 1e-4
    assert report.error < 1e-5
    assert report.effect > 1e-2
    assert (report.dtype, report.quantized_error) == ("float32", None)
    assert report.parameters == merged.num_parameters()


@pytest.mark.parametrize("lora", [{}, {"use_dora": True}], ids=["lora", "dora"])
def test_a_4bit_base_is_merged_as_it_was_trained(tmp_path: Path, lora: dict[str, Any]) -> None:
    adapter, probe, expected = saved_adapter(tmp_path, lora, {"load_in_4bit": True}, tied=False)
    report = model_manager.merge(adapter, tmp_path / "merged")
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    assert not hasattr(merged.config, "quantization_config")
    assert {p.dtype for p in merged.parameters()} == {torch.float32}
    assert (logits(merged, probe) - expected).abs().max() < 1e-4
    assert report.quantized_error is not None
    assert report.quantized_error < 1e-5
    # The common mistake, merging into the unrounded weights, gives another function.
    unrounded = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    difference = merged.model.layers[0].mlp.up_proj.weight - unrounded.model.layers[0].mlp.up_proj.weight
    assert torch.linalg.matrix_rank(difference) > 2


def test_an_8bit_base_is_merged_up_to_the_rounding_of_its_inputs(tmp_path: Path) -> None:
    adapter, probe, expected = saved_adapter(tmp_path, {}, {"load_in_8bit": True}, tied=False)
    report = model_manager.merge(adapter, tmp_path / "merged")
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    assert merging.relative_difference(logits(merged, probe), expected) < 3e-2
    assert report.error < 1e-5


def test_a_bfloat16_base_and_another_dtype(tmp_path: Path) -> None:
    adapter, probe, expected = saved_adapter(tmp_path, {}, None, tied=False, dtype="bfloat16")
    assert model_manager.merge(adapter, tmp_path / "merged").dtype == "bfloat16"
    assert model_manager.merge(adapter, tmp_path / "wide", dtype="float32").error < 1e-5
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    assert merged.dtype == torch.bfloat16
    assert merging.relative_difference(logits(merged, probe).float(), expected.float()) < 3e-2


def test_the_merged_folder_is_a_whole_model(tmp_path: Path) -> None:
    adapter, _, _ = saved_adapter(tmp_path, {}, None, tied=False)
    (tmp_path / "merged").mkdir()
    model_manager.merge(adapter, tmp_path / "merged")
    assert {path.name for path in (tmp_path / "merged").iterdir()} == {
        "config.json",
        "model.safetensors",
        "generation_config.json",
        "tokenizer.json",
        "tokenizer_config.json",
        "chat_template.jinja",
    }
    model, tokenizer = model_manager.load_trained(tmp_path / "merged")
    assert model.generation_config.eos_token_id == [IM_END, tokenizer.eos_token_id]
    assert tokenizer.chat_template == AutoTokenizer.from_pretrained(adapter).chat_template
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")]


def test_an_adapter_that_changes_nothing_is_logged(
    model_dir: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    keys, lora = ModelKeys(model_name_or_path=str(model_dir), dtype="float32"), LoraKeys(r=2)
    tokenizer = model_manager.load_tokenizer(keys)
    model = model_manager.load_model(
        keys, tokenizer, precision=model_manager.plan_precision(keys, lora, None), lora=lora
    )
    model_manager.save_final_model(model, tokenizer, tmp_path / "adapter", [IM_END])
    report = model_manager.merge(tmp_path / "adapter", tmp_path / "merged")
    assert report.effect == 0.0
    assert "changes nothing" in caplog.text


def test_a_wrong_merge_fails_and_leaves_no_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    adapter, _, _ = saved_adapter(tmp_path, {}, None, tied=False)
    written = merging.write_model

    def damage(model: Any, *rest: Any) -> None:
        with torch.no_grad():
            model.model.layers[0].mlp.up_proj.weight.mul_(1.1)
        written(model, *rest)

    monkeypatch.setattr(merging, "write_model", damage)
    with pytest.raises(RuntimeError, match="nothing was kept"):
        model_manager.merge(adapter, tmp_path / "merged")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["adapter", "base"]


def test_impossible_requests_are_refused(model_dir: Path, tmp_path: Path) -> None:
    adapter, _, _ = saved_adapter(tmp_path, {"lora_bias": True}, None, tied=False)
    with pytest.raises(UserError, match="nothing to merge"):
        model_manager.merge(model_dir, tmp_path / "merged")
    with pytest.raises(UserError, match="is not empty"):
        model_manager.merge(adapter, tmp_path / "base")
    with pytest.raises(UserError, match="no such folder"):
        model_manager.merge(tmp_path / "nowhere", tmp_path / "merged")
    with pytest.raises(UserError, match="no such dtype"):
        model_manager.merge(adapter, tmp_path / "merged", dtype="int8")
    with pytest.raises(UserError, match="cannot be merged"):
        model_manager.merge(adapter, tmp_path / "merged")
    assert not (tmp_path / "merged").exists()
