"""Rules between keys: those of every command, and those of training, which also refuses unsupported keys."""

from __future__ import annotations

import shlex
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from huggingface_hub import HfApi
from huggingface_hub.cli.hf import app as hf
from huggingface_hub.utils import filter_repo_objects

import sft_main
from sft.config.loading import load_config
from sft.config.schema import Config, TrainingKeys
from sft.config.upstream_docs import UNSUPPORTED
from sft.config.upstream_schema import facts
from sft.config.validation import require_trainable
from sft.errors import Problem, UserError
from tests.config.yaml_files import refusal, write_yaml
from tests.runs import write_config

TRAINABLE = {"model_name_or_path": "m", "train_file": "t.jsonl"}
VALUES: dict[str, Any] = {
    "fsdp": True,
    "fsdp_config": {"min_num_params": 3},
    "deepspeed": {"zero_optimization": {"stage": 2}},
    "parallelism_config": {"tp_size": 2},
    "liger_kernel_config": {"rope": True},
}


def refused(tmp_path: Path, **keys: Any) -> list[Problem]:
    """Returns the problems of a run with these keys beside those that every run needs."""
    return problems_of(tmp_path, {**TRAINABLE, **keys})


def problems_of(tmp_path: Path, keys: dict[str, Any]) -> list[Problem]:
    """Returns the problems of a run with these keys alone."""
    config = load_config(write_config(tmp_path / "run.yaml", **keys))
    try:
        require_trainable(config)
    except UserError as error:
        return list(error.problems)
    return []


# Rules of every command


@pytest.mark.parametrize(
    ("text", "key", "part"),
    [
        ("train_file: a\ndataset_name: b", "dataset_name", "excludes train_file (line 1)"),
        ("dataset_path: a\ndatasets: [{path: b}]", "datasets", "excludes dataset_path (line 1)"),
        ("validation_file: a\nvalidation_split: 0.1", "validation_split", "excludes validation_file (line 1)"),
        ("from_scratch: x\nmodel_name_or_path: a\ntokenizer_name_or_path: t", "model_name_or_path", "from_scratch"),
        ("from_scratch: {model_type: llama}", "from_scratch", "needs tokenizer_name_or_path"),
        ("bf16: true\nfp16: true", "fp16", "excludes bf16"),
        ("gradient_accumulation_steps: 2\nglobal_batch_size: 8", "global_batch_size", "excludes"),
        ("load_best_model_at_end: true", "load_best_model_at_end", "needs evaluation"),
        (
            "load_best_model_at_end: true\neval_strategy: epoch\nvalidation_split: 0.1",
            "load_best_model_at_end",
            "save_strategy is steps",
        ),
        (
            "load_best_model_at_end: true\neval_strategy: steps\neval_steps: 30\nsave_steps: 100\nvalidation_split: .1",
            "load_best_model_at_end",
            "save_steps (100) to be a multiple of eval_steps (30)",
        ),
        ("eval_strategy: steps", "eval_strategy", "needs validation data"),
        ("quantization_config: {}", "quantization_config", "asks for neither 4 nor 8 bits"),
        ("lora_config:", "lora_config", "the section is empty"),
        ("max_steps: 0", "max_steps", "0 would train for num_train_epochs"),
        ("logging_steps: 2.5", "logging_steps", "expected a whole number of steps, got 2.5"),
        ("report_to: [wandb, tensorbord]", "report_to", "there is no tracker 'tensorbord'"),
        ("remove_unused_columns: true", "remove_unused_columns", "must be false, got true"),
        ("lora_config: {inference_mode: true}", "lora_config.inference_mode", "must be false"),
        ("lora_config: {eva_config: {}}", "lora_config.eva_config", "only with init_lora_weights: eva"),
        ("gradient_checkpointing: true\nactivation_checkpointing: false", "gradient_checkpointing", "its new name"),
        ("dataloader_prefetch_factor: 2", "dataloader_prefetch_factor", "worker processes"),
        ("dataset_config_name: main", "dataset_config_name", "needs dataset_name"),
        ("datasets: [{path: a, weight: 2}, {path: b}]", "datasets.1", "has no weight, others have"),
        ("eval_datasets: [{path: a, weight: 2}]", "eval_datasets.0.weight", "validation data is not mixed"),
    ],
)
def test_keys_that_do_not_go_together(tmp_path, text, key, part):
    found = refusal(write_yaml(tmp_path, text))
    assert [(problem[1], part in problem[2]) for problem in found] == [(key, True)]


