"""Which optimizers this machine can run, found out by one small step before the run; and master weights around them."""

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

_PROBE = (128, 64)  # bitsandbytes keeps states of fewer than 4,096 numbers in float32
_OF_THE_MODEL = ("params", "model", "optimizer_dict")  # what upstream returns for optimizers that take the model apart


def require_optimizer(args: TrainingArguments) -> None:
    """Makes one step of the `optim` that was asked for on a parameter of 8,192 numbers.

    Raises:
        UserError: a library is missing, a setting does not fit, or the step does not run on this device.
    """
    name = str(getattr(args.optim, "value", args.optim))
    try:
        optimizer_class, kwargs = Trainer.get_optimizer_cls_and_kwargs(args)
        if isinstance(optimizer_class, type) and not any(key in kwargs for key in _OF_THE_MODEL):
            state = _states_after_a_step(optimizer_class, kwargs, args.device)
        else:
            return
    except UserError:
        raise
    except (ImportError, ValueError, TypeError, RuntimeError, AttributeError, NotImplementedError) as error:
        raise _refusal(name, error, args.device) from error
    if "8bit" in name and not any(value.dtype == torch.uint8 for value in state):
        raise _refusal(name, RuntimeError("its states came out in float32"), args.device)
    if "paged" in name and args.device.type == "cpu":
        logger.warning("optim: %s: there is no GPU memory to page out of; the states lie in main memory", name)


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
    hint = "leave `optim` out for AdamW in one fused kernel, which runs everywhere"
    return UserError(Problem(f"{name!r} does not run on {where}: {first_line(error)}", hint, "optim"))


def splits_masters(optim: str) -> bool:
    """Whether an optimizer of this name of the Trainer's keeps states that take less room than float32 values would."""
    return "8bit" in optim or optim == "adafactor"


def skipping(optimizer: Any) -> torch.optim.Optimizer | None:
    """The optimizer behind its wrappers, if it leaves a step out where its `found_inf`, a scalar on the device, is 1.

    torch's fused kernels do: weights, states and step counters stay as they are. Only Adam's are taken, whose states
    begin as zeros: SGD's momentum is left uninitialised where the first step of a parameter is left out.
    """
    while isinstance(optimizer, (AcceleratedOptimizer, MasterWeights)):
        optimizer = optimizer.inner if isinstance(optimizer, MasterWeights) else optimizer.optimizer
    is_fused = type(optimizer) in (torch.optim.Adam, torch.optim.AdamW) and optimizer.defaults["fused"]
    return optimizer if is_fused else None


def with_master_weights(
    optimizer: torch.optim.Optimizer, summed: Collection[torch.nn.Parameter] | None = None
) -> MasterWeights:
    """`optimizer` over float32 values of its bfloat16 parameters.

    Where its states take less room than those values would, these are split
    (`sft.training.optim.split_master_weights`).

    bitsandbytes remembers by parameter which ones keep their states in 32 bits (the embeddings, by the Trainer's
    wish); their masters do likewise.

    Args:
        summed: see `sft.training.optim.split_master_weights.SplitMasters`; whole values want float32 gradients of all
        weights.
    """
    has_small_states = isinstance(optimizer, Adafactor) or getattr(optimizer, "name2qmap", {}) != {}
    masters = SplitMasters(optimizer, summed) if has_small_states else MasterWeights(optimizer)
    if type(optimizer).__module__.startswith("bitsandbytes"):
        from bitsandbytes.optim import GlobalOptimManager

        manager = GlobalOptimManager.get_instance()
        for _, master in masters.pairs:
            manager.pid2config.pop(id(master), None)  # of an earlier run's, which is gone, and whose id it has
        for module, name, settings in manager.module_weight_config_triple:
            weight = getattr(module, name)
            for held in [master for of, master in masters.pairs if of is weight] or [weight]:
                manager.override_config(held, key_value_dict=dict(settings))
        # Its own look-up at the first step goes by a parameter's place in the list, which holds a few at a time.
        optimizer.initialized = True  # type: ignore[attr-defined]
    return masters
