"""What a forward and a backward pass allocate, byte for byte, without computing anything.

The model is made of fake tensors, which have a shape, a dtype and a device but no values (`FakeTensorMode`), and runs
the trainer's own code. Each storage counts from the operation that makes it until nothing refers to it any more:
activations kept for the backward pass, what checkpointing drops and recomputes, the head's chunks, gradients, and
temporary results of an operation. Only the scratch memory of a kernel inside one operation is not seen.
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

from sft.model.lora import without_adapter


@dataclass(frozen=True, slots=True)
class PassTrace:
    """Bytes that a pass holds beside the weights, buffers and gradients that existed before it.

    Attributes:
        activations: held when the decoder's forward ends.
        head: held by the head and the loss on top of that at the most, until the backward pass begins.
        peak: the most at any moment of the pass, with the gradients that it makes.
        kept: still held after the pass: the gradients that it made.
    """

    activations: int
    head: int
    peak: int
    kept: int


def as_fake(model: nn.Module, mode: FakeTensorMode, device: torch.device) -> nn.Module:
    """Replaces the model's parameters and buffers by fake ones, in place; tied ones stay tied.

    Args:
        model: on the meta device, where it is made without memory: `with torch.device("meta"): ...`.
        device: of the fake tensors.
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
    """Returns the batch with fake tensors on `device`; an object with its own `to` (`DocumentOffsets`) is moved."""

    def fake(value: Any) -> Any:
        if isinstance(value, torch.Tensor):
            return mode.from_tensor(value).to(device)
        return value.to(device) if hasattr(value, "to") else value

    with mode:
        return {name: tree_map(fake, value) for name, value in batch.items()}


class AllocationTrace(TorchDispatchMode):
    """Counts the storages that operations make while it is entered, until nothing refers to them any more.

    Attributes:
        live: bytes of those that exist now.
        peak: the most of them at one moment.
    """

    def __init__(self) -> None:
        super().__init__()
        self.live = self.peak = 0
        self._alive: dict[int, weakref.ref] = {}

    def ignore(self, tensors: Iterable[torch.Tensor]) -> None:
        """Does not count the storages of `tensors`, which existed before and of which operations make views."""
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
        key, size = storage._cdata, storage.nbytes()
        if key in self._alive or not size:
            return

        def freed(_: weakref.ref) -> None:
            self._alive.pop(key, None)
            self.live -= size

        self._alive[key] = weakref.ref(storage, freed)
        self.live += size
        self.peak = max(self.peak, self.live)


def trace_pass(
    model: nn.Module, run_forward: Callable[[], torch.Tensor], mode: FakeTensorMode, hold_gradients: bool = False
) -> PassTrace:
    """Runs a forward and a backward pass of a fake model.

    Args:
        model: from `as_fake`, in training mode.
        run_forward: the trainer's forward pass on a `fake_batch`, with head and loss; returns the loss, a scalar.
        hold_gradients: each trainable weight has a gradient already, as from the second micro-batch of a step on.
    """
    trainable = [p for p in model.parameters() if p.requires_grad]
    trace = AllocationTrace()
    activations = decoder_peak = 0

    def decoder_ended(*_: Any) -> None:
        nonlocal activations, decoder_peak
        activations, decoder_peak = trace.live, max(decoder_peak, trace.peak)
        trace.peak = trace.live

    hook = _decoder(model).register_forward_hook(decoder_ended)
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
                head = max(0, trace.peak - activations)
                loss.backward()
                del loss
            kept = trace.live
    finally:
        hook.remove()
        for parameter in trainable:
            parameter.grad = None
    return PassTrace(activations, head, max(decoder_peak, trace.peak), kept)


def _decoder(model: Any) -> nn.Module:
    """Returns the part of a causal LM under its head; the model itself where it has no decoder of its own."""
    base = without_adapter(model)
    decoder = base.get_decoder() if hasattr(base, "get_decoder") else None
    return decoder if isinstance(decoder, nn.Module) else base
