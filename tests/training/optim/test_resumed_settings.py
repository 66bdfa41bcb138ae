"""A resumed run follows its config; if that has not changed, it continues exactly."""

from __future__ import annotations

import copy
import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from torch.optim.lr_scheduler import LambdaLR, ReduceLROnPlateau
from transformers import Adafactor, get_scheduler

import sft_main
from sft.errors import UserError
from sft.training.optim.factory import with_master_weights
from sft.training.optim.master_weights import MasterWeights
from sft.training.optim.resumed_settings import PEAK, ConfiguredOptimizer, require_schedule_of
from tests.runs import arithmetic, log_history, losses, write_config, write_rows

DECAYING = ("linear", 2, 10)  # a warmup of 2 steps, and 0 at step 10


def two_groups(dtype: torch.dtype) -> list[dict[str, Any]]:
    """A matrix that decays and a bias that does not, the same ones each time."""
    torch.manual_seed(0)
    matrix, bias = torch.nn.Parameter(torch.randn(64, 64).to(dtype)), torch.nn.Parameter(torch.randn(64).to(dtype))
    return [{"params": [matrix]}, {"params": [bias], "weight_decay": 0.0}]


def adamw(**settings: Any) -> torch.optim.Optimizer:
    return torch.optim.AdamW(two_groups(torch.float32), **settings)


def masters(**settings: Any) -> torch.optim.Optimizer:
    return MasterWeights(torch.optim.AdamW(two_groups(torch.bfloat16), **settings))


def split_masters(**settings: Any) -> torch.optim.Optimizer:
    settings.pop("betas", None), settings.pop("eps", None)
    return with_master_weights(
        Adafactor(two_groups(torch.bfloat16), scale_parameter=False, relative_step=False, **settings)
    )


def eight_bits(**settings: Any) -> torch.optim.Optimizer:
    from bitsandbytes.optim import AdamW8bit

    return AdamW8bit(two_groups(torch.float32), **settings)


OPTIMIZERS: dict[str, Callable[..., torch.optim.Optimizer]] = {
    "adamw": adamw,
    "master weights": masters,
    "split masters of adafactor": split_masters,
    "eight bits": eight_bits,
}


def weights(optimizer: torch.optim.Optimizer) -> list[torch.Tensor]:
    """Returns the model's weights: those that masters are rounded into, if there are any."""
    if isinstance(optimizer, MasterWeights):
        return list(dict.fromkeys(weight for weight, _ in optimizer.pairs))
    return [p for group in optimizer.param_groups for p in group["params"]]


def train(optimizer: torch.optim.Optimizer, scheduler: Any, steps: range) -> None:
    for step in steps:
        for weight in weights(optimizer):
            weight.grad = torch.full_like(weight, 0.1 * (step + 1), dtype=weight.grad_dtype or weight.dtype)
        optimizer.step()
        scheduler.step()


def resumed(
    make: Callable[..., torch.optim.Optimizer],
    before: dict[str, Any],
    now: dict[str, Any],
    schedule: tuple[str, int, int] = DECAYING,
    schedule_now: tuple[str, int, int] = DECAYING,
) -> tuple[torch.optim.Optimizer, Any]:
    """Four steps with the settings of `before`, from whose checkpoint a run with those of `now` resumes."""
    old = make(**before)
    old_schedule = get_scheduler(schedule[0], old, *schedule[1:])
    train(old, old_schedule, range(4))
    states = copy.deepcopy((old.state_dict(), old_schedule.state_dict()))
    optimizer = make(**now)
    scheduler = get_scheduler(schedule_now[0], optimizer, *schedule_now[1:])
    for weight, value in zip(weights(optimizer), weights(old), strict=True):
        weight.data.copy_(value.data)
    configured = ConfiguredOptimizer(optimizer)
    optimizer.load_state_dict(states[0])
    scheduler.load_state_dict(states[1])
    configured.restore(optimizer, scheduler, "checkpoint-4")
    return optimizer, scheduler


def lines(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records]


