"""The memory that a rank will need at its peak, told before anything is loaded.

    peak = process + weights + the most that some optimizer steps hold at a moment: passes, gradients, optimizer

The pass is traced with the trainer's own code on fake tensors (see `sft.estimate.memory_trace`), the optimizer's states
are counted from its kind, and the process is measured: it stands here with its libraries and data already loaded. On a
CPU blocks that were freed stay with the process (see `sft.estimate.heap_model`); a CUDA device's count only until they
are freed, as in what is measured there (`torch.cuda.max_memory_allocated`).
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection, Hashable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from sft.estimate.heap_model import held_at_most
from sft.estimate.memory_trace import Event, PassTrace, peak_of, trace_pass
from sft.training.optim.factory import splits_masters
from sft.training.optim.split_master_weights import LARGEST_PIECE

logger = logging.getLogger("sft")

_SMALLEST_8BIT = 4096  # numbers: bitsandbytes keeps the states of smaller tensors in float32 (`min_8bit_size`)
_BLOCK = 256  # numbers that share one float32 scale in its 8-bit states

_STEPS = 4  # optimizer steps that are followed: the heap grew in the first two or three
_PASSES = 3  # of each at the most

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
        peak: the most that is held at any moment: not the sum, for not all of it is held at once, and on a CPU blocks
            that were freed stay with the process.
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
    """Sizes in bytes of an optimizer's blocks, in the order in which it makes them.

    Attributes:
        masters: made with the optimizer.
        first_step: states, made in the first step.
        buffers: what each step makes and drops.
    """

    masters: tuple[int, ...] = ()
    first_step: tuple[int, ...] = ()
    buffers: tuple[int, ...] = ()

    @property
    def states(self) -> int:
        """Bytes that it holds from the first step to the last."""
        return sum(self.masters) + sum(self.first_step)


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
        master_weights: the optimizer keeps float32 values of 16-bit weights, split or whole
        (`sft.training.optim.factory`), and
            its states in float32.
    """
    weights = list(trainable)
    paged = optim.startswith("paged_")
    name = optim.removeprefix("paged_")
    family = next((f for f in sorted(_STATES, key=len, reverse=True) if name.startswith(f)), None)
    halves = [w for w in weights if w.element_size() < 4] if master_weights else []
    masters = tuple((2 if splits_masters(optim) else 4) * w.numel() for w in halves)
    rebuilt = (4 * min(LARGEST_PIECE, max((w.numel() for w in halves), default=0)),) if splits_masters(optim) else ()
    if name == "adafactor":
        states = [4 * n for w in weights for n in (w.shape[-2:] if w.dim() > 1 else w.shape)]
        return OptimizerMemory(masters, tuple(states), rebuilt + (_largest(weights, 4),) * 2)
    if family is None:
        logger.warning("The memory of optim %s is not known; it is counted as AdamW's", optim)
    count = _STATES[family or "adamw"]
    states = [size for w in weights for size in _states_of(w, name, master_weights) * count]
    if paged and device.type == "cuda":
        states = []
    return OptimizerMemory(masters, tuple(states), rebuilt + _step_buffers(weights, name, device))


def _states_of(weight: torch.Tensor, name: str, master_weights: bool) -> list[int]:
    """One state of a weight: its blocks' sizes."""
    numbers = weight.numel()
    if "8bit" in name and numbers >= _SMALLEST_8BIT:
        return [numbers, 4 * -(-numbers // _BLOCK)]
    upstream = "bit" in name or "bnb" in name or name.startswith(("lion", "ademamix"))
    return [numbers * (4 if upstream or master_weights else weight.element_size())]


def _step_buffers(weights: list[torch.Tensor], name: str, device: torch.device) -> tuple[int, ...]:
    """What a step makes and drops: nothing where one kernel does it all, as the fused and bitsandbytes' do."""
    if name != "adamw_torch":
        return ()
    if device.type == "cuda":  # all tensors of the step at once (torch's foreach): the root of the second moments
        return tuple(w.numel() * w.element_size() for w in weights)
    size = weights[0].element_size() if weights else 0
    return (_largest(weights, size),) * 2  # one by one: the root, and its quotient


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
    """The estimate for one rank that holds a whole model (alone, or under DDP).

    Args:
        model: from `sft.estimate.memory_trace.as_fake`, in training mode, adapters attached.
        run_forward: the trainer's forward on the longest real pass, made of fake tensors; returns the loss.
        mode: of the fake tensors.
        optimizer: from `optimizer_memory`.
        process: bytes held before the model is there; 0 on a CUDA device.
        accumulation_steps: passes of one optimizer step; the gradients of the first are held during the others.
        world_size: ranks; several have DDP's buckets, as large as all trainable weights, beside the gradients.
        master_weights: the gradients of 16-bit weights are float32, as those of their master values.
        summed: of which weights only that is so (see `sft.training.optim.split_master_weights.SplitMasters`); None is
        of all.
    """
    trainable = [p for p in model.parameters() if p.requires_grad]
    if master_weights:
        for parameter in trainable if summed is None else summed:
            parameter.grad_dtype = torch.float32
    weights = _distinct_bytes([*model.parameters(), *model.buffers()])
    buckets = _distinct_bytes(trainable) if world_size > 1 else 0
    first = trace_pass(model, run_forward, mode)
    passes = [first]
    if accumulation_steps > 1:
        added = trace_pass(model, run_forward, mode, hold_gradients=True)
        passes += [added] * (min(accumulation_steps, _PASSES) - 1)
    steps = list(_steps(passes, optimizer))
    on_cpu = all(parameter.device.type == "cpu" for parameter in trainable)
    held = held_at_most(steps) if on_cpu else None
    return MemoryEstimate(
        weights=weights,
        gradients=sum(_gradient_bytes(p) for p in trainable) + buckets,
        optimizer=optimizer.states + sum(optimizer.buffers),
        activations=first.activations,
        head=first.head,
        process=process,
        peak=process + weights + buckets + (peak_of(steps) if held is None else held),
    )


def _steps(passes: Sequence[PassTrace], optimizer: OptimizerMemory) -> Iterator[Event]:
    """What some optimizer steps make and free: the second finds a heap with other holes than the first.

    Args:
        passes: of a step; the first makes the gradients, the others add to them.
    """
    first, *others = passes
    yield from (Event(("master", i), size) for i, size in enumerate(optimizer.masters))
    for step in range(_STEPS):
        yield from _named(first.events, (step, 0))
        for number, added in enumerate(others, 1):
            yield from _named(added.events + added.gradients_freed, (step, number))
        if step == 0:
            yield from (Event(("state", i), size) for i, size in enumerate(optimizer.first_step))
        yield from (Event((step, "buffer", i), size) for i, size in enumerate(optimizer.buffers))
        yield from (Event((step, "buffer", i), 0) for i in range(len(optimizer.buffers)))
        yield from _named(first.gradients_freed, (step, 0))


def _named(events: Iterable[Event], name: Hashable) -> Iterator[Event]:
    """The events with blocks of their own, for a pass that comes more than once."""
    return (Event((name, block), size) for block, size in events)


def _gradient_bytes(parameter: torch.Tensor) -> int:
    return parameter.numel() * (4 if parameter.grad_dtype == torch.float32 else parameter.element_size())


def _distinct_bytes(tensors: Iterable[torch.Tensor]) -> int:
    """Bytes of these tensors, tied ones once, and of the scales that stand beside quantized ones."""
    storages = {tensor.untyped_storage()._cdata: tensor.untyped_storage().nbytes() for tensor in tensors}
    return sum(storages.values())
