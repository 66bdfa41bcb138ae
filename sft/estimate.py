"""The memory that a rank will need at its peak, told before anything is loaded.

    peak = process + weights + optimizer states + max(gradients before the pass + pass, gradients + optimizer's buffers)

The pass is traced with the trainer's own code on fake tensors (see `sft.allocation_trace`), the optimizer's states are
counted from its kind, and the process is measured: it stands here with its libraries and data already loaded. On a CPU
the maxima of mapped blocks and of the heap's are taken apart and added (see `allocation_trace.Held`).
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from sft.allocation_trace import Held, trace_pass

logger = logging.getLogger("sft")

_SMALLEST_8BIT = 4096  # numbers: bitsandbytes keeps the states of smaller tensors in float32 (`min_8bit_size`)
_BLOCK = 256  # numbers that share one float32 scale in its 8-bit states

# Numbers of state for each trained number, by the first part of the optimizer's name.
_STATES = {"adamw": 2, "ademamix": 3, "lion": 1, "rmsprop": 1, "adagrad": 1, "sgd": 0, "stable_adamw": 2}


@dataclass(frozen=True, slots=True)
class MemoryEstimate:
    """Bytes of one rank.

    Attributes:
        weights: parameters and buffers, quantized ones as they are held.
        gradients: of the trainable weights, with DDP's buckets.
        optimizer: states, float32 master values, and the buffers of a step.
        activations: held for the backward pass when the decoder's forward ends.
        head: what the head and the loss hold on top at the most.
        process: libraries and data, before the model is there; 0 on a CUDA device, where they take none.
        peak: the most that is held at any moment: not the sum, for not all of it is held at once.
    """

    weights: int
    gradients: int
    optimizer: int
    activations: int
    head: int
    process: int
    peak: int

    def as_json(self) -> dict[str, int]:
        """All numbers by name, in bytes."""
        return asdict(self)

    def __str__(self) -> str:
        parts = {name: size for name, size in self.as_json().items() if name != "peak" and size}
        listed = ", ".join(f"{name} {size / 2**30:.2f}" for name, size in parts.items())
        return f"{self.peak / 2**30:.2f} GiB a rank at the peak ({listed})"


@dataclass(frozen=True, slots=True)
class OptimizerMemory:
    """`states`: bytes from the first step to the last; `buffers`: what a step makes and drops."""

    states: int
    buffers: Held


def optimizer_memory(
    optim: str, trainable: Iterable[torch.Tensor], *, device: torch.device, master_weights: bool = False
) -> OptimizerMemory:
    """What an optimizer of transformers' name `optim` holds for these weights.

    torch's own keep their states in the weight's dtype, bitsandbytes' in float32 or 8 bits with a float32 scale for
    each 256; paged states live in the host's memory on a CUDA device. Adafactor keeps a row and a column of each
    matrix (Shazeer and Stern, 2018, arXiv:1804.04235).

    Args:
        optim: e.g. `adamw_torch_fused`, `paged_adamw_8bit`, `sgd`; another family than those known is said aloud and
            counted as Adam's.
        master_weights: the optimizer keeps float32 values of 16-bit weights, and its states in float32.
    """
    weights = list(trainable)
    paged = optim.startswith("paged_")
    name = optim.removeprefix("paged_")
    family = next((f for f in sorted(_STATES, key=len, reverse=True) if name.startswith(f)), None)
    if name == "adafactor":
        states = sum(4 * (w.shape[-1] + w.shape[-2] if w.dim() > 1 else w.numel()) for w in weights)
        return OptimizerMemory(states, _largest(weights, 4, device) + _largest(weights, 4, device))
    if family is None:
        logger.warning("The memory of optim %s is not known; it is counted as AdamW's", optim)
    count = _STATES[family or "adamw"]
    masters = sum(4 * w.numel() for w in weights if w.element_size() < 4) if master_weights else 0
    states = masters + sum(_state_bytes(w, name, count, master_weights) for w in weights)
    if paged and device.type == "cuda":
        states = masters
    return OptimizerMemory(states, _step_buffers(weights, name, device))


def _state_bytes(weight: torch.Tensor, name: str, count: int, master_weights: bool) -> int:
    numbers = weight.numel()
    if "8bit" in name and numbers >= _SMALLEST_8BIT:
        return count * (numbers + 4 * -(-numbers // _BLOCK))
    upstream = "bit" in name or "bnb" in name or name.startswith(("lion", "ademamix"))
    size = 4 if upstream or master_weights else weight.element_size()
    return count * numbers * size


def _step_buffers(weights: list[torch.Tensor], name: str, device: torch.device) -> Held:
    """What a step makes and drops: nothing where one kernel does it all, as the fused and bitsandbytes' do."""
    if name != "adamw_torch":
        return Held()
    if device.type == "cuda":  # all tensors of the step at once (torch's foreach): the root of the second moments
        return sum((Held.block(w.numel() * w.element_size(), device) for w in weights), Held())
    size = weights[0].element_size() if weights else 0
    return _largest(weights, size, device) + _largest(weights, size, device)  # one by one: the root, and its quotient


def _largest(weights: list[torch.Tensor], size: int, device: torch.device) -> Held:
    return Held.block(size * max((w.numel() for w in weights), default=0), device)


def estimate_memory(
    model: nn.Module,
    run_forward: Callable[[], torch.Tensor],
    mode: FakeTensorMode,
    optimizer: OptimizerMemory,
    *,
    process: int,
    accumulation_steps: int = 1,
    world_size: int = 1,
    master_weights: bool = False,
) -> MemoryEstimate:
    """The estimate for one rank that holds a whole model (alone, or under DDP).

    Args:
        model: from `sft.allocation_trace.as_fake`, in training mode, adapters attached.
        run_forward: the trainer's forward on the longest real pass, made of fake tensors; returns the loss.
        mode: of the fake tensors.
        optimizer: from `optimizer_memory`.
        process: bytes held before the model is there; 0 on a CUDA device.
        accumulation_steps: passes of one optimizer step; the gradients of the first are held during the others.
        world_size: ranks; several have DDP's buckets, as large as all trainable weights, beside the gradients.
        master_weights: the gradients of 16-bit weights are float32, as those of their master values.
    """
    trainable = [p for p in model.parameters() if p.requires_grad]
    if master_weights:
        for parameter in trainable:
            parameter.grad_dtype = torch.float32
    weights = _distinct_bytes([*model.parameters(), *model.buffers()])
    buckets = _distinct_bytes(trainable) if world_size > 1 else 0
    accumulates = accumulation_steps > 1
    traced = trace_pass(model, run_forward, mode, hold_gradients=accumulates)
    gradients = sum((_gradient(p) for p in trainable), Held())
    in_pass = gradients + traced.peak if accumulates else traced.peak
    most = in_pass.largest(gradients + optimizer.buffers)
    return MemoryEstimate(
        weights=weights,
        gradients=gradients.total + buckets,
        optimizer=optimizer.states + optimizer.buffers.total,
        activations=traced.activations,
        head=traced.head,
        process=process,
        peak=process + weights + optimizer.states + buckets + most.total,
    )


def _gradient(parameter: torch.Tensor) -> Held:
    size = 4 if parameter.grad_dtype == torch.float32 else parameter.element_size()
    return Held.block(parameter.numel() * size, parameter.device)


def _distinct_bytes(tensors: Iterable[torch.Tensor]) -> int:
    """Bytes of these tensors, tied ones once, and of the scales that stand beside quantized ones."""
    storages = {tensor.untyped_storage()._cdata: tensor.untyped_storage().nbytes() for tensor in tensors}
    return sum(storages.values())
