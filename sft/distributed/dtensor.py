"""Weights that are sharded over ranks: gathering FSDP2's for an output head, and slices of the vocabulary.

FSDP2 (`fully_shard`) gathers a module's weights in hooks before its forward pass and reduces their gradients in hooks
of its own, when the backward pass ends. A head that is called chunk by chunk, with a backward pass for each, must
trigger neither: `gathered` gathers the weights once for all chunks, and `without_hooks` skips the hooks. Autograd
accumulates the gradients of the gathered weights, where FSDP2 finds them and reduces them once.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeGuard

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor, Shard

_HOOKS = ("_forward_pre_hooks", "_forward_hooks")
_FSDP, _TENSOR_PARALLEL = "torch.distributed.fsdp", ("torch.distributed.tensor", "transformers.distributed")


@contextmanager
def gathered(module: nn.Module) -> Iterator[None]:
    """Gathers the weights of `module` and its submodules while inside; all ranks that share them must enter.

    What was gathered before, because a module around it is in its forward pass, is not resharded on leaving.
    """
    gathered_here = []
    for part in module.modules():
        if isinstance(part, FSDPModule):
            before = list(part.parameters())
            part.unshard()
            if any(one is not other for one, other in zip(before, part.parameters(), strict=True)):
                gathered_here.append(part)
    try:
        yield
    finally:
        for part in gathered_here:
            part.reshard()


def without_hooks(module: nn.Module) -> dict[str, nn.Module]:
    """Returns copies without FSDP2's hooks of the submodules that have them, by their names in `module`."""
    return {name: _without_hooks(part) for name, part in module.named_modules() if isinstance(part, FSDPModule)}


def _without_hooks(module: FSDPModule) -> nn.Module:
    twin = shallow_copy(module)
    for kind in _HOOKS:
        hooks = {key: hook for key, hook in getattr(twin, kind).items() if not _comes_from(hook, _FSDP)}
        setattr(twin, kind, type(getattr(twin, kind))(hooks))
    return twin


def shallow_copy(module: Any) -> Any:
    """Returns `copy.copy(module)`, also for FSDP2's classes, of which `copy.copy` would construct a new module."""
    if not isinstance(module, FSDPModule):
        return copy.copy(module)
    twin = object.__new__(type(module))
    twin.__dict__.update(module.__dict__)
    return twin


def is_plain_linear(module: nn.Module) -> TypeGuard[nn.Linear]:
    """Returns whether `module` is a matrix multiplication and no more, however its weights are sharded.

    Sharding's own hooks and forward do not change the result; any others may.
    """
    if type(module) is not nn.Linear and type(module).__bases__ != (FSDPModule, nn.Linear):
        return False
    is_split = isinstance(module.weight, DTensor)
    known = (_FSDP, *_TENSOR_PARALLEL) if is_split else (_FSDP,)
    hooks = [hook for kind in _HOOKS for hook in getattr(module, kind).values()]
    forward = [module.__dict__["forward"]] if "forward" in module.__dict__ else []
    is_hooked = module._backward_hooks or module._backward_pre_hooks
    return not is_hooked and all(_comes_from(code, *known) for code in (*hooks, *forward))


def _comes_from(code: Any, *packages: str) -> bool:
    return str(getattr(code, "__module__", "")).startswith(packages)


@dataclass(frozen=True, slots=True)
class VocabularyShard:
    """The slice of a vocabulary whose logits a rank computes.

    Attributes:
        vocab_size: V, of all ranks together.
        start: the first token of this rank's slice.
        width: number of tokens in it.
        widest: number of tokens in the widest slice of any rank.
        group: the ranks that share the vocabulary.
    """

    vocab_size: int
    start: int
    width: int
    widest: int
    group: dist.ProcessGroup


def vocabulary_shard(module: nn.Module) -> VocabularyShard | None:
    """Returns this rank's slice if tensor parallelism has split the weight of `module` (or its base layer) by rows."""
    weight = getattr(getattr(module, "base_layer", module), "weight", None)
    if not isinstance(weight, DTensor) or weight.placements != (Shard(0),):
        return None
    mesh, width = weight.device_mesh, weight.to_local().shape[0]
    widest = -(-weight.shape[0] // mesh.size())  # all slices are of this width but the last ones
    start = min(mesh.get_local_rank() * widest, weight.shape[0])
    return VocabularyShard(weight.shape[0], start, width, widest, mesh.get_group())


def to_local(tensor: torch.Tensor) -> torch.Tensor:
    """Returns this rank's part of `tensor`: all of it where it is not sharded."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def to_full(tensor: torch.Tensor) -> torch.Tensor:
    """Returns the whole of `tensor` on each rank."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def local_gradient(gradient: torch.Tensor, of: torch.Tensor) -> torch.Tensor:
    """Returns this rank's part of the gradient of `of`; partial sums are reduced first."""
    if isinstance(gradient, DTensor) and isinstance(of, DTensor):
        gradient = gradient.redistribute(of.device_mesh, of.placements)
    return to_local(gradient)


def sharding_like(tensor: torch.Tensor) -> Callable[[torch.Tensor], torch.Tensor]:
    """Returns the inverse of `to_local`: a function from this rank's part to a tensor sharded as `tensor` is."""
    if not isinstance(tensor, DTensor):
        return lambda local: local
    mesh, placements, shape, stride = tensor.device_mesh, tensor.placements, tensor.shape, tensor.stride()
    return lambda local: DTensor.from_local(local, mesh, placements, run_check=False, shape=shape, stride=stride)
