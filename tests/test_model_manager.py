"""Loading a model: which weights are trained, in which dtype, and every error."""

from __future__ import annotations

import json
import logging
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, BertConfig, BertLMHeadModel, BitsAndBytesConfig, T5Config

import model_manager
import sft_main
from sft.config.schema import LoraKeys, ModelKeys, QuantizationKeys
from sft.errors import UserError
from tests.builders import byte_level_tokenizer, tiny_llama
from tests.runs import arithmetic, write_config, write_rows


def load(
    keys: ModelKeys, lora: LoraKeys | None = None, quantization: QuantizationKeys | None = None, **more: Any
) -> Any:
    tokenizer = model_manager.load_tokenizer(keys)
    precision = model_manager.plan_precision(keys, lora, quantization)
    return tokenizer, model_manager.load_model(
        keys, tokenizer, precision=precision, lora=lora, quantization=quantization, **more
    )


def lora_keys(**keys: Any) -> LoraKeys:
    """Keys of peft that the schema has no field for, too."""
    return LoraKeys(**keys)


def quantization_keys(**keys: Any) -> QuantizationKeys:
    """Keys of bitsandbytes that the schema has no field for, too."""
    return QuantizationKeys(**keys)


def save_base(folder: Path, *, tied: bool = False, spare_rows: int = 0, pad: bool = True) -> ModelKeys:
    """Saves a tiny Llama with its tokenizer, and returns the keys that name it."""
    tokenizer = byte_level_tokenizer(pad=pad)
    tiny_llama(len(tokenizer) + spare_rows, tie_word_embeddings=tied).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return ModelKeys(model_name_or_path=str(folder))


def trainable(model: torch.nn.Module) -> set[str]:
    return {name for name, parameter in model.named_parameters() if parameter.requires_grad}


def backward(model: Any, last_id: int = 7) -> None:
    ids = torch.tensor([[5, 6, last_id, last_id]])
    model(input_ids=ids, labels=ids).loss.backward()


@pytest.fixture
def named(model_dir: Path) -> ModelKeys:
    return ModelKeys(model_name_or_path=str(model_dir), dtype="float32")


def test_full_fine_tuning_trains_everything(named: ModelKeys, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, logger="sft"):
        _, model = load(named)
    assert all(p.requires_grad and p.dtype == torch.float32 for p in model.parameters())
    assert model.config.use_cache is False
    assert model.config._attn_implementation == "sft_documents"
    total = sum(p.numel() for p in model.parameters())
    assert f"{total:,} of {total:,} weights are trained (100 %)" in caplog.text
    assert "Attention: sft_documents" in caplog.text
    assert "Precision: float32 weights as the config says" in caplog.text


def test_explicit_dtype_and_attention_are_honoured(model_dir: Path) -> None:
    keys = ModelKeys(model_name_or_path=str(model_dir), dtype="bfloat16", attn_implementation="eager")
    _, model = load(keys, LoraKeys(r=2))
    assert model.get_base_model().model.layers[0].mlp.up_proj.base_layer.weight.dtype == torch.bfloat16
    assert model.config._attn_implementation == "eager"
    assert {p.dtype for n, p in model.named_parameters() if "lora_" in n} == {torch.float32}


