"""The memory that a rank will need at its peak, estimated before anything is loaded.

    peak = process + weights + the most that an optimizer step holds at one moment: activations, gradients, optimizer

The forward and backward pass are traced with the trainer's own code on fake tensors (see `sft.estimate.memory_trace`),
the optimizer's states are counted from its kind, and the process is measured: its libraries and data are loaded by now.
A block counts until it is freed, as in `torch.cuda.max_memory_allocated`. On a CPU that makes the peak a lower bound:
malloc keeps many freed blocks with the process.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from sft.estimate.memory_trace import trace_pass
from sft.training.optim.factory import splits_masters
from sft.training.optim.split_master_weights import LARGEST_PIECE

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
        process: libraries and data, before the model is loaded; 0 on a CUDA device, where they take none.
        peak: the most that is held at any moment: not the sum, for not all of it is held at once.
    """

    weights: int
    gradients: int
    optimizer: int
    activations: int
    head: int
    process: int
    peak: int


@dataclass(frozen=True, slots=True)
class OptimizerMemory:
    """Bytes of an optimizer.

    Attributes:
        states: with the master values, held from the first step to the last.
        buffers: made and dropped by each step.
    """

    states: int = 0
    buffers: int = 0


def optimizer_memory(
    optim: str, trainable: Iterable[torch.Tensor], *, device: torch.device, master_weights: bool = False
) -> OptimizerMemory:
    """Counts what an optimizer of transformers' name `optim` holds for these weights.

    torch's own keep their states in the weight's dtype, bitsandbytes' in float32 or 8 bits with a float32 scale for
    each 256; paged states live in the host's memory on a CUDA device. Adafactor keeps a row and a column of each
    matrix (Shazeer and Stern, 2018, arXiv:1804.04235).

    Args:
        optim: e.g. `adamw_torch_fused`, `paged_adamw_8bit`, `sgd`; an unknown family is counted as Adam's, with a
            warning.
        master_weights: the optimizer keeps float32 values of 16-bit weights, split or whole
            (`sft.training.optim.factory`), and its states in float32.
    """
    weights = list(trainable)
    name = optim.removeprefix("paged_")
    family = next((f for f in sorted(_STATES, key=len, reverse=True) if name.startswith(f)), None)
    halves = [w.numel() for w in weights if w.element_size() < 4] if master_weights else []
    masters = (2 if splits_masters(optim) else 4) * sum(halves)
    rebuilt = 4 * min(LARGEST_PIECE, max(halves, default=0)) if splits_masters(optim) else 0
    if name == "adafactor":
        states = sum(4 * n for w in weights for n in (w.shape[-2:] if w.dim() > 1 else w.shape))
        return OptimizerMemory(masters + states, rebuilt + 2 * _largest(weights, 4))
    if family is None:
        logger.warning("The memory of optim %s is not known; it is counted as AdamW's", optim)
    states = _STATES[family or "adamw"] * sum(_state_bytes(w, name, master_weights) for w in weights)
    if optim.startswith("paged_") and device.type == "cuda":
        states = 0
    return OptimizerMemory(masters + states, rebuilt + _buffer_bytes(weights, name, device))


def _state_bytes(weight: torch.Tensor, name: str, master_weights: bool) -> int:
    """Returns the bytes of one state of a weight."""
    numbers = weight.numel()
    if "8bit" in name and numbers >= _SMALLEST_8BIT:
        return numbers + 4 * -(-numbers // _BLOCK)
    is_float32 = "bit" in name or "bnb" in name or name.startswith(("lion", "ademamix")) or master_weights
    return numbers * (4 if is_float32 else weight.element_size())


def _buffer_bytes(weights: list[torch.Tensor], name: str, device: torch.device) -> int:
    """Returns what a step makes and drops: nothing where one kernel does it all, as the fused and bitsandbytes' do."""
    if name != "adamw_torch":
        return 0
    if device.type == "cuda":  # all tensors of the step at once (torch's foreach): the root of the second moments
        return sum(w.numel() * w.element_size() for w in weights)
    return 2 * _largest(weights, weights[0].element_size()) if weights else 0  # one by one: the root, and its quotient


def _largest(weights: list[torch.Tensor], size: int) -> int:
    return size * max((w.numel() for w in weights), default=0)


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
    summed: Collection[nn.Parameter] | None = None,
) -> MemoryEstimate:
    """Estimates the memory of one rank that holds a whole model (alone, or under DDP).

    Args:
        model: from `sft.estimate.memory_trace.as_fake`, in training mode, adapters attached.
        run_forward: the trainer's forward on the longest real micro-batch, made of fake tensors; returns the loss.
        mode: of the fake tensors.
        process: as in `MemoryEstimate`.
        accumulation_steps: micro-batches of one step; the gradients of the first are held during the others.
        world_size: ranks; several have DDP's buckets, as large as all trainable weights, beside the gradients.
        master_weights: the gradients of 16-bit weights are float32, as those of their master values.
        summed: the weights of which only that is true (see `sft.training.optim.split_master_weights.SplitMasters`);
            None is all.
    """
    trainable = [p for p in model.parameters() if p.requires_grad]
    if master_weights:
        for parameter in trainable if summed is None else summed:
            parameter.grad_dtype = torch.float32
    weights = _distinct_bytes([*model.parameters(), *model.buffers()])
    buckets = _distinct_bytes(trainable) if world_size > 1 else 0
    first = trace_pass(model, run_forward, mode)
    beside_gradients = optimizer.buffers
    if accumulation_steps > 1:
        beside_gradients = max(beside_gradients, trace_pass(model, run_forward, mode, hold_gradients=True).peak)
    # From the second step on the states exist: in the first micro-batch, in a later one, or in the optimizer's step.
    step_peak = optimizer.states + max(first.peak, first.kept + beside_gradients)
    return MemoryEstimate(
        weights=weights,
        gradients=sum(p.numel() * (p.grad_dtype or p.dtype).itemsize for p in trainable) + buckets,
        optimizer=optimizer.states + optimizer.buffers,
        activations=first.activations,
        head=first.head,
        process=process,
        peak=process + weights + buckets + step_peak,
    )


def _distinct_bytes(tensors: Iterable[torch.Tensor]) -> int:
    """Adds up the bytes of these tensors' storages, tied ones once."""
    storages = {tensor.untyped_storage()._cdata: tensor.untyped_storage().nbytes() for tensor in tensors}
    return sum(storages.values())
