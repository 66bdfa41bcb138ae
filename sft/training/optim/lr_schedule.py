"""Checks before anything is loaded whether the configured learning rate schedule can be made."""

from __future__ import annotations

import inspect
import json
import math
import re
from contextlib import suppress
from typing import Any

from sft.config.best_metric import WATCHING
from sft.config.schema import TrainingKeys
from sft.errors import Problem, UserError
from sft.model.quantization import import_bitsandbytes

_STEPS = 1000  # of the trial if max_steps is not set; whether settings are valid does not depend on it
_RUN_ARGUMENTS = {"optimizer", "num_warmup_steps", "num_training_steps", "last_epoch"}


def require_schedule(keys: TrainingKeys) -> None:
    """Makes the schedule for an optimizer of one weight and computes rates from the warmup to the end.

    Raises:
        UserError: a setting is missing, unknown, or of the wrong type or range.
    """
    name = str(keys.lr_scheduler_type)
    if name == "linear" and not keys.lr_scheduler_kwargs:
        return  # the default needs no trial, which would import torch
    try:
        _try(name, keys)
    except (ValueError, TypeError, ArithmeticError, LookupError) as error:
        raise UserError(_refusal(name, keys, error)) from error


def _try(name: str, keys: TrainingKeys) -> None:
    import torch

    with suppress(UserError):  # transformers imports it, with output that does not matter here
        import_bitsandbytes()
    from transformers import get_scheduler

    total = keys.max_steps if keys.max_steps > 0 else _STEPS
    share = keys.warmup_ratio if keys.warmup_ratio is not None else keys.warmup_steps
    warmup = math.ceil(share * total) if share < 1 else int(share)
    settings = _settings(keys)
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=keys.learning_rate)
    schedule: Any = get_scheduler(name, optimizer, warmup, total, settings)
    for rate in getattr(schedule, "lr_lambdas", ()):
        for step in (0, warmup // 2, warmup, (warmup + total) // 2, total):
            float(rate(step))
    if name in WATCHING:  # these compute at each evaluation: a first one, then one that is worse or better
        for metric in (1.0, 2.0):
            schedule.step(metric)


def _settings(keys: TrainingKeys) -> dict[str, Any]:
    """Reads `lr_scheduler_kwargs` as the Trainer does: a mapping, or JSON whose numbers and booleans may be quoted."""
    given = keys.lr_scheduler_kwargs
    if not isinstance(given, str):
        return dict(given or {})
    settings = json.loads(given)
    if not isinstance(settings, dict):
        raise ValueError("expected a mapping of settings")
    from transformers.training_args import _convert_str_dict

    return _convert_str_dict(settings)


def _refusal(name: str, keys: TrainingKeys, error: Exception) -> Problem:
    key = "lr_scheduler_kwargs" if keys.lr_scheduler_kwargs else "lr_scheduler_type"
    from sft.distributed.oom import first_line

    reason = re.sub(r"^[\w.]+\(\) ", "", first_line(error))
    return keys.problem(
        key, f"{name}: {reason}", f"Its settings, in lr_scheduler_kwargs, are {', '.join(_names(name))}."
    )


def _names(name: str) -> list[str]:
    """Returns the settings that a schedule accepts in `lr_scheduler_kwargs`."""
    from torch.optim.lr_scheduler import ReduceLROnPlateau
    from transformers.optimization import TYPE_TO_SCHEDULER_FUNCTION, GreedyLR
    from transformers.trainer_utils import SchedulerType

    classes = {"reduce_lr_on_plateau": ReduceLROnPlateau, "greedy": GreedyLR}  # their functions take **kwargs
    maker: Any = classes.get(name) or TYPE_TO_SCHEDULER_FUNCTION[SchedulerType(name)]
    return [parameter for parameter in inspect.signature(maker).parameters if parameter not in _RUN_ARGUMENTS]