@pytest.mark.parametrize("checkpointing", [False, True])
def test_lora_trains_the_adapter_and_nothing_else(named: ModelKeys, checkpointing: bool) -> None:
    _, model = load(named, LoraKeys(r=2), gradient_checkpointing=checkpointing)
    names = trainable(model)
    assert len(names) == 2 * 7 * 2  # A and B, seven linear layers, two blocks
    assert all("lora_A" in name or "lora_B" in name for name in names)
    model.train()
    assert model.get_base_model().is_activation_checkpointing is checkpointing
    backward(model)
    grads = {n for n, p in model.named_parameters() if p.grad is not None and p.grad.abs().sum() > 0}
    assert grads == {name for name in names if "lora_B" in name}  # A gets its gradient through B, which is zero


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize(
    ("settings", "kind", "dtype"),
    [({"load_in_4bit": True}, "Linear4bit", torch.uint8), ({"load_in_8bit": True}, "Linear8bitLt", torch.int8)],
)
def test_quantized_layers_are_real_and_frozen(
    named: ModelKeys, settings: dict[str, Any], kind: str, dtype: torch.dtype, checkpointing: bool
) -> None:
    _, model = load(named, LoraKeys(r=2), QuantizationKeys(**settings), gradient_checkpointing=checkpointing)
    base = model.get_base_model()
    layer = base.model.layers[1].mlp.up_proj.base_layer
    assert type(layer).__name__ == kind
    assert layer.weight.dtype == dtype
    assert base.lm_head.weight.dtype == base.model.norm.weight.dtype == torch.float32
    assert all("lora_" in name for name in trainable(model))
    backward(model.train())
    first = model.get_base_model().model.layers[0].self_attn.q_proj.lora_B["default"].weight
    assert first.grad.abs().sum() > 0


def test_4bit_settings_are_applied_and_the_compute_dtype_follows_the_run(model_dir: Path) -> None:
    for dtype in ("float32", "bfloat16"):
        keys = ModelKeys(model_name_or_path=str(model_dir), dtype=dtype)
        _, model = load(keys, LoraKeys(r=2), QuantizationKeys(load_in_4bit=True))
        layer = model.get_base_model().model.layers[0].mlp.up_proj.base_layer
        assert layer.compute_dtype == getattr(torch, dtype)
        assert layer.weight.quant_state.quant_type == "nf4"
        assert layer.weight.quant_state.nested is True


def test_an_evaluation_does_not_change_4bit_arithmetic(named: ModelKeys) -> None:
    """bitsandbytes repacks 4-bit weights at the first evaluation on some CPUs: from then on they have no gradient."""
    _, model = load(named, LoraKeys(r=2), QuantizationKeys(load_in_4bit=True))
    ids = torch.arange(5, 25).reshape(2, 10)
    with torch.no_grad():
        trained = model.train()(input_ids=ids).logits
        evaluated = model.eval()(input_ids=ids).logits
    assert torch.equal(trained, evaluated)
    backward(model.train())
    first = model.get_base_model().model.layers[0].self_attn.q_proj.lora_B["default"].weight
    assert first.grad.abs().sum() > 0


def test_embeddings_grow_for_added_tokens_and_never_shrink(model_dir: Path, caplog: pytest.LogCaptureFixture) -> None:
    keys = ModelKeys(model_name_or_path=str(model_dir), special_tokens=["<|a|>", "<|b|>"])
    with caplog.at_level(logging.INFO, logger="sft"):
        tokenizer, model = load(keys)
    weight = model.get_input_embeddings().weight
    assert weight.shape[0] == model.config.vocab_size == len(tokenizer)
    assert torch.allclose(weight[-1], weight[:-2].mean(dim=0))
    assert f"grown by 2 rows to {len(tokenizer)}" in caplog.text
    assert "added to the vocabulary: <|a|>, <|b|>" in caplog.text

    wide = ModelKeys(model_name_or_path=str(model_dir), from_scratch={**SMALL, "vocab_size": 500})
    assert load(wide)[1].get_input_embeddings().weight.shape[0] == 500