def test_four_and_eight_bits_exclude_each_other(tmp_path):
    path = write_yaml(tmp_path, "quantization_config:\n  load_in_4bit: true\n  load_in_8bit: true")
    assert refusal(path) == [
        (3, "quantization_config.load_in_8bit", "excludes quantization_config.load_in_4bit (line 2)")
    ]


@pytest.mark.parametrize(
    "text",
    [
        "warmup_steps: 0\nwarmup_ratio: 0.1",
        "bf16: true\nfp16: false",
        "train_file: a\ndatasets: null\nvalidation_split: 0.0\nvalidation_file: v",
        "load_best_model_at_end: true\neval_strategy: steps\neval_steps: 50\nsave_steps: 100\nvalidation_split: 0.1",
        "load_best_model_at_end: true\neval_strategy: steps\neval_steps: .1\nsave_steps: .3\nvalidation_split: 0.1",
    ],
)
def test_a_key_that_is_off_excludes_nothing(tmp_path, text):
    assert isinstance(load_config(write_yaml(tmp_path, text)), Config)


# Unsupported keys


@pytest.mark.parametrize("key", UNSUPPORTED)
def test_an_unsupported_key_is_refused_and_its_description_says_so(tmp_path: Path, key: str) -> None:
    (problem,) = refused(tmp_path, **{key: VALUES.get(key, True)})
    assert (problem.key, problem.line is not None) == (key, True)
    assert problem.hint
    assert (TrainingKeys.model_fields[key].description or "").startswith("Refused for now: ")


def test_no_other_description_says_so() -> None:
    refused_keys = {key for key, field in Config.model_fields.items() if "Refused for now" in (field.description or "")}
    assert refused_keys == set(UNSUPPORTED)


def test_an_unsupported_key_that_is_off_is_not_refused(tmp_path: Path) -> None:
    off = {key: False for key in UNSUPPORTED if "bool" in facts()["TrainingArguments"][key]["kinds"]}
    assert {"use_liger_kernel", "auto_find_batch_size", "enable_jit_checkpoint"} <= off.keys()
    assert refused(tmp_path, **off, deepspeed=None) == []


def test_the_hints_name_our_keys_for_the_purpose(tmp_path: Path) -> None:
    (batch,) = refused(tmp_path, auto_find_batch_size=True)
    assert "per_device_train_batch_size: auto" in batch.hint
    (head,) = refused(tmp_path, use_liger_kernel=True)
    assert "loss_chunk_size" in head.hint


