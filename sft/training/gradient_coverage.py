"""Which trained parameters the gradients of a run's first step reach, and which have none for a good reason."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

_MATRICES = (("lora_A", "lora_B"), ("lora_embedding_A", "lora_embedding_B"))  # as peft names an adapter's two
_PARTNERS = (*_MATRICES, *((b, a) for a, b in _MATRICES))


@dataclass(frozen=True)
class GradientCoverage:
    """Which trained parameters the first step reaches.

    Attributes:
        total: trained parameters.
        reached: those with a gradient that is not zero.
        missing: names of those that the forward pass does not use.
        zero: names of those whose gradient is zero throughout, for no reason that is known.
        waiting: zero at first by design: an adapter's one matrix, as long as its other one is zero, and the embeddings
            of new tokens that no row of the step has.
        idle_experts: of a mixture of experts, that no token of the step was sent to.
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
    """Looks at the gradient of every trained parameter: one transfer from the device.

    A parameter that is spread over ranks counts as a whole; every rank must call it then.
    """
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    sizes = {name: _size(p.grad) for name, p in trained.items() if p.grad is not None}
    reached: dict[str, bool] = {}
    if sizes:
        device = next(iter(sizes.values())).device
        values = torch.stack([size.to(device) for size in sizes.values()]).tolist()
        reached = {name: value != 0 for name, value in zip(sizes, values, strict=True)}  # NaN is a gradient too
    unreached = [name for name in trained if not reached.get(name)]
    idle = [name for name in unreached if _is_expert(name)]
    waiting = [name for name in unreached if name in reached and name not in idle and _waits(name, trained)]
    rest = [name for name in unreached if name not in idle and name not in waiting]
    return GradientCoverage(
        total=len(trained),
        reached=len(trained) - len(unreached),
        missing=tuple(name for name in rest if name not in reached),
        zero=tuple(name for name in rest if name in reached),
        waiting=len(waiting),
        idle_experts=len(idle),
    )


def _waits(name: str, trained: dict[str, torch.nn.Parameter]) -> bool:
    """Whether the gradient of a parameter is zero by design at the start.

    peft computes B(A(x)): where one of the two is zero, so is the other one's gradient. Where both are, they stay it.
    """
    if "trainable_tokens_delta" in name:
        return True  # of new tokens that did not occur
    for one, other in _PARTNERS:
        if one in name:
            partner = trained.get(name.replace(one, other))
            return partner is not None and not bool(_size(partner)) and bool(_size(trained[name]))
    return False


def _is_expert(name: str) -> bool:
    return "experts" in name.split(".") and "shared" not in name


def _size(tensor: Any) -> torch.Tensor:
    """The sum of all absolute values, a float32 scalar, without a copy of the tensor; of the whole where it is spread
    over ranks."""
    size = torch.linalg.vector_norm(tensor.detach(), 1, dtype=torch.float32)
    return size.full_tensor() if hasattr(size, "full_tensor") else size  # type: ignore[no-any-return]
