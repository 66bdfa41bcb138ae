"""What only a training run refuses: unsupported keys, missing keys, and weights that cannot be trained."""

from __future__ import annotations

import shlex
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml
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

TRAINABLE = {"model_name_or_path": "m", "train_file": "t.jsonl"}
VALUES: dict[str, Any] = {
    "fsdp": True,
    "fsdp_config": {"min_num_params": 3},
    "deepspeed": {"zero_optimization": {"stage": 2}},
    "parallelism_config": {"tp_size": 2},
    "liger_kernel_config": {"rope": True},
}


def refused(tmp_path: Path, *, keys_of_every_run: dict[str, Any] = TRAINABLE, **keys: Any) -> list[Problem]:
    """Returns the problems of a run with these keys, which come after those that every run needs."""
    (tmp_path / "run.yaml").write_text(yaml.safe_dump({**keys_of_every_run, **keys}, sort_keys=False))
    config = load_config(tmp_path / "run.yaml")
    try:
        require_trainable(config)
    except UserError as error:
        return list(error.problems)
    return []


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
    assert refused(tmp_path, keys_of_every_run=SCRATCH) == []
    message = "excludes from_scratch: randomly initialized weights must not be frozen"
    for frozen in ({"lora_config": {}}, {"quantization_config": FOUR_BITS}):
        (problem,) = refused(tmp_path, keys_of_every_run=SCRATCH, **frozen)
        assert (problem.key, problem.message) == (next(iter(frozen)), message)
        assert (problem.file, problem.line) == (str(tmp_path / "run.yaml"), 5)


def test_quantized_weights_need_an_adapter(tmp_path: Path) -> None:
    (problem,) = refused(tmp_path, quantization_config=FOUR_BITS)
    assert (problem.key, problem.line) == ("quantization_config", 3)
    assert problem.message == "quantized weights cannot be trained without an adapter"
    assert "lora_config" in problem.hint
    assert refused(tmp_path, quantization_config=FOUR_BITS, lora_config={}) == []


@pytest.mark.parametrize(("name", "line"), [({}, None), ({"model_name_or_path": ""}, 2)])
def test_training_needs_a_model(tmp_path: Path, name: dict[str, str], line: int | None) -> None:
    (problem,) = refused(tmp_path, keys_of_every_run={"train_file": "t.jsonl"}, **name)
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
    file = tmp_path / "run.yaml"
    file.write_text(yaml.safe_dump({**keys, "output_dir": str(tmp_path / "out")}, sort_keys=False))
    for verb in ("train", "check", "estimate"):
        assert sft_main.main([verb, "--config_file", str(file)]) == 2
        printed = capsys.readouterr()
        assert f"{file}:{line}: {key}" in "".join((printed.out + printed.err).split("\n"))