@pytest.mark.parametrize("tied", [False, True])
def test_lora_trains_the_rows_of_added_tokens(tmp_path: Path, tied: bool, caplog: pytest.LogCaptureFixture) -> None:
    # Twelve spare rows, as many bases have: the added tokens need no growth, and are untrained all the same.
    keys = save_base(tmp_path, tied=tied, spare_rows=12).model_copy(update={"special_tokens": ["<|a|>", "<|b|>"]})
    with caplog.at_level(logging.INFO, logger="sft"):
        tokenizer, model = load(keys, LoraKeys(r=2))
    rows = [name for name in trainable(model) if "lora_" not in name]
    assert len(rows) == (1 if tied else 2)
    assert all("trainable_tokens_delta" in name for name in rows)
    assert "also trains the rows of 2 new tokens in embed_tokens" + ("" if tied else " and lm_head") in caplog.text
    backward(model, last_id=len(tokenizer) - 1)
    delta = model.get_input_embeddings().token_adapter.trainable_tokens_delta["default"]
    assert delta.shape[0] == 2
    assert delta.grad[1].abs().sum() > 0


def test_modules_to_save_replace_trained_rows(model_dir: Path) -> None:
    keys = ModelKeys(model_name_or_path=str(model_dir), special_tokens=["<|a|>"])
    _, model = load(keys, lora_keys(r=2, modules_to_save=["embed_tokens", "lm_head"]))
    whole = {name for name in trainable(model) if "lora_" not in name}
    assert len(whole) == 2
    assert all("modules_to_save" in name for name in whole)


def test_tied_embeddings_that_are_fully_trained_stay_tied(tmp_path: Path) -> None:
    keys = save_base(tmp_path, tied=True)
    for modules in (["embed_tokens", "lm_head"], ["lm_head"]):
        tokenizer, model = load(keys, lora_keys(r=2, modules_to_save=modules))
        base = model.get_base_model()
        whole = [p for n, p in model.named_parameters() if p.requires_grad and "lora_" not in n]
        assert [p.shape for p in whole] == [(len(tokenizer), 64)]
        assert base.model.embed_tokens.modules_to_save.default.weight is whole[0]
        assert base.lm_head.modules_to_save.default.weight is whole[0]


def test_a_missing_pad_token_changes_no_embedding(tmp_path: Path) -> None:
    tokenizer, model = load(save_base(tmp_path, pad=False), LoraKeys(r=2))
    assert tokenizer.pad_token == tokenizer.eos_token
    assert model.get_input_embeddings().weight.shape[0] == len(byte_level_tokenizer(pad=False))


SMALL = {
    "model_type": "llama",
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
}


@pytest.mark.parametrize("where", ["inline", "json", "yaml"])
def test_from_scratch(model_dir: Path, tmp_path: Path, where: str) -> None:
    value: Any = SMALL
    if where != "inline":
        value = str(tmp_path / f"config.{where}")
        Path(value).write_text(json.dumps(SMALL))  # JSON is YAML
    keys = ModelKeys(tokenizer_name_or_path=str(model_dir), from_scratch=value)
    weights = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        tokenizer, model = load(keys)
        weights.append(model.get_input_embeddings().weight)
    assert model.config.vocab_size == len(tokenizer)
    assert (model.config.eos_token_id, model.config.pad_token_id) == (tokenizer.eos_token_id, tokenizer.pad_token_id)
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], weights[2])


@pytest.mark.parametrize(
    ("settings", "key"),
    [
        ({**SMALL, "hidden_sise": 64}, "from_scratch.hidden_sise"),
        ({**SMALL, "model_type": "lama"}, "from_scratch.model_type"),
        ({**SMALL, "vocab_size": 10}, "from_scratch.vocab_size"),
        ({"model_type": "t5"}, "from_scratch.model_type"),
        ({"hidden_size": 64}, "from_scratch"),
        ({**SMALL, "num_attention_heads": 5}, "from_scratch"),
        ("nowhere.json", "from_scratch"),
    ],
)
def test_from_scratch_mistakes(model_dir: Path, settings: Any, key: str) -> None:
    with pytest.raises(UserError) as caught:
        load(ModelKeys(tokenizer_name_or_path=str(model_dir), from_scratch=settings))
    assert [p.key for p in caught.value.problems] == [key]


