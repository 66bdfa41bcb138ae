"""The norm of all gradients, and clipping by it, on the device; over several meshes and formats."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch


def gradient_norm(parameters: Iterable[torch.nn.Parameter]) -> torch.Tensor:
    """The 2-norm of all gradients together, a float32 scalar on the device, the same on all ranks."""
    norms = [_norm([p.grad for p in group if p.grad is not None]) for group in _by_mesh(parameters)]
    whole = [norm.full_tensor() if hasattr(norm, "full_tensor") else norm for norm in norms]
    if len(whole) == 1:
        return whole[0]
    return torch.linalg.vector_norm(torch.stack(whole)) if whole else torch.tensor(0.0)


def _norm(gradients: list[torch.Tensor]) -> torch.Tensor:
    """Of gradients on one mesh: `torch.nn.utils.get_total_norm`, which would round norms of bfloat16 to bfloat16."""
    norms: list[torch.Tensor] = [gradients[0]] * len(gradients)
    places: dict[Any, list[int]] = {}
    for place, gradient in enumerate(gradients):
        places.setdefault((gradient.device, gradient.dtype), []).append(place)
    for of_kind in places.values():
        found = torch._foreach_norm([gradients[place] for place in of_kind], 2, torch.float32)
        for place, norm in zip(of_kind, found, strict=True):
            norms[place] = norm.to(gradients[0].device)
    return torch.linalg.vector_norm(torch.stack(norms))


def clip_factor(max_norm: float, norm: torch.Tensor) -> torch.Tensor:
    """What clipping multiplies gradients of this norm with, on the device."""
    return (max_norm / (norm + 1e-6)).clamp(max=1.0)


def clip_gradients(parameters: Iterable[torch.nn.Parameter], max_norm: float, norm: torch.Tensor) -> None:
    """Scales all gradients by max_norm / norm where that is below 1, as `torch.nn.utils.clip_grad_norm_` does."""
    for group in _by_mesh(parameters):
        torch.nn.utils.clip_grads_with_norm_(group, max_norm, norm)


def _by_mesh(parameters: Iterable[torch.nn.Parameter]) -> list[list[torch.nn.Parameter]]:
    """Parameters with a gradient, those on one device mesh together: one operation cannot span several."""
    groups: dict[Any, list[torch.nn.Parameter]] = {}
    for parameter in parameters:
        if parameter.grad is not None:
            groups.setdefault(getattr(parameter.grad, "device_mesh", None), []).append(parameter)
    return list(groups.values())
