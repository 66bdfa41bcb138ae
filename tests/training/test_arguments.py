"""Defaults of the Trainer's arguments, on a machine with a GPU and on one without."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from sft.training import arguments


def made(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, has_gpu: bool, **given: Any) -> dict[str, Any]:
    """Returns the keys that `TrainingArguments` would be called with."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: has_gpu)
    monkeypatch.setattr(arguments, "TrainingArguments", dict)
    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", "")
    given = {"output_dir": str(tmp_path), **given}
    return arguments.training_arguments(given, bf16=False, fp16=False, plan=None)  # type: ignore[return-value]


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({}, {"non_blocking": True}),
        ({"accelerator_config": None}, {"non_blocking": True}),
        ({"accelerator_config": {"even_batches": False}}, {"non_blocking": True, "even_batches": False}),
        ({"accelerator_config": {"non_blocking": False}}, {"non_blocking": False}),
        ({"accelerator_config": "accelerate.json"}, "accelerate.json"),
        ({"dataloader_pin_memory": False}, None),
        ({"dataloader_pin_memory": False, "accelerator_config": {"even_batches": False}}, {"even_batches": False}),
    ],
)
def test_copies_of_batches_to_a_gpu_are_asynchronous_by_default(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, given: dict[str, Any], expected: Any
) -> None:
    arguments = made(monkeypatch, tmp_path, True, **given)
    assert arguments["accelerator_config"] == expected
    assert "use_cpu" not in arguments


def test_without_a_gpu_nothing_is_pinned_and_accelerate_keeps_its_settings(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    arguments = made(monkeypatch, tmp_path, False)
    assert arguments["use_cpu"] is True
    assert arguments["dataloader_pin_memory"] is False
    assert "accelerator_config" not in arguments
