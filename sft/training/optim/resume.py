"""An optimizer and its schedule behind a resume: their state is the checkpoint's, their settings are the config's.

torch saves settings among the states: to load an optimizer brings back the learning rate, the weight decay and the
betas that it was saved with, and to load a schedule its peak. The config, and with it the model card, would say others
than the run has. A schedule's rate stays what it was until the next step is made, too: a run that had ended at rate 0
would make its first further step at rate 0.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.optim.lr_scheduler import LambdaLR

from sft.errors import Problem, UserError

logger = logging.getLogger("sft")

PEAK = "initial_lr"  # of a group: the `learning_rate` that its schedule multiplies
_KEYS: dict[str, tuple[str, ...]] = {
    PEAK: ("learning_rate",),
    "weight_decay": ("weight_decay",),
    "betas": ("adam_beta1", "adam_beta2"),
    "eps": ("adam_epsilon",),
    **{name: (f"optim_args: {name}",) for name in ("momentum", "dampening", "nesterov", "alpha", "centered", "scale")},
}
"""The config keys that a group's settings come from. Whatever else stands in a group may be state."""
_WITH_STATE = ("momentum", "centered")  # settings that, where they are on, have a buffer of the weights' size


@dataclass(frozen=True)
class ConfiguredOptimizer:
    """What the config says of an optimizer and its schedule, taken down before a checkpoint is loaded into them.

    Attributes:
        groups: the settings of each parameter group.
    """

    groups: list[dict[str, Any]]

    @classmethod
    def of(cls, optimizer: torch.optim.Optimizer) -> ConfiguredOptimizer:
        """Of an optimizer as it was made, with a schedule around it or not."""
        return cls([{name: group[name] for name in _KEYS if name in group} for group in optimizer.param_groups])

    def put_back(self, optimizer: torch.optim.Optimizer, scheduler: Any, checkpoint: str) -> None:
        """Makes the config's settings those of both, with the rate of the step that they stand at; says what changes.

        Settings that are as they were change nothing, to the last bit.

        Args:
            scheduler: around `optimizer`; one that goes by the evaluations keeps the rate that these have led to
                unless `learning_rate` is another one.
            checkpoint: the name of the one that both are loaded from.
        """
        rates = [group["lr"] for group in optimizer.param_groups]
        changes: dict[str, tuple[Any, Any]] = {}
        for group, settings in zip(optimizer.param_groups, self.groups, strict=True):
            for name, now in settings.items():
                was = group.get(name, now)
                if name in _WITH_STATE and bool(was) != bool(now):
                    logger.warning("optim_args: %s stays %s: the states in %s are of such a run", name, was, checkpoint)
                    continue
                group[name] = now
                for key, one, other in _by_key(name, was, now):
                    changes.setdefault(key, (one, other))
                    if name == PEAK and not isinstance(scheduler, LambdaLR):
                        group["lr"] = now
        if isinstance(scheduler, LambdaLR):
            scheduler.base_lrs = [group[PEAK] for group in optimizer.param_groups]
            for group, peak, share in zip(
                optimizer.param_groups, scheduler.base_lrs, scheduler.lr_lambdas, strict=True
            ):
                group["lr"] = peak * share(scheduler.last_epoch)
        now_rates = [group["lr"] for group in optimizer.param_groups]
        scheduler._last_lr = now_rates
        if now_rates != rates and "learning_rate" not in changes:
            changes["the schedule's rate at this step"] = rates[0], now_rates[0]
        for key, (one, other) in changes.items():
            logger.info("%s: %s in %s, %s from here on", key, one, checkpoint, other)


def require_schedule_of(checkpoint: Path, *, by_steps: bool) -> None:
    """Checks that a checkpoint's schedule goes by what this run's goes by: its steps, or its evaluations.

    Args:
        by_steps: what this run's goes by.

    Raises:
        UserError: torch would take the state of the one for the other's, or stumble over it.
    """
    file = checkpoint / "scheduler.pt"
    if not file.is_file():
        return
    went_by_steps = "lr_lambdas" in torch.load(file, weights_only=True)
    if went_by_steps != by_steps:
        kind = "steps" if went_by_steps else "evaluations"
        message = f"the schedule in {checkpoint} goes by {kind}, and this one does not"
        hint = "resume with the `lr_scheduler_type` that the run was started with"
        raise UserError(Problem(message, hint, "lr_scheduler_type"))


def _by_key(name: str, was: Any, now: Any) -> Iterator[tuple[str, Any, Any]]:
    """(config key, then, now) of what differs in one setting of a group."""
    keys = _KEYS[name]
    then, since = ([*value] if isinstance(value, (tuple, list)) else [value] for value in (was, now))
    for index, (one, other) in enumerate(zip(then, since, strict=False)):
        if one != other:
            yield keys[min(index, len(keys) - 1)], one, other