@pytest.fixture(autouse=True)
def _captured_log(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, logger="sft")


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_with_the_same_settings_a_resume_is_exact(name: str, caplog: pytest.LogCaptureFixture) -> None:
    make, settings = OPTIMIZERS[name], {"lr": 3e-3, "weight_decay": 0.1}
    whole = make(**settings)
    schedule = get_scheduler(DECAYING[0], whole, *DECAYING[1:])
    train(whole, schedule, range(8))
    optimizer, scheduler = resumed(make, settings, settings)
    train(optimizer, scheduler, range(4, 8))
    assert all(one.equal(other) for one, other in zip(weights(optimizer), weights(whole), strict=True))
    assert scheduler.get_last_lr() == schedule.get_last_lr() == [3e-3 * 2 / 8] * 2
    assert lines(caplog) == []


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_another_learning_rate_and_decay_hold_from_the_next_step_on(
    name: str, caplog: pytest.LogCaptureFixture
) -> None:
    """Step 4 of 10 after a warmup of 2: the rate is 6/8 of the peak, then 5/8. Only the matrix decays."""
    optimizer, scheduler = resumed(
        OPTIMIZERS[name], {"lr": 1e-3, "weight_decay": 0.01}, {"lr": 1e-5, "weight_decay": 0.1}
    )
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.1, 0.0]
    assert [group["lr"] for group in optimizer.param_groups] == scheduler.get_last_lr() == [1e-5 * 6 / 8] * 2
    assert lines(caplog) == [
        "learning_rate: 0.001 in checkpoint-4, 1e-05 from here on",
        "weight_decay: 0.01 in checkpoint-4, 0.1 from here on",
    ]
    train(optimizer, scheduler, range(4, 5))
    assert [group["lr"] for group in optimizer.param_groups] == [1e-5 * 5 / 8] * 2
    assert all(torch.isfinite(weight).all() for weight in weights(optimizer))


def test_each_changed_beta_is_logged_and_the_moments_stay(caplog: pytest.LogCaptureFixture) -> None:
    before, now = {"betas": (0.9, 0.999), "eps": 1e-8}, {"betas": (0.9, 0.95), "eps": 1e-6}
    optimizer, _ = resumed(adamw, before, now)
    assert {group["betas"] for group in optimizer.param_groups} == {(0.9, 0.95)}
    assert {group["eps"] for group in optimizer.param_groups} == {1e-6}
    assert {float(state["step"]) for state in optimizer.state.values()} == {4.0}
    assert lines(caplog) == [
        "adam_beta2: 0.999 in checkpoint-4, 0.95 from here on",
        "adam_epsilon: 1e-08 in checkpoint-4, 1e-06 from here on",
    ]


def test_a_finished_run_that_is_extended_has_the_rate_of_the_longer_schedule(
    caplog: pytest.LogCaptureFixture,
) -> None:
    settings = {"lr": 1e-3}
    optimizer, scheduler = resumed(adamw, settings, settings, ("linear", 0, 4), ("linear", 0, 8))
    assert scheduler.get_last_lr() == [group["lr"] for group in optimizer.param_groups] == [1e-3 * 4 / 8] * 2
    assert lines(caplog) == ["the schedule's rate at this step: 0.0 in checkpoint-4, 0.0005 from here on"]


def plateau_after_a_cut(now: float) -> tuple[torch.optim.Optimizer, Any]:
    """A schedule that depends on evaluations, after the second one, which was worse and cut the rate to a tenth."""
    optimizers = []
    for rate in (1e-2, now):
        optimizer = adamw(lr=rate)
        for group in optimizer.param_groups:
            group[PEAK] = rate
        optimizers.append((optimizer, ReduceLROnPlateau(optimizer, factor=0.1, patience=0)))
    (old, old_schedule), (optimizer, scheduler) = optimizers
    old_schedule.step(1.0)
    old_schedule.step(2.0)
    configured = ConfiguredOptimizer(optimizer)
    optimizer.load_state_dict(old.state_dict())
    scheduler.load_state_dict(old_schedule.state_dict())
    configured.restore(optimizer, scheduler, "checkpoint-4")
    return optimizer, scheduler


@pytest.mark.parametrize(("now", "rate"), [(1e-2, 1e-3), (5e-3, 5e-3)])
def test_a_schedule_that_depends_on_evaluations_keeps_its_rate_unless_the_key_changes(now: float, rate: float) -> None:
    optimizer, scheduler = plateau_after_a_cut(now)
    assert [group["lr"] for group in optimizer.param_groups] == scheduler.get_last_lr() == pytest.approx([rate] * 2)
    assert scheduler.best == 1.0


