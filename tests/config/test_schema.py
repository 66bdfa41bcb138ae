"""Every key of the schema: its facts match the installed libraries, and its value reaches their classes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from sft.config.error_messages import list_keys
from sft.config.field_types import section_class
from sft.config.loading import load_config
from sft.config.schema import GROUPS, SECRET_KEYS, Config, DataKeys, LoraKeys, ModelKeys, QuantizationKeys, TrainingKeys
from sft.config.upstream_docs import LIMITS, MEANINGS
from sft.config.upstream_schema import FACTS_FILE, facts, installed_facts

# Values other than the default, where the type alone does not give a valid one.
TRAINING_VALUES: dict[str, Any] = {
    "max_steps": 7,
    "optim": "adafactor",
    "warmup_steps": 5.0,
    "adam_beta1": 0.8,
    "adam_beta2": 0.95,
    "tf32": False,
    "eval_strategy": "epoch",
    "save_strategy": "epoch",
    "logging_steps": 3,
    "save_steps": 100,
    "report_to": ["tensorboard"],
    "accelerator_config": {"split_batches": True},
    "parallelism_config": {"tp_handler": {"enable_async_tp": False}, "dp_replicate_size": 2},
    "dataloader_num_workers": 2,
    "dataloader_multiprocessing_context": "spawn",
    "ddp_backend": "gloo",
    "debug": ["underflow_overflow"],
    "fsdp": True,
    "fsdp_config": {"min_num_params": 3},
    "deepspeed": {"zero_optimization": {"stage": 2}},
    "include_num_input_tokens_seen": "all",
    "gradient_checkpointing": True,
    "activation_checkpointing": True,
    "gradient_checkpointing_kwargs": {"use_reentrant": False},
    "activation_checkpointing_kwargs": {"use_reentrant": False},
    "lr_scheduler_kwargs": {"num_cycles": 2},
    "metric_for_best_model": "perplexity",
    "remove_unused_columns": False,
    "logging_nan_inf_filter": False,
}
EXCLUDED = {"fp16": "bf16", "fp16_full_eval": "bf16_full_eval"}  # each is tested without the other
NOT_BUILT_HERE = {"deepspeed", "ddp_backend"}  # need the DeepSpeed package, a process group

LORA_VALUES: dict[str, Any] = {
    "lora_dropout": 0.5,
    "target_modules": ["q_proj"],
    "exclude_modules": ["k_proj"],
    "init_lora_weights": "pissa_niter_4",
    "rank_pattern": {"q_proj": 2},
    "alpha_pattern": {"q_proj": 2},
    "layers_to_transform": [1],
    "loftq_config": {"loftq_bits": 8},
    "task_type": "CAUSAL_LM",
    "peft_type": "LORA",
    "inference_mode": False,
}
LORA_ALONE: dict[str, dict[str, Any]] = {  # what peft needs beside the key
    "eva_config": {"init_lora_weights": "eva"},
    "corda_config": {"init_lora_weights": "corda"},
    "loftq_config": {"init_lora_weights": "loftq"},
    "lora_ga_config": {"init_lora_weights": "lora_ga"},
    "lora_bias": {"init_lora_weights": True, "use_dora": False},
    "use_dora": {"megatron_config": None, "lora_bias": False},
}


def other_value(fact: dict[str, Any]) -> Any:
    """Returns a value of the right type other than the default."""
    kind = next(kind for kind in fact["kinds"] if kind != "none")
    if kind == "bool":
        return not fact["default"]
    if kind == "choice":
        return next(choice for choice in fact["choices"] if choice != fact["default"])
    if kind.startswith("section:"):
        name, inner = next(iter(facts()[kind.removeprefix("section:")].items()))
        return {name: other_value(inner)}
    simple = {"str": "some_text", "dict": {"a": 1}, "list[str]": ["a"], "list[int]": [3], "list[list[int]]": [[0, 1]]}
    return simple[kind] if kind in simple else (fact["default"] or 0) + (1 if kind == "int" else 0.25)


def values_for(class_name: str, special: dict[str, Any]) -> dict[str, Any]:
    return {name: special[name] if name in special else other_value(f) for name, f in facts()[class_name].items()}


def load(tmp_path: Path, values: dict[str, Any]) -> Config:
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(values))
    return load_config(path)


def plain(value: Any) -> Any:
    """Replaces enum members by their values, and sets and tuples by lists."""
    if isinstance(value, (list, set, tuple)):
        return [plain(item) for item in value]
    return getattr(value, "value", value)


def is_part_of(given: Any, carried: Any) -> bool:
    """Tells whether an upstream object holds the given value: equal, or a section with the given values in it."""
    if isinstance(given, dict) and not isinstance(carried, dict):
        return all(is_part_of(value, getattr(carried, name)) for name, value in given.items())
    if isinstance(given, dict):
        return all(name in carried and is_part_of(value, carried[name]) for name, value in given.items())
    return bool(given == plain(carried))


def test_the_facts_match_the_installed_libraries():
    """The order in `list[str] | str` is ignored: Python caches the first such type that any library creates."""
    written, installed = json.loads(FACTS_FILE.read_text()), json.loads(json.dumps(installed_facts()))
    for found in (written, installed):
        for described in found["classes"].values():
            for fact in described.values():
                fact["kinds"].sort()
    assert written == installed


def test_every_upstream_key_is_in_the_schema():
    import dataclasses
    import inspect

    from peft import LoraConfig
    from transformers import BitsAndBytesConfig, TrainingArguments

    assert {f.name for f in dataclasses.fields(TrainingArguments)} <= Config.model_fields.keys()
    assert {f.name for f in dataclasses.fields(LoraConfig) if f.init} == LoraKeys.model_fields.keys()
    named = inspect.signature(BitsAndBytesConfig).parameters.keys() - {"kwargs"}
    assert named == QuantizationKeys.model_fields.keys()
    assert len(facts()["TrainingArguments"]) == 114


def test_every_training_argument_reaches_transformers(tmp_path, monkeypatch):
    from transformers import TrainingArguments

    monkeypatch.setenv("ACCELERATE_USE_FSDP", "false")
    values = values_for("TrainingArguments", TRAINING_VALUES)
    values["output_dir"] = str(tmp_path / "out")
    for part in (values.keys() - EXCLUDED.keys(), values.keys() - set(EXCLUDED.values())):
        config = load(tmp_path, {name: values[name] for name in part} | {"validation_split": 0.1})
        kwargs = config.training_arguments()
        assert [kwargs[name] for name in NOT_BUILT_HERE] == [values[name] for name in NOT_BUILT_HERE]
        args = TrainingArguments(**{k: v for k, v in kwargs.items() if k not in NOT_BUILT_HERE})
        lost = [n for n in part - NOT_BUILT_HERE - SECRET_KEYS if not is_part_of(values[n], getattr(args, n))]
        assert lost == []


@pytest.mark.parametrize("name", sorted(facts()["LoraConfig"]))
def test_every_lora_key_reaches_peft(tmp_path, name):
    from peft import LoraConfig

    if name == "loftq_config":
        pytest.importorskip("scipy", reason="peft builds a LoftQ config only where scipy is installed")
    values = values_for("LoraConfig", LORA_VALUES)
    given = {name: values[name], **LORA_ALONE.get(name, {})}
    if name.startswith("layers_"):  # peft wants them together, and names beside them
        given |= {key: values[key] for key in ("layers_to_transform", "layers_pattern", "target_modules")}
    config = load(tmp_path, {"lora_config": given})
    assert config.lora_config is not None
    lora = LoraConfig(**config.lora_config.kwargs())
    carried = getattr(lora, name)
    assert is_part_of(given[name], sorted(carried) if isinstance(carried, set) else carried)


@pytest.mark.parametrize("name", sorted(facts()["BitsAndBytesConfig"]))
def test_every_quantization_key_reaches_bitsandbytes(tmp_path, name):
    from transformers import BitsAndBytesConfig

    value = other_value(facts()["BitsAndBytesConfig"][name])
    if name == "bnb_4bit_use_double_quant":
        value = False  # ours is true
    bits = {} if name.startswith("load_in") else {"load_in_4bit": True}
    config = load(tmp_path, {"quantization_config": {name: value, **bits}})
    assert config.quantization_config is not None
    carried = getattr(BitsAndBytesConfig(**config.quantization_config.kwargs()), name)
    assert (str(carried).removeprefix("torch.") if "dtype" in name or "storage" in name else carried) == value


def test_defaults_of_ours():
    config = Config()
    assert config.training_arguments() == {
        "output_dir": "outputs",
        "logging_steps": 10,
        "remove_unused_columns": False,
        "logging_nan_inf_filter": False,
    }
    assert LoraKeys().kwargs() == {
        "r": 16,
        "lora_alpha": 32,
        "target_modules": "all-linear",
        "task_type": "CAUSAL_LM",
    }
    assert QuantizationKeys(load_in_4bit=True).kwargs() == {
        "load_in_4bit": True,
        "bnb_4bit_quant_type": "nf4",
        "bnb_4bit_use_double_quant": True,
    }


def test_a_default_that_the_user_gave_is_passed_on(tmp_path):
    config = load(tmp_path, {"dataloader_pin_memory": True, "gradient_checkpointing": False})
    arguments = config.training_arguments()
    assert arguments["dataloader_pin_memory"] is True
    assert arguments["activation_checkpointing"] is False
    assert config.section(TrainingKeys).training_arguments() == arguments


def test_our_keys_become_upstreams():
    assert TrainingKeys(warmup_ratio=0.1).training_arguments()["warmup_steps"] == 0.1
    arguments = TrainingKeys.model_validate({"gradient_checkpointing": True}).training_arguments()
    assert arguments["activation_checkpointing"] is True
    assert "gradient_checkpointing" not in arguments
    for ours in ("global_batch_size", "warmup_ratio"):
        assert ours not in arguments
    assert TrainingKeys(resume_from_checkpoint="out/checkpoint-5").training_arguments()["resume_from_checkpoint"] == (
        "out/checkpoint-5"
    )
    assert "resume_from_checkpoint" not in TrainingKeys(resume_from_checkpoint=True).training_arguments()


def test_loftq_settings_become_pefts_class():
    from peft.tuners.lora.config import LoftQConfig

    keys = LoraKeys.model_validate({"init_lora_weights": "loftq", "loftq_config": {"loftq_bits": 8}})
    assert keys.kwargs()["loftq_config"] == LoftQConfig(loftq_bits=8)


def test_nested_sections_become_upstreams_classes():
    from accelerate import ParallelismConfig
    from peft.tuners.lora.config import EvaConfig

    kwargs = LoraKeys.model_validate({"init_lora_weights": "eva", "eva_config": {"rho": 1.5}}).kwargs()
    assert kwargs["eva_config"] == EvaConfig(rho=1.5)
    arguments = TrainingKeys.model_validate({"parallelism_config": {"tp_size": 2}}).training_arguments()
    assert isinstance(arguments["parallelism_config"], ParallelismConfig)
    assert arguments["parallelism_config"].tp_size == 2


def test_a_section_is_one_group_and_knows_where_its_keys_are(tmp_path):
    config = load(tmp_path, {"max_seq_length": 64, "datasets": [{"path": "a"}, {"path": "b"}], "learning_rate": 1e-3})
    data = config.section(DataKeys)
    assert type(data) is DataKeys
    assert data.max_seq_length == 64
    assert data.is_set("max_seq_length")
    assert not data.is_set("truncation")
    assert not hasattr(data, "learning_rate")
    assert data.datasets is not None
    problem = data.datasets[1].problem("path", "not there")
    assert (problem.key, problem.file) == ("datasets.1.path", str(tmp_path / "config.yaml"))
    assert problem.line is not None
    assert config.section(ModelKeys) == ModelKeys()


def test_the_groups_are_disjoint_and_cover_the_config():
    names = [name for group in GROUPS for name in group.model_fields]
    assert len(names) == len(set(names))
    assert set(names) == set(Config.model_fields)


def test_every_key_has_a_description():
    def undescribed(schema: Any, prefix: str = "") -> list[str]:
        found = []
        for name, field in schema.model_fields.items():
            if not (field.description or "").strip():
                found.append(prefix + name)
            if inner := section_class(field.annotation):
                found += undescribed(inner, f"{prefix}{name}.")
        return found

    assert undescribed(Config) == []


@pytest.mark.parametrize("table", [MEANINGS, LIMITS])
def test_tables_about_upstream_name_only_keys_that_exist(table):
    for class_name, rows in table.items():
        assert rows.keys() <= facts()[class_name].keys()


OURS = {"TrainingArguments": TrainingKeys, "LoraConfig": LoraKeys, "BitsAndBytesConfig": QuantizationKeys}


@pytest.mark.parametrize(("class_name", "ours"), OURS.items())
def test_tables_about_upstream_have_every_key_that_we_do_not_redefine(class_name, ours):
    replaced = ours.__annotations__.keys()
    assert MEANINGS[class_name].keys() == facts()[class_name].keys() - replaced
    assert not LIMITS.get(class_name, {}).keys() & replaced


def test_all_keys_lists_nested_ones():
    keys = list_keys(Config)
    assert {"learning_rate", "lora_config.r", "lora_config.eva_config.rho", "datasets.path"} <= set(keys)
