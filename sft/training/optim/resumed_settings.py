"""Resumes an optimizer and its schedule with the checkpoint's state and the config's settings.

torch saves settings with the state: loading an optimizer restores the learning rate, weight decay and betas that it was
saved with, and loading a schedule restores its peak. The run would then differ from its config and model card. The
schedule's rate would also stay what it was until the next step: a finished run that is extended would make its first
further step at rate 0.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch.optim.lr_scheduler import LambdaLR

from sft.errors import Problem, UserError

logger = logging.getLogger("sft")

PEAK = "initial_lr"  # key of a parameter group: the `learning_rate` that the schedule multiplies
_KEYS: dict[str, tuple[str, ...]] = {
    PEAK: ("learning_rate",),
    "weight_decay": ("weight_decay",),
    "betas": ("adam_beta1", "adam_beta2"),
    "eps": ("adam_epsilon",),
    **{name: (f"optim_args: {name}",) for name in ("momentum", "dampening", "nesterov", "alpha", "centered", "scale")},
}
"""Config keys that the settings of a parameter group come from; anything else in a group may be state."""
_WITH_STATE = ("momentum", "centered")  # settings that need a buffer in the state if they are on


class ConfiguredOptimizer:
    """The configured settings of a new optimizer, with or without a schedule, before a checkpoint is loaded into it."""

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        self._groups = [{name: group[name] for name in _KEYS if name in group} for group in optimizer.param_groups]

    def restore(self, optimizer: torch.optim.Optimizer, scheduler: Any, checkpoint: str) -> None:
        """Restores the configured settings and the schedule's rate at the current step, and logs what changes.

        If no setting differs, nothing changes to the last bit.

        Args:
            scheduler: of `optimizer`; one that depends on evaluations keeps its rate unless `learning_rate` changed.
            checkpoint: name of the checkpoint that both were loaded from.
        """
        groups = optimizer.param_groups
        rates = [group["lr"] for group in groups]
        changes: dict[str, tuple[Any, Any]] = {}
        for group, settings in zip(groups, self._groups, strict=True):
            for name, now in settings.items():
                was = group.get(name, now)
                if name in _WITH_STATE and bool(was) != bool(now):
                    message = "optim_args: %s stays %s, which the optimizer state in %s was saved with"
                    logger.warning(message, name, was, checkpoint)
                    continue
                group[name] = now
                for key, old, new in _differences(name, was, now):
                    changes.setdefault(key, (old, new))
                    if name == PEAK and not isinstance(scheduler, LambdaLR):
                        group["lr"] = now
        if isinstance(scheduler, LambdaLR):
            scheduler.base_lrs = [group[PEAK] for group in groups]
            for group, rate in zip(groups, scheduler.lr_lambdas, strict=True):
                group["lr"] = group[PEAK] * rate(scheduler.last_epoch)
        now_rates = [group["lr"] for group in groups]
        scheduler._last_lr = now_rates
        if now_rates != rates and "learning_rate" not in changes:
            changes["the schedule's rate at this step"] = rates[0], now_rates[0]
        for key, (old, new) in changes.items():
            logger.info("%s: %s in %s, %s from here on", key, old, checkpoint, new)


def require_schedule_of(checkpoint: Path, *, by_steps: bool) -> None:
    """Requires that a checkpoint's schedule depends on the same as this run's: on steps or on evaluations.

    Args:
        by_steps: whether this run's schedule depends on steps.

    Raises:
        UserError: it does not; torch would load the state of one kind into the other, or crash.
    """
    file = checkpoint / "scheduler.pt"
    if not file.is_file():
        return
    saved_by_steps = "lr_lambdas" in torch.load(file, weights_only=True)
    if saved_by_steps != by_steps:
        kind = "steps" if saved_by_steps else "evaluations"
        message = f"the schedule in {checkpoint} depends on {kind}, and this run's does not"
        hint = "resume with the `lr_scheduler_type` that the run was started with"
        raise UserError(Problem(message, hint, "lr_scheduler_type"))


def _differences(name: str, was: Any, now: Any) -> Iterator[tuple[str, Any, Any]]:
    """Yields (config key, old value, new value) for each difference in one setting of a group."""
    keys = _KEYS[name]
    values = ([*value] if isinstance(value, (tuple, list)) else [value] for value in (was, now))
    for index, (old, new) in enumerate(zip(*values, strict=False)):
        if old != new:
            yield keys[min(index, len(keys) - 1)], old, new
