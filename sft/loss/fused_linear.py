"""The output head and the loss as one, in chunks of supervised tokens: the logits of a batch never exist at once.

For N tokens and a vocabulary of V, logits in bf16, their float32 copy, its softmax and two gradients take 16·N·V
bytes: 10 GB for 4,096 tokens and a vocabulary of 150k. Here the gradients of a chunk are computed in the forward pass,
while its logits exist, so that nothing is computed twice and the backward pass only scales them (as in Liger Kernel,
Hsu et al., 2024, arXiv:2410.10989, section 3.2).
"""

from __future__ import annotations

import functools
import types
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from sft.distributed.device import autocast_dtype
from sft.distributed.dtensor import gathered, sharding_like, to_full, to_local, vocabulary_shard
from sft.loss.chunked import linear_chunks, module_chunks, score_in_blocks
from sft.loss.load_balancing import load_balancing_loss
from sft.loss.output_head import LogitTransform, OutputHead, find_output_head
from sft.loss.token_loss import LossSettings, Objective, TokenLoss, add_up, trained_positions
from sft.loss.vocab_parallel import choose_chunk_size, vocab_parallel_scores

_STATE = "_fused_head"  # attribute of the model


@dataclass(frozen=True, slots=True)
class _Installed:
    """What a model with a fused head remembers."""

    head: OutputHead
    chunk_size: int | None
    original: Any  # a forward that was set on the instance before; None is the class's


def install(
    model: Any, chunk_size: int | None = None, head: OutputHead | None = None, outermost: Any = None
) -> str | None:
    """Makes `model(..., labels=, objective=)` return the tensors of `TokenLoss` as a dict, without holding all logits.

    Calls without `objective` behave as before.

    Args:
        model: the causal LM itself, inside an adapter's wrapper, with its adapter attached.
        chunk_size: as in `LossSettings`.
        head: where it is known; else `find_output_head` finds it.
        outermost: as for `find_output_head`.

    Returns:
        None, or why nothing was installed: the model's logits could not be computed apart from its decoder.
    """
    found = head or find_output_head(model, outermost)
    if isinstance(found, str):
        return found
    before: _Installed | None = model.__dict__.get(_STATE)
    original = before.original if before else model.__dict__.get("forward")
    setattr(model, _STATE, _Installed(found, chunk_size, original))
    # A bound method follows a deep copy of the model; the signature is the original's, for code that inspects it.
    model.forward = types.MethodType(functools.wraps(type(model).forward)(_forward), model)
    return None


def _forward(
    model: Any,
    *args: Any,
    objective: Objective | None = None,
    trained_positions: torch.Tensor | None = None,
    gradient_scale: torch.Tensor | None = None,
    **kwargs: Any,
) -> Any:
    state: _Installed = getattr(model, _STATE)
    if objective is None:
        return state.original(*args, **kwargs) if state.original else type(model).forward(model, *args, **kwargs)
    labels = kwargs.pop("labels")
    inputs = {name: value for name, value in kwargs.items() if value is not None}
    if objective.router_aux:
        inputs["output_router_logits"] = True
    outputs = model.get_submodule(state.head.decoder)(*args, **inputs)
    settings = LossSettings(objective, state.chunk_size)
    result = head_loss(model, state.head, outputs[0], labels, settings, trained_positions, gradient_scale)
    if objective.router_aux:
        top_k = model.config.get_text_config().num_experts_per_tok
        mask = inputs.get("attention_mask")
        padding = mask if mask is not None and mask.ndim == 2 else None  # a flattened batch has none
        balance = load_balancing_loss(outputs.router_logits, top_k, padding) * result.tokens
        total = result.objective + objective.router_aux * balance
        result = replace(result, objective=total, router_aux=balance.detach().double())
    return result.as_dict()