def problem_of(keys: ModelKeys, lora: LoraKeys | None = None, quantization: QuantizationKeys | None = None) -> Any:
    with pytest.raises(UserError) as caught:
        load(keys, lora, quantization)
    return caught.value.problems[0]


def test_a_path_that_does_not_exist_names_the_nearest(model_dir: Path) -> None:
    problem = problem_of(ModelKeys(model_name_or_path=str(model_dir) + "x"))
    assert problem.key == "model_name_or_path"
    assert str(model_dir) in problem.hint


def test_a_hub_name_without_network() -> None:
    problem = problem_of(ModelKeys(model_name_or_path="some-owner/some-model"))
    assert "from the hub" in problem.message
    assert "local folder" in problem.hint


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("config.json", "{", "cannot read the"),
        ("config.json", None, "holds no config.json"),
        ("model.safetensors", None, "holds no weights"),
        ("model.safetensors", "x", "cannot read the weights"),
    ],
)
def test_damaged_folders(model_dir: Path, tmp_path: Path, file: str, content: str | None, message: str) -> None:
    folder = Path(shutil.copytree(model_dir, tmp_path / "m"))
    if content is None:
        (folder / file).unlink()
    else:
        (folder / file).write_text(content)
    keys = ModelKeys(model_name_or_path=str(folder), tokenizer_name_or_path=str(model_dir))
    problem = problem_of(keys)
    assert problem.key == "model_name_or_path"
    assert message in problem.message


