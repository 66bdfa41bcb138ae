"""Gradients that the forward has made already, handed to autograd."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from sft.distributed.dtensor import spreading


def gradient_dtype(tensor: torch.Tensor) -> torch.dtype:
    """What autograd wants `tensor`'s gradient in: float32 for a weight in bfloat16 with float32 master values."""
    return (tensor.grad_dtype if tensor.is_leaf else None) or tensor.dtype


class PrecomputedGradients(torch.autograd.Function):
    """A sum whose gradients are known already: the backward multiplies them by what arrives."""

    @staticmethod
    def forward(
        ctx: Any,
        total: torch.Tensor,
        gradients: Sequence[torch.Tensor | None],
        scale: torch.Tensor | None,
        *tensors: torch.Tensor,
    ) -> torch.Tensor:
        """`total`, a scalar, with `gradients` for `tensors`, made with `scale`; None where one has none.

        Of a tensor that is spread over ranks the gradient is this rank's part.
        """
        ctx.scale = scale
        ctx.gradients = gradients
        ctx.dtypes = [gradient_dtype(tensor) for tensor in tensors]
        ctx.spread = [spreading(tensor) for tensor in tensors]
        return total.clone()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, factor: torch.Tensor) -> Any:  # type: ignore[override]
        """In place, once: a copy of the head's gradient would be as large as the head."""
        if ctx.gradients is None:
            raise RuntimeError("the head's gradients were used up by an earlier backward through the same graph")
        factor = factor if ctx.scale is None else factor / ctx.scale
        found = zip(ctx.gradients, ctx.dtypes, ctx.spread, strict=True)
        scaled = [None if g is None else spread(g.mul_(factor).to(d)) for g, d, spread in found]
        ctx.gradients = None
        return None, None, None, *scaled
