"""What a forward and a backward pass allocate, byte for byte, without computing anything.

The model is made of fake tensors, which have a shape, a dtype and a device and no numbers (`FakeTensorMode`), and runs
the trainer's own code. Each storage counts from the operation that makes it until nothing refers to it any more:
activations kept for the backward pass, what checkpointing drops and makes again, the head's chunks, gradients, and all
that an operation leaves behind for a moment. Only what a kernel takes for itself inside one operation is not seen.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

from sft.memory import MAPPED_FROM


@dataclass(frozen=True, slots=True)
class Held:
    """Bytes, in blocks that go back to the system when they are freed and in blocks that do not.

    CPU memory comes from malloc, after `memory.map_large_blocks`. Large blocks are mapped one by one; the others lie
    in a heap that shrinks only at its end, so that its largest extent stays with the process, and a large block can
    make no use of the holes in it. Memory of another device is all of the first kind: what it has free serves any
    request.
    """

    mapped: int = 0
    heap: int = 0

    @classmethod
    def block(cls, size: int, device: torch.device) -> Held:
        """One block of `size` bytes."""
        return cls(heap=size) if device.type == "cpu" and size < MAPPED_FROM else cls(mapped=size)

    @property
    def total(self) -> int:
        """Both kinds."""
        return self.mapped + self.heap

    def __add__(self, other: Held) -> Held:
        return Held(self.mapped + other.mapped, self.heap + other.heap)

    def __sub__(self, other: Held) -> Held:
        return Held(self.mapped - other.mapped, self.heap - other.heap)

    def largest(self, other: Held) -> Held:
        """What a process holds that has held `self` and `other` at different times."""
        return Held(max(self.mapped, other.mapped), max(self.heap, other.heap))


@dataclass(frozen=True, slots=True)
class PassTrace:
    """What a pass holds beside the weights, buffers and gradients that were there before it.

    Attributes:
        activations: bytes held when the decoder's forward ends.
        head: bytes that the head and the loss hold on top of that at the most, until the backward pass begins.
        peak: the most at any moment of the pass, with the gradients that it makes.
    """

    activations: int
    head: int
    peak: Held


def as_fake(model: nn.Module, mode: FakeTensorMode, device: torch.device) -> nn.Module:
    """The model with fake parameters and buffers in place of its own, in place; tied ones stay tied.

    Args:
        model: on the meta device, where it is made without memory: `with torch.device("meta"): ...`.
        device: where it is to stand.
    """
    made: dict[int, torch.Tensor] = {}

    def fake(tensor: torch.Tensor) -> torch.Tensor:
        if id(tensor) not in made:
            with mode:
                value = torch.empty(tensor.shape, dtype=tensor.dtype, device=device)
            is_parameter = isinstance(tensor, nn.Parameter)
            made[id(tensor)] = nn.Parameter(value, tensor.requires_grad) if is_parameter else value
        return made[id(tensor)]

    modules = list(model.modules())
    kept = [dict(table) for module in modules for table in (module._parameters, module._buffers)]  # keeps ids unique
    for module in modules:
        for table in (cast(Any, module._parameters), module._buffers):
            table.update({name: fake(tensor) for name, tensor in table.items() if tensor is not None})
    del kept
    return model


def fake_batch(batch: dict[str, Any], mode: FakeTensorMode, device: torch.device) -> dict[str, Any]:
    """The batch with its tensors fake, on `device`; what knows how to move itself (`Boundaries`) moves."""

    def fake(value: Any) -> Any:
        if isinstance(value, torch.Tensor):
            return mode.from_tensor(value).to(device)
        return value.to(device) if hasattr(value, "to") else value

    with mode:
        return {name: tree_map(fake, value) for name, value in batch.items()}


class AllocationTrace(TorchDispatchMode):
    """Counts the bytes of living storages that operations make while it is entered."""

    def __init__(self) -> None:
        super().__init__()
        self.live = Held()
        self.peak = Held()
        self.most = 0  # bytes of both kinds at one moment
        self._alive: dict[int, weakref.ref] = {}

    def ignore(self, tensors: Iterable[torch.Tensor]) -> None:
        """Leaves out storages that were there before, of which operations make views."""
        for tensor in tensors:
            storage = tensor.untyped_storage()
            self._alive[storage._cdata] = weakref.ref(storage)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, torch.Tensor):
                self._count(tensor)
        return out

    def _count(self, tensor: torch.Tensor) -> None:
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self._alive:
            return
        block = Held.block(storage.nbytes(), tensor.device)

        def gone(_: weakref.ref) -> None:
            self._alive.pop(key, None)
            self.live -= block

        self._alive[key] = weakref.ref(storage, gone)
        self.live += block
        self.peak = self.peak.largest(self.live)
        self.most = max(self.most, self.live.total)


def trace_pass(
    model: nn.Module, run_forward: Callable[[], torch.Tensor], mode: FakeTensorMode, hold_gradients: bool = False
) -> PassTrace:
    """Runs a forward and a backward pass of a fake model.

    Args:
        model: from `as_fake`, in training mode.
        run_forward: the trainer's forward pass on a `fake_batch`, with head and loss; returns the loss, a scalar.
        mode: of the model and the batch.
        hold_gradients: each trainable weight has a gradient already, as from the second pass of a step on.
    """
    trainable = [p for p in model.parameters() if p.requires_grad]
    trace = AllocationTrace()
    ends: list[int] = []

    def ended(*_: Any) -> None:
        ends.append(trace.live.total)
        trace.most = 0

    hook = _decoder(model).register_forward_hook(ended)
    try:
        with mode:
            for parameter in trainable:
                dtype = parameter.grad_dtype or parameter.dtype
                parameter.grad = torch.empty_like(parameter, dtype=dtype) if hold_gradients else None
            trace.ignore([*model.parameters(), *model.buffers()])
            trace.ignore(p.grad for p in trainable if p.grad is not None)
            with trace:
                loss = run_forward()
                hook.remove()  # checkpointing may run the forward again
                activations = ends[-1] if ends else 0
                head = max(0, trace.most - activations)
                loss.backward()
    finally:
        hook.remove()
        for parameter in trainable:
            parameter.grad = None
    return PassTrace(activations, head, trace.peak)


def _decoder(model: Any) -> nn.Module:
    """The part of a causal language model under its head; the model itself where it has none of its own."""
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    decoder = base.get_decoder() if hasattr(base, "get_decoder") else None
    return decoder if isinstance(decoder, nn.Module) else base
