"""Tests before a run whether an optimizer works on this machine; wraps optimizers in master weights."""

from __future__ import annotations

import logging
from collections.abc import Collection
from typing import Any

import torch
from accelerate.optimizer import AcceleratedOptimizer
from transformers import Adafactor, Trainer, TrainingArguments

from sft.errors import Problem, UserError, first_line
from sft.training.optim.master_weights import MasterWeights
from sft.training.optim.split_master_weights import SplitMasters

logger = logging.getLogger("sft")

_PROBE = (128, 64)  # bitsandbytes keeps states of fewer than 4,096 elements in float32
_MODEL_KEYS = ("params", "model", "optimizer_dict")  # the Trainer returns these for optimizers that need the model


def require_optimizer(args: TrainingArguments) -> None:
    """Makes one step of the configured `optim` on a parameter of 8,192 elements.

    Raises:
        UserError: a library is missing, a setting is invalid, or the step fails on this device.
    """
    name = str(getattr(args.optim, "value", args.optim))
    try:
        optimizer_class, kwargs = Trainer.get_optimizer_cls_and_kwargs(args)
        if not isinstance(optimizer_class, type) or any(key in kwargs for key in _MODEL_KEYS):
            return
        state = _states_after_a_step(optimizer_class, kwargs, args.device)
    except (ImportError, ValueError, TypeError, RuntimeError, AttributeError, NotImplementedError) as error:
        raise _refusal(name, error, args.device) from error
    if "8bit" in name and not any(value.dtype == torch.uint8 for value in state):
        raise _refusal(name, RuntimeError("its states are in float32"), args.device)
    if "paged" in name and args.device.type == "cpu":
        logger.warning("optim: %s: there is no GPU memory to page out of; the states are in main memory", name)


def _states_after_a_step(
    optimizer_class: type[torch.optim.Optimizer], kwargs: dict[str, Any], device: torch.device
) -> list[torch.Tensor]:
    parameter = torch.nn.Parameter(torch.zeros(_PROBE, device=device))
    parameter.grad = torch.ones_like(parameter)
    optimizer = optimizer_class([parameter], **kwargs)
    optimizer.step()
    return [value for value in optimizer.state[parameter].values() if isinstance(value, torch.Tensor)]


def _refusal(name: str, error: Exception, device: torch.device) -> UserError:
    where = "this GPU" if device.type == "cuda" else f"the {device.type.upper()}"
    hint = "remove `optim`: the default, AdamW in one fused kernel, runs everywhere"
    return UserError(Problem(f"{name!r} does not run on {where}: {first_line(error)}", hint, "optim"))


def splits_masters(optim: str) -> bool:
    """Returns whether the master weights of the Trainer's optimizer `optim` are split: its states are small."""
    return "8bit" in optim or optim == "adafactor"


def find_fused_adam(optimizer: Any) -> torch.optim.Optimizer | None:
    """Returns the fused Adam or AdamW inside the wrappers, which can skip a step on the device; None for others.

    If its `found_inf`, a scalar on the device, is 1, the kernel leaves weights, states and step counters unchanged.
    Fused SGD does so too, but its momentum stays uninitialized if the first step of a parameter is skipped.
    """
    while isinstance(optimizer, (AcceleratedOptimizer, MasterWeights)):
        optimizer = optimizer.inner if isinstance(optimizer, MasterWeights) else optimizer.optimizer
    is_fused = type(optimizer) in (torch.optim.Adam, torch.optim.AdamW) and optimizer.defaults["fused"]
    return optimizer if is_fused else None


def with_master_weights(
    optimizer: torch.optim.Optimizer, summed: Collection[torch.nn.Parameter] | None = None
) -> MasterWeights:
    """Wraps `optimizer` so that it steps on float32 values of its bfloat16 parameters, split if its states are small.

    bitsandbytes keeps a list of parameters whose states stay in 32 bits (the Trainer adds the embeddings); their
    masters are added to it here.

    Args:
        summed: see `SplitMasters`; `MasterWeights` has float32 gradients for all weights.
    """
    has_small_states = isinstance(optimizer, Adafactor) or getattr(optimizer, "name2qmap", {}) != {}
    masters = SplitMasters(optimizer, summed) if has_small_states else MasterWeights(optimizer)
    if type(optimizer).__module__.startswith("bitsandbytes"):
        from bitsandbytes.optim import GlobalOptimManager

        manager = GlobalOptimManager.get_instance()
        for _, master in masters.pairs:
            manager.pid2config.pop(id(master), None)  # of an earlier parameter with the same id
        for module, name, settings in manager.module_weight_config_triple:
            weight = getattr(module, name)
            for parameter in [master for of, master in masters.pairs if of is weight] or [weight]:
                manager.override_config(parameter, key_value_dict=dict(settings))
        # Its own look-up at the first step uses positions in the parameter list, which then holds only one bucket.
        optimizer.initialized = True  # type: ignore[attr-defined]
    return masters
