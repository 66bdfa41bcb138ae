"""What a training run refuses, although the key and its value are upstream's: nothing is ignored in silence."""

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

import config_manager
from sft.config.schema import Config, TrainingKeys
from sft.config.upstream_schema import facts
from sft.config.validation import REFUSED
from sft.errors import Problem, UserError

TRAINABLE = {"model_name_or_path": "m", "train_file": "t.jsonl"}
VALUES: dict[str, Any] = {
    "fsdp": True,
    "fsdp_config": {"min_num_params": 3},
    "deepspeed": {"zero_optimization": {"stage": 2}},
    "parallelism_config": {"tp_size": 2},
    "liger_kernel_config": {"rope": True},
}


def refused(tmp_path: Path, **keys: Any) -> list[Problem]:
    """What stops a run with these keys and what every run needs."""
    (tmp_path / "run.yaml").write_text(yaml.safe_dump({**TRAINABLE, **keys}))
    config = config_manager.load_config(tmp_path / "run.yaml")
    try:
        config_manager.require_trainable(config)
    except UserError as error:
        return list(error.problems)
    return []


@pytest.mark.parametrize("key", REFUSED)
def test_a_key_that_no_run_honours_is_refused_and_its_meaning_says_so(tmp_path: Path, key: str) -> None:
    (problem,) = refused(tmp_path, **{key: VALUES.get(key, True)})
    assert (problem.key, problem.line is not None) == (key, True)
    assert problem.hint
    assert (TrainingKeys.model_fields[key].description or "").startswith("Refused for now: ")


def test_no_other_meaning_says_so() -> None:
    said = {name for name, field in Config.model_fields.items() if "Refused for now" in (field.description or "")}
    assert said == set(REFUSED)


def test_what_is_off_is_not_refused(tmp_path: Path) -> None:
    off = {key: False for key in REFUSED if "bool" in facts()["TrainingArguments"][key]["kinds"]}
    assert {"use_liger_kernel", "auto_find_batch_size", "enable_jit_checkpoint"} <= off.keys()
    assert refused(tmp_path, **off, deepspeed=None) == []


def test_the_hints_name_the_keys_that_do_it_here(tmp_path: Path) -> None:
    (batch,) = refused(tmp_path, auto_find_batch_size=True)
    assert "per_device_train_batch_size: auto" in batch.hint
    (head,) = refused(tmp_path, use_liger_kernel=True)
    assert "loss_chunk_size" in head.hint


def test_the_command_for_the_hub_uploads_the_model_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As `hf` itself reads it."""
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
    told = [(problem.key, problem.message.split()[0]) for problem in refused(tmp_path, optim=optim)]
    assert told == ([("optim", optim)] if optim.startswith("schedule_free") else [])
