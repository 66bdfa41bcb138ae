"""Runs under fp16 autocast with a loss scale: scaler, guard and clipping see the same gradients.

accelerate makes no scaler on a CPU, though torch has one; these tests give it to the Trainer.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate.state import AcceleratorState

import sft_main
from tests.runs import arithmetic, log_history, losses, write_config, write_rows
from trainer_utils import SFTTrainer


@pytest.fixture(scope="module")
def config_file(tmp_path_factory: pytest.TempPathFactory, model_dir: Path) -> Path:
    """8 rows per step, in two micro-batches; gradients are clipped to about half."""
    folder = tmp_path_factory.mktemp("scaled")
    return write_config(
        folder / "run.yaml",
        model_name_or_path=str(model_dir),
        dtype="float32",
        train_file=str(write_rows(folder / "train.jsonl", arithmetic(16))),
        max_seq_length=128,
        packing=False,
        per_device_train_batch_size=4,
        gradient_accumulation_steps=2,
        learning_rate=3e-3,
        lr_scheduler_type="constant",
        max_grad_norm=0.5,
        max_steps=8,
        logging_steps=1,
        save_strategy="no",
    )


def trained(config_file: Path, name: str, *overrides: str) -> Path:
    output_dir = config_file.parent / name
    assert sft_main.main(["--config_file", str(config_file), f"output_dir={output_dir}", *overrides]) == 0
    return output_dir


@pytest.fixture(scope="module")
def exact(config_file: Path) -> Path:
    """The run in float32; it is made before `scalers` changes the Trainer."""
    return trained(config_file, "exact")


@pytest.fixture
def scalers(monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> list[Any]:
    """Each Trainer that is made computes in float16 and scales its loss by `request.param` at first."""
    made: list[Any] = []
    original = SFTTrainer.__init__

    def make(trainer: SFTTrainer, *arguments: Any, **settings: Any) -> None:
        original(trainer, *arguments, **settings)
        trainer.accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=request.param, growth_interval=100)
        trainer.accelerator.native_amp = True
        monkeypatch.setitem(AcceleratorState._shared_state, "_mixed_precision", "fp16")
        made.append(trainer.accelerator.scaler)

    monkeypatch.setattr(SFTTrainer, "__init__", make)
    return made


def norms(out: Path) -> list[float]:
    return [entry["grad_norm"] for entry in log_history(out)]


@pytest.mark.slow
@pytest.mark.parametrize("scalers", [2.0**10], indirect=True)
def test_a_scaled_run_follows_float32(config_file: Path, exact: Path, scalers: list[Any]) -> None:
    """Norms are of the gradients without the scale, before they are clipped."""
    scaled = trained(config_file, "scaled")
    assert scalers[0].get_scale() == 2.0**10, "no step was skipped"
    assert min(norms(exact)) > 0.5, "each step is clipped"
    assert losses(scaled) == pytest.approx(losses(exact), abs=5e-3)
    assert losses(scaled) != losses(exact)
    assert norms(scaled) == pytest.approx(norms(exact), rel=2e-2)


@pytest.mark.slow
@pytest.mark.parametrize("scalers", [2.0**16], indirect=True)
def test_gradients_of_a_step_of_many_tokens_are_scaled_before_they_are_rounded(
    config_file: Path, exact: Path, scalers: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """In a step of 65,536 times the tokens, the share of one token underflows in float16."""
    take = SFTTrainer.get_batch_samples

    def of_many(*arguments: Any) -> Any:
        batches, count = take(*arguments)
        assert count is not None
        return batches, count * 2**16

    monkeypatch.setattr(SFTTrainer, "get_batch_samples", of_many)
    scaled = trained(config_file, "shares", "max_steps=1")
    assert scalers[0].get_scale() == 2.0**16, "the step was made"
    assert norms(scaled)[0] * 2**16 == pytest.approx(norms(exact)[0], rel=2e-3)


@pytest.mark.slow
@pytest.mark.parametrize("scalers", [2.0**26], indirect=True)
def test_a_scale_that_is_too_large_is_halved_until_it_fits(config_file: Path, scalers: list[Any]) -> None:
    """The steps that overflow move nothing, as their losses show, and none of them stops the run."""
    out = trained(config_file, "overflowing", "max_steps=16")
    fits = [math.isfinite(norm) for norm in norms(out)]
    first = fits.index(True)
    assert first > 3
    assert scalers[0].get_scale() == 2.0 ** (26 - fits.count(False))
    curve = losses(out)
    assert curve[: first + 1] == pytest.approx([curve[0]] * (first + 1), abs=0.1), "nothing has moved yet"
    assert curve[-1] < curve[0] - 0.3
