"""What a forward and a backward pass allocate, byte for byte, without computing anything.

The model is made of fake tensors, which have a shape, a dtype and a device and no numbers (`FakeTensorMode`), and runs
the trainer's own code. Each storage counts from the operation that makes it until nothing refers to it any more:
activations kept for the backward pass, what checkpointing drops and makes again, the head's chunks, gradients, and all
that an operation leaves behind for a moment. Only what a kernel takes for itself inside one operation is not seen.
"""

from __future__ import annotations

import itertools
import weakref
from collections.abc import Callable, Hashable, Iterable
from dataclasses import dataclass
from typing import Any, NamedTuple, cast

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

from sft.model.lora import without_adapter

NODE = -1


class Event(NamedTuple):
    """A storage is made, with its size in bytes; a node of autograd's graph, with `NODE`; or freed, with 0."""

    block: Hashable
    size: int


@dataclass(frozen=True, slots=True)
class PassTrace:
    """What a pass holds beside the weights, buffers and gradients that were there before it.

    Attributes:
        activations: bytes held when the decoder's forward ends.
        head: bytes that the head and the loss hold on top of that at the most, until the backward pass begins.
        peak: the most bytes at any moment of the pass, with the gradients that it makes.
        events: what it makes and frees, in order.
        gradients_freed: the same of the gradients that it has made, when they are dropped in the model's order.
    """

    activations: int
    head: int
    peak: int
    events: list[Event]
    gradients_freed: list[Event]


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
    """The batch with its tensors fake, on `device`; what knows how to move itself (`DocumentOffsets`) moves."""

    def fake(value: Any) -> Any:
        if isinstance(value, torch.Tensor):
            return mode.from_tensor(value).to(device)
        return value.to(device) if hasattr(value, "to") else value

    with mode:
        return {name: tree_map(fake, value) for name, value in batch.items()}


class AllocationTrace(TorchDispatchMode):
    """Notes the storages that operations make while it is entered, and when nothing refers to them any more.

    Attributes:
        live: bytes of those that are there.
        peak: the most of them at one moment.
        events: their making and freeing in order, among them the making of the graph's nodes.
    """

    def __init__(self) -> None:
        super().__init__()
        self.live = self.peak = 0
        self.events: list[Event] = []
        self._alive: dict[int, weakref.ref] = {}
        self._numbers = itertools.count()

    def ignore(self, tensors: Iterable[torch.Tensor]) -> None:
        """Leaves out storages that were there before, of which operations make views."""
        for tensor in tensors:
            storage = tensor.untyped_storage()
            self._alive[storage._cdata] = weakref.ref(storage)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        inputs = (leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor))
        if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in inputs):
            self.events.append(Event(next(self._numbers), NODE))  # it is made before the operation runs
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, torch.Tensor):
                self._note(tensor)
        return out

    def _note(self, tensor: torch.Tensor) -> None:
        storage = tensor.untyped_storage()
        key, size = storage._cdata, storage.nbytes()
        if key in self._alive or not size:
            return
        block = next(self._numbers)

        def gone(_: weakref.ref) -> None:
            self._alive.pop(key, None)
            self.live -= size
            self.events.append(Event(block, 0))

        self._alive[key] = weakref.ref(storage, gone)
        self.live += size
        self.peak = max(self.peak, self.live)
        self.events.append(Event(block, size))


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
        ends.append(trace.live)
        trace.peak = trace.live

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
                head = max(0, trace.peak - activations)
                loss.backward()
                del loss
            trace.events += [Event(block, 0) for block, size in trace.events if size == NODE]  # they hang on the loss
        pass_ends = len(trace.events)
    finally:
        hook.remove()
        for parameter in trainable:
            parameter.grad = None
    events, freed = trace.events[:pass_ends], trace.events[pass_ends:]
    return PassTrace(activations, head, peak_of(events), events, freed)


def peak_of(events: Iterable[Event]) -> int:
    """The most bytes of storages that these have made and not yet freed."""
    sizes: dict[Hashable, int] = {}
    live = most = 0
    for block, size in events:
        if size > 0:
            sizes[block] = size
            live += size
        else:
            live -= sizes.pop(block, 0)
        most = max(most, live)
    return most


def _decoder(model: Any) -> nn.Module:
    """The part of a causal language model under its head; the model itself where it has none of its own."""
    base = without_adapter(model)
    decoder = base.get_decoder() if hasattr(base, "get_decoder") else None
    return decoder if isinstance(decoder, nn.Module) else base
