"""Counts which trained parameters have a gradient at the first step, and which have none for a good reason."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from sft.distributed.dtensor import to_full

_MATRICES = (("lora_A", "lora_B"), ("lora_embedding_A", "lora_embedding_B"))  # peft's names
_PARTNERS = (*_MATRICES, *((b, a) for a, b in _MATRICES))


@dataclass(frozen=True)
class GradientCoverage:
    """Which trained parameters have a gradient after the first step.

    Attributes:
        total: number of trained parameters.
        reached: number of those whose gradient is not zero.
        missing: names of parameters that the forward pass does not use.
        zero: names of parameters whose gradient is all zero for no known reason.
        waiting: number of gradients that are zero at first by design: of one matrix of an adapter while the other is
            zero, and of new tokens' embeddings that no sample of the step contains.
        idle_experts: number of parameters of experts that no token of the step was routed to.
    """

    total: int
    reached: int
    missing: tuple[str, ...] = ()
    zero: tuple[str, ...] = ()
    waiting: int = 0
    idle_experts: int = 0

    def __str__(self) -> str:
        parts = [f"{self.reached} of {self.total} parameters have a gradient"]
        if self.waiting:
            parts.append(f"{self.waiting} start with none by design")
        if self.idle_experts:
            parts.append(f"{self.idle_experts} of experts got no token")
        return ", ".join(parts)


def count_gradients(model: torch.nn.Module) -> GradientCoverage:
    """Inspects the gradient of every trained parameter with one transfer from the device.

    A sharded parameter counts as a whole; every rank must call it then.
    """
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    sizes = {name: _size(p.grad) for name, p in trained.items() if p.grad is not None}
    reached: dict[str, bool] = {}
    if sizes:
        device = next(iter(sizes.values())).device
        values = torch.stack([size.to(device) for size in sizes.values()]).tolist()
        reached = {name: value != 0 for name, value in zip(sizes, values, strict=True)}  # NaN counts as a gradient
    unreached = [name for name in trained if not reached.get(name)]
    idle = [name for name in unreached if "experts" in name.split(".") and "shared" not in name]
    waiting = [name for name in unreached if name in reached and name not in idle and _is_zero_by_design(name, trained)]
    rest = [name for name in unreached if name not in idle and name not in waiting]
    return GradientCoverage(
        total=len(trained),
        reached=len(trained) - len(unreached),
        missing=tuple(name for name in rest if name not in reached),
        zero=tuple(name for name in rest if name in reached),
        waiting=len(waiting),
        idle_experts=len(idle),
    )


def _is_zero_by_design(name: str, trained: dict[str, torch.nn.Parameter]) -> bool:
    """Returns whether the gradient of a parameter is zero by design at the start.

    peft computes B(A(x)): if one of the two is zero, so is the gradient of the other. If both are, they stay zero.
    """
    if "trainable_tokens_delta" in name:
        return True  # new tokens that did not occur
    for one, other in _PARTNERS:
        if one in name:
            partner = trained.get(name.replace(one, other))
            return partner is not None and not bool(_size(partner)) and bool(_size(trained[name]))
    return False


def _size(tensor: torch.Tensor) -> torch.Tensor:
    """Returns the sum of absolute values, a float32 scalar, over all shards, without a copy of the tensor."""
    return to_full(torch.linalg.vector_norm(tensor.detach(), 1, dtype=torch.float32))