def test_the_command_for_the_hub_uploads_the_model_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The command is parsed by `hf` itself."""
    (problem,) = refused(tmp_path, push_to_hub=True, hub_strategy="end")
    words = shlex.split(problem.hint.partition(": ")[2])
    words[words.index("OUTPUT_DIR")] = str(tmp_path)
    model = {"README.md", "config.json", "logs/metrics.jsonl", "model.safetensors", "tokenizer.json"}
    rest = {"checkpoint-20/optimizer.pt", "earlier-run-1/checkpoint-5/model.safetensors", ".lock"}
    uploaded: dict[str, Any] = {}
    monkeypatch.setattr(HfApi, "create_repo", lambda *_, **__: SimpleNamespace(repo_id="USER/NAME"))
    monkeypatch.setattr(HfApi, "upload_folder", lambda _, **options: uploaded.update(options))
    assert words[0] == "hf"
    hf(words[1:], standalone_mode=False)
    assert (uploaded["repo_id"], uploaded["path_in_repo"]) == ("USER/NAME", ".")
    assert Path(uploaded["folder_path"]) == tmp_path
    taken = filter_repo_objects(
        [*model, *rest], allow_patterns=uploaded["allow_patterns"], ignore_patterns=uploaded["ignore_patterns"]
    )
    assert set(taken) == model


@pytest.mark.parametrize("optim", facts()["TrainingArguments"]["optim"]["choices"])
def test_optimizers_that_hold_two_sets_of_weights_are_refused(tmp_path: Path, optim: str) -> None:
    found = [(problem.key, problem.message.split()[0]) for problem in refused(tmp_path, optim=optim)]
    assert found == ([("optim", optim)] if optim.startswith("schedule_free") else [])


# Weights that cannot be trained

SCRATCH = {"from_scratch": {"model_type": "llama"}, "tokenizer_name_or_path": "t", "train_file": "t.jsonl"}
FOUR_BITS = {"load_in_4bit": True}


def test_randomly_initialized_weights_are_not_frozen(tmp_path: Path) -> None:
    assert problems_of(tmp_path, SCRATCH) == []
    for key, value in {"lora_config": {}, "quantization_config": FOUR_BITS}.items():
        (problem,) = problems_of(tmp_path, {**SCRATCH, key: value})
        assert problem.message == "excludes from_scratch: randomly initialized weights must not be frozen"
        assert (problem.key, problem.file, problem.line) == (key, str(tmp_path / "run.yaml"), 5)


def test_quantized_weights_need_an_adapter(tmp_path: Path) -> None:
    (problem,) = refused(tmp_path, quantization_config=FOUR_BITS)
    assert (problem.key, problem.line) == ("quantization_config", 3)
    assert problem.message == "quantized weights cannot be trained without an adapter"
    assert "lora_config" in problem.hint
    for bits in (FOUR_BITS, {"load_in_8bit": True}):
        assert refused(tmp_path, quantization_config=bits, lora_config={}) == []


def test_training_needs_a_model_and_data(tmp_path: Path) -> None:
    assert [problem.key for problem in problems_of(tmp_path, {"seed": 1})] == ["model_name_or_path", "train_file"]


@pytest.mark.parametrize(("name", "line"), [({}, None), ({"model_name_or_path": ""}, 2)])
def test_training_needs_the_name_of_a_model(tmp_path: Path, name: dict[str, str], line: int | None) -> None:
    (problem,) = problems_of(tmp_path, {"train_file": "t.jsonl", **name})
    assert (problem.key, problem.message, problem.line) == ("model_name_or_path", "is needed to train", line)
    assert problem.hint


@pytest.mark.parametrize(
    ("keys", "key", "line"),
    [
        ({**SCRATCH, "lora_config": {}}, "lora_config", 5),
        ({**SCRATCH, "quantization_config": FOUR_BITS}, "quantization_config", 5),
        ({**TRAINABLE, "quantization_config": FOUR_BITS}, "quantization_config", 3),
        ({**TRAINABLE, "bf16": True, "fp16": True}, "fp16", 4),
        ({"tokenizer_name_or_path": "t", "model_name_or_path": "", "train_file": "t.jsonl"}, "model_name_or_path", 2),
    ],
)
def test_each_command_that_trains_or_plans_training_names_key_file_and_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], keys: dict[str, Any], key: str, line: int
) -> None:
    file = write_config(tmp_path / "run.yaml", **keys, output_dir=str(tmp_path / "out"))
    for verb in ("train", "check", "estimate"):
        assert sft_main.main([verb, "--config_file", str(file)]) == 2
        printed = capsys.readouterr()
        assert f"{file}:{line}: {key}" in "".join((printed.out + printed.err).split("\n"))
