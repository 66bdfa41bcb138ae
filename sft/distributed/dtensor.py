"""Where the weights of a head are when ranks hold parts of them: FSDP2's hooks, and slices of the vocabulary.

FSDP2 (`fully_shard`) gathers a module's weights in hooks before its forward, and hooks of its own in the backward pass
end the whole of it. A head that is called chunk by chunk, with a backward pass for each, must meet neither: `gathered`
has the weights there for all chunks, and `without_hooks` keeps the rest quiet. The gradients go to the gathered
weights through autograd, as ever, where FSDP2 finds them when the backward pass ends, and reduces them once.
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
    """The weights of `module` and all beneath it are there in full inside; all ranks that share them must enter.

    What is there already, because a group that `module` belongs to is in its forward, stays when this is left.
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
    """Copies of the parts of `module` that FSDP2 has hooks on, without these, by their names in it."""
    return {name: _unhooked(part) for name, part in module.named_modules() if _is_fsdp(part)}


def _is_fsdp(module: nn.Module) -> bool:
    return isinstance(module, FSDPModule)


def _unhooked(module: nn.Module) -> nn.Module:
    twin = shallow_copy(module)
    for kind in _HOOKS:
        hooks = {key: hook for key, hook in getattr(twin, kind).items() if not _comes_from(hook, _FSDP)}
        setattr(twin, kind, type(getattr(twin, kind))(hooks))
    return twin


def shallow_copy(module: Any) -> Any:
    """`copy.copy`, which FSDP2's classes do not stand: they would make a new module."""
    if not isinstance(module, FSDPModule):
        return copy.copy(module)
    twin = object.__new__(type(module))
    twin.__dict__.update(module.__dict__)
    return twin


def is_product(module: nn.Module) -> TypeGuard[nn.Linear]:
    """Whether `module` is a matrix product and no more, however its weights are spread over ranks.

    The hooks and the forward that sharding put there only say how; any others may change the numbers.
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
    """The slice of a vocabulary whose logits a rank makes.

    Attributes:
        vocab_size: V, of all ranks together.
        start: the first token of this rank's slice.
        width: tokens in it.
        widest: tokens in the widest slice of any rank.
        group: the ranks that share the vocabulary.
    """

    vocab_size: int
    start: int
    width: int
    widest: int
    group: dist.ProcessGroup


def vocabulary_shard(module: nn.Module) -> VocabularyShard | None:
    """This rank's slice, where tensor parallel has split the weight of `module` (or of what it adapts) by its rows."""
    weight = getattr(getattr(module, "base_layer", module), "weight", None)
    if not isinstance(weight, DTensor) or weight.placements != (Shard(0),):
        return None
    mesh, width = weight.device_mesh, weight.to_local().shape[0]
    widest = -(-weight.shape[0] // mesh.size())  # all slices are of this width but the last ones
    start = min(mesh.get_local_rank() * widest, weight.shape[0])
    return VocabularyShard(weight.shape[0], start, width, widest, mesh.get_group())


def to_local(tensor: torch.Tensor) -> torch.Tensor:
    """What this rank holds of `tensor`: itself where it is not spread over ranks."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def to_full(tensor: torch.Tensor) -> torch.Tensor:
    """`tensor` as one on each rank."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def local_gradient(gradient: torch.Tensor, of: torch.Tensor) -> torch.Tensor:
    """This rank's part of what autograd found for `of`; summed first where each rank has found a share of the sum."""
    if isinstance(gradient, DTensor) and isinstance(of, DTensor):
        gradient = gradient.redistribute(of.device_mesh, of.placements)
    return to_local(gradient)


def spreading(tensor: torch.Tensor) -> Callable[[torch.Tensor], torch.Tensor]:
    """The opposite of `to_local`: a function from what this rank holds to what is spread as `tensor` is."""
    if not isinstance(tensor, DTensor):
        return lambda local: local
    mesh, placements, shape, stride = tensor.device_mesh, tensor.placements, tensor.shape, tensor.stride()
    return lambda local: DTensor.from_local(local, mesh, placements, run_check=False, shape=shape, stride=stride)