def test_a_momentum_without_its_buffers_is_not_switched_on(caplog: pytest.LogCaptureFixture) -> None:
    def rmsprop(**settings: Any) -> torch.optim.Optimizer:
        return torch.optim.RMSprop(two_groups(torch.float32), **settings)

    optimizer, scheduler = resumed(rmsprop, {"alpha": 0.9}, {"alpha": 0.99, "momentum": 0.9})
    train(optimizer, scheduler, range(4, 5))
    assert {(group["momentum"], group["alpha"]) for group in optimizer.param_groups} == {(0, 0.99)}
    assert "optim_args: momentum stays 0, which the optimizer state in checkpoint-4 was saved with" in lines(caplog)
    assert "optim_args: alpha: 0.9 in checkpoint-4, 0.99 from here on" in lines(caplog)


def test_a_resumed_run_has_the_rate_and_the_decay_of_its_config(
    tmp_path: Path, model_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A finished run of 2 steps resumes to step 4 at another rate: that of steps 3 and 4 of a schedule of 4."""
    config = write_config(
        tmp_path / "run.yaml",
        model_name_or_path=str(model_dir),
        dtype="float32",
        train_file=str(write_rows(tmp_path / "rows.jsonl", arithmetic(16))),
        cache_dir=str(tmp_path / "cache"),
        max_seq_length=128,
        per_device_train_batch_size=4,
        learning_rate=1e-3,
        logging_steps=1,
        save_steps=2,
    )
    out, again = tmp_path / "out", tmp_path / "again"
    assert sft_main.main(["--config_file", str(config), f"output_dir={out}", "max_steps=2"]) == 0
    changes = ["learning_rate=1e-5", "weight_decay=0.5", "max_steps=4", f"resume_from_checkpoint={out}/checkpoint-2"]
    assert sft_main.main(["--config_file", str(config), f"output_dir={again}", *changes]) == 0
    said = " ".join(capsys.readouterr().err.split())
    assert "learning_rate: 0.001 in checkpoint-2, 1e-05 from here on" in said
    assert "weight_decay: 0.0 in checkpoint-2, 0.5 from here on" in said
    assert [entry["learning_rate"] for entry in log_history(again)][2:] == [1e-5 * 2 / 4, 1e-5 * 1 / 4]
    assert losses(again)[:2] == losses(out)
    groups = torch.load(again / "checkpoint-4" / "optimizer.pt", weights_only=True)["param_groups"]
    assert [(group["weight_decay"], group[PEAK]) for group in groups] == [(0.5, 1e-5), (0.0, 1e-5)]
    schedule = torch.load(again / "checkpoint-4" / "scheduler.pt", weights_only=True)
    assert schedule["base_lrs"] == [1e-5, 1e-5]
    assert yaml.safe_load((again / "config.yaml").read_text())["learning_rate"] == 1e-5
    assert json.loads((again / "trainer_state.json").read_text())["global_step"] == 4
    watching = ["lr_scheduler_type=reduce_lr_on_plateau", "eval_strategy=steps", "eval_steps=1"]
    watching += [f"validation_file={tmp_path / 'rows.jsonl'}", "eval_packing=false"]
    capsys.readouterr()
    assert sft_main.main(["--config_file", str(config), f"output_dir={again}", *changes, *watching]) == 2
    assert "depends on steps, and this run's does not" in " ".join(capsys.readouterr().err.split())


def test_a_schedule_refuses_the_state_of_another_kind(tmp_path: Path) -> None:
    optimizer = adamw()
    by_steps = LambdaLR(optimizer, lambda step: 1 / (step + 1))
    by_evaluations = ReduceLROnPlateau(optimizer)
    for saved, other, what in ((by_steps, by_evaluations, "steps"), (by_evaluations, by_steps, "evaluations")):
        torch.save(saved.state_dict(), tmp_path / "scheduler.pt")
        require_schedule_of(tmp_path, by_steps=saved is by_steps)
        with pytest.raises(UserError, match=f"depends on {what}") as raised:
            require_schedule_of(tmp_path, by_steps=other is by_steps)
        assert raised.value.problems[0].key == "lr_scheduler_type"