def test_missing_tensors_are_refused(model_dir: Path, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    folder = Path(shutil.copytree(model_dir, tmp_path / "m"))
    weights = load_file(folder / "model.safetensors")
    del weights["model.layers.1.mlp.up_proj.weight"]
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    problem = problem_of(ModelKeys(model_name_or_path=str(folder)))
    assert "lack 1 of the model's tensors" in problem.message
    assert "model.layers.1.mlp.up_proj.weight" in problem.message


def test_models_that_are_not_causal_language_models(model_dir: Path, tmp_path: Path) -> None:
    T5Config(d_model=16).save_pretrained(tmp_path / "t5")
    small = BertConfig(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16, vocab_size=400)
    BertLMHeadModel(small).save_pretrained(tmp_path / "bert")
    for name, message in (("t5", "not a causal language model"), ("bert", "is an encoder")):
        keys = ModelKeys(model_name_or_path=str(tmp_path / name), tokenizer_name_or_path=str(model_dir))
        assert message in problem_of(keys).message
        with pytest.raises(UserError, match=message):
            model_manager.check_model(keys)


def test_settings_that_do_not_fit_the_model(named: ModelKeys, model_dir: Path) -> None:
    assert problem_of(named, LoraKeys(), QuantizationKeys()).message.startswith("neither")
    problem = problem_of(named, LoraKeys(target_modules=["q_proj", "v_prj"]))
    assert problem.key == "lora_config.target_modules"
    assert "'v_prj'" in problem.message
    assert "down_proj, gate_proj, k_proj, lm_head, o_proj, q_proj, up_proj, v_proj" in problem.hint
    assert problem_of(named, LoraKeys(target_modules="nothing.*")).key == "lora_config.target_modules"
    assert problem_of(named, lora_keys(modules_to_save=["head"])).key == "lora_config.modules_to_save"
    assert problem_of(named, lora_keys(init_lora_weights="eva")).key == "lora_config.init_lora_weights"
    pissa = problem_of(named, lora_keys(init_lora_weights="pissa"), QuantizationKeys(load_in_4bit=True))
    assert "these are quantized" in pissa.message
    everything_skipped = quantization_keys(load_in_4bit=True, llm_int8_skip_modules=["model", "lm_head"])
    assert "no layer of the model was quantized" in problem_of(named, LoraKeys(), everything_skipped).message
    bad_attention = ModelKeys(model_name_or_path=str(model_dir), attn_implementation="sdpaa")
    assert problem_of(bad_attention).key == "attn_implementation"
    assert problem_of(ModelKeys()).key == "tokenizer_name_or_path"


def test_an_adapter_is_not_a_base(named: ModelKeys, tmp_path: Path) -> None:
    tokenizer, model = load(named, LoraKeys(r=2))
    model_manager.save_final_model(model, tokenizer, tmp_path / "adapter", [2])
    problem = problem_of(ModelKeys(model_name_or_path=str(tmp_path / "adapter")))
    assert "holds an adapter" in problem.message
    parent = problem_of(ModelKeys(model_name_or_path=str(tmp_path), tokenizer_name_or_path=named.model_name_or_path))
    assert "These folders in it hold one: adapter" in parent.hint


@pytest.fixture
def quantized_files(model_dir: Path, tmp_path: Path) -> ModelKeys:
    """A base whose own files hold 4-bit weights."""
    four_bits = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")
    model = AutoModelForCausalLM.from_pretrained(model_dir, quantization_config=four_bits, dtype=torch.float32)
    shutil.copytree(model_dir, tmp_path / "quantized", ignore=shutil.ignore_patterns("*.safetensors"))
    model.save_pretrained(tmp_path / "quantized")
    return ModelKeys(model_name_or_path=str(tmp_path / "quantized"), dtype="float32")


def test_a_base_with_quantized_files_needs_an_adapter(quantized_files: ModelKeys) -> None:
    with pytest.raises(UserError, match="quantized to 4 bits, and cannot be trained without an adapter") as caught:
        model_manager.check_model(quantized_files)
    assert caught.value.problems[0].key == "model_name_or_path"
    assert "lora_config" in caught.value.problems[0].hint
    problem = problem_of(quantized_files)  # as for a model whose config does not show it
    assert (problem.key, problem.message) == (
        "model_name_or_path",
        "its weights are quantized (bitsandbytes), and cannot be trained",
    )
    model_manager.check_model(quantized_files, LoraKeys())
    _, model = load(quantized_files, LoraKeys(r=2))
    assert all("lora_" in name for name in trainable(model))
    backward(model.train())


def test_its_adapter_has_the_same_gradients_after_an_evaluation(quantized_files: ModelKeys) -> None:
    """If bitsandbytes repacked the weights in evaluation, the layers below would get no gradient."""
    _, model = load(quantized_files, LoraKeys(r=2))
    first = model.get_base_model().model.layers[0].self_attn.q_proj.lora_B["default"].weight
    gradients = []
    for _ in range(2):
        model.zero_grad()
        backward(model.train())
        gradients.append(first.grad.clone())
        with torch.no_grad():
            model.eval()(input_ids=torch.tensor([[5, 6, 7]]))
    assert gradients[0].abs().sum() > 0
    assert gradients[1].equal(gradients[0])


def test_check_reports_it_too(quantized_files: ModelKeys, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config_file = write_config(
        tmp_path / "run.yaml",
        model_name_or_path=quantized_files.model_name_or_path,
        train_file=str(write_rows(tmp_path / "train.jsonl", arithmetic(12))),
        output_dir=str(tmp_path / "out"),
        cache_dir=str(tmp_path / "cache"),
    )
    assert sft_main.main(["check", "--config_file", str(config_file), "--json"]) == 2
    (told,) = json.loads(capsys.readouterr().out)["errors"]
    assert (told["key"], told["line"]) == ("model_name_or_path", 1)
    assert sft_main.main(["check", "--config_file", str(config_file), "--json", "lora_config.r=2"]) == 0


def test_check_model_reads_no_weights(named: ModelKeys) -> None:
    model_manager.check_model(named)
    model_manager.check_model(ModelKeys(from_scratch=SMALL))
    with pytest.raises(UserError, match="unknown setting"):
        model_manager.check_model(ModelKeys(from_scratch={**SMALL, "layers": 3}))
