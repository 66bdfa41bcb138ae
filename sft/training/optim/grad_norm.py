"""Computes the norm of all gradients and clips by it, on the device, over several meshes and dtypes."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch


def gradient_norms(named: Iterable[tuple[str, torch.nn.Parameter]]) -> dict[str, torch.Tensor]:
    """Returns the 2-norm of each gradient by parameter name, float32 scalars on the device.

    The norm of a sharded gradient is a DTensor as well. `torch.nn.utils.get_total_norm` would round norms of bfloat16
    gradients to bfloat16.
    """
    gradients = {name: p.grad for name, p in named if p.grad is not None}
    kinds: dict[Any, list[str]] = {}
    for name, gradient in gradients.items():
        kinds.setdefault((_mesh(gradient), gradient.device, gradient.dtype), []).append(name)
    norms = dict(gradients)  # in the order of the parameters
    for names in kinds.values():
        found = torch._foreach_norm([gradients[name] for name in names], 2, torch.float32)
        norms.update(zip(names, found, strict=True))
    return norms


def total_norm(norms: Iterable[torch.Tensor]) -> torch.Tensor:
    """Returns the 2-norm of all gradients together, a float32 scalar on the device, the same on all ranks."""
    meshes: dict[Any, list[torch.Tensor]] = {}
    for norm in norms:
        of_mesh = meshes.setdefault(_mesh(norm), [])
        of_mesh.append(norm.to(of_mesh[0].device) if of_mesh else norm)
    found = [torch.linalg.vector_norm(torch.stack(of_mesh)) for of_mesh in meshes.values()]
    whole = [norm.full_tensor() if hasattr(norm, "full_tensor") else norm for norm in found]
    if len(whole) == 1:
        return whole[0]
    return torch.linalg.vector_norm(torch.stack(whole)) if whole else torch.tensor(0.0)


def clip_factor(max_norm: float, norm: torch.Tensor) -> torch.Tensor:
    """Returns the factor by which clipping scales gradients of this norm, on the device."""
    return (max_norm / (norm + 1e-6)).clamp(max=1.0)


def clip_gradients(parameters: Iterable[torch.nn.Parameter], max_norm: float, norm: torch.Tensor) -> None:
    """Scales all gradients by max_norm / norm if that is below 1, as `torch.nn.utils.clip_grad_norm_` does."""
    meshes: dict[Any, list[torch.nn.Parameter]] = {}
    for parameter in parameters:
        if parameter.grad is not None:
            meshes.setdefault(_mesh(parameter.grad), []).append(parameter)
    for of_mesh in meshes.values():
        torch.nn.utils.clip_grads_with_norm_(of_mesh, max_norm, norm)


def _mesh(tensor: torch.Tensor) -> Any:
    """Returns the mesh of a DTensor, None for a plain tensor: one foreach operation cannot mix meshes."""
    return getattr(tensor, "device_mesh", None)