@torch.compiler.disable
def head_loss(
    model: nn.Module,
    head: OutputHead,
    hidden: torch.Tensor,
    labels: torch.Tensor,
    settings: LossSettings,
    positions: torch.Tensor | None = None,
    gradient_scale: torch.Tensor | None = None,
) -> TokenLoss:
    """Computes what `token_loss` does, from the decoder's output in place of the logits.

    Args:
        hidden: (B, T, D).
        labels, positions: as for `token_loss`; where positions are known a GPU need not wait for them.
        gradient_scale: the scalar, on the device, by which the objective will be multiplied before its backward.
            Gradients in half precision made with it are rounded once, as autograd's are, and not a second time:
            without it those of the hidden states are 16 % further from float64's. The objective is the same.
    """
    positions = trained_positions(labels) if positions is None else positions
    targets = labels.flatten()[positions]  # (N,)
    hidden = to_full(hidden).flatten(0, 1)[positions - 1]  # (N, D)
    wants_gradient = torch.is_grad_enabled()
    module = model.get_submodule(head.linear)
    with torch.no_grad(), gathered(module):
        shard = vocabulary_shard(module)
        score: Any = score_in_blocks if shard is None else functools.partial(vocab_parallel_scores, shard=shard)
        if shard and not settings.chunk_size:
            settings = replace(settings, chunk_size=choose_chunk_size(shard, hidden.device))
        weights = _linear_weights(model, head, hidden)
        leaves = head.parameters(model, hidden) if weights is None and wants_gradient else weights or []
        tensors = [hidden, *leaves]
        dtypes = [gradient_dtype(t) if wants_gradient and t.requires_grad else None for t in tensors]
        if weights is None:
            scores, gradients = module_chunks(model, head, tensors, targets, settings, dtypes, gradient_scale, score)
        else:
            dtype = autocast_dtype(hidden.device.type) or hidden.dtype
            transform = head.transform or LogitTransform()
            with torch.autocast(hidden.device.type, enabled=False):
                cast = [to_local(t).to(dtype) for t in tensors]
                scores, gradients = linear_chunks(cast, transform, targets, settings, dtypes, gradient_scale, score)
            if shard and gradients[0] is not None:  # each rank has the part that comes through its slice
                dist.all_reduce(gradients[0], group=shard.group)
        result = add_up(scores, positions)
    if not any(dtypes):
        return result
    return replace(result, objective=PrecomputedGradients.apply(result.objective, gradients, gradient_scale, *tensors))


def _linear_weights(model: nn.Module, head: OutputHead, hidden: torch.Tensor) -> list[torch.Tensor] | None:
    """Returns weight and bias of a head that is a matrix multiplication in the dtype of `hidden`; None for others."""
    linear = head.plain_linear(model)
    if linear is None or not (autocast_dtype(hidden.device.type) or linear.weight.dtype == hidden.dtype):
        return None
    return [p for p in (linear.weight, linear.bias) if p is not None]


def gradient_dtype(tensor: torch.Tensor) -> torch.dtype:
    """Returns the dtype of `tensor`'s gradient: float32 for a bfloat16 weight that has float32 master values."""
    return (tensor.grad_dtype if tensor.is_leaf else None) or tensor.dtype


class PrecomputedGradients(torch.autograd.Function):
    """A sum whose gradients were computed in the forward pass: backward multiplies them by the incoming gradient."""

    @staticmethod
    def forward(
        ctx: Any,
        total: torch.Tensor,
        gradients: Sequence[torch.Tensor | None],
        scale: torch.Tensor | None,
        *tensors: torch.Tensor,
    ) -> torch.Tensor:
        """Returns `total`, and keeps the gradients for the backward pass.

        Args:
            total: a scalar, the sum over the tokens.
            gradients: of `total` with respect to `tensors`, already multiplied by `scale`; None where a tensor needs
                none. Of a DTensor it is this rank's part.
            scale: a scalar; None is 1.
        """
        ctx.scale = scale
        ctx.gradients = gradients
        ctx.dtypes = [gradient_dtype(tensor) for tensor in tensors]
        ctx.spread = [sharding_like(tensor) for tensor in tensors]
        return total.clone()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, factor: torch.Tensor) -> Any:  # type: ignore[override]
        """Scales the gradients in place, so only once: a copy of the head's gradient would be as large as the head."""
        if ctx.gradients is None:
            raise RuntimeError("the head's gradients were used up by an earlier backward through the same graph")
        factor = factor if ctx.scale is None else factor / ctx.scale
        found = zip(ctx.gradients, ctx.dtypes, ctx.spread, strict=True)
        scaled = [None if g is None else spread(g.mul_(factor).to(dtype)) for g, dtype, spread in found]
        ctx.gradients = None
        return None, None, None, *scaled
