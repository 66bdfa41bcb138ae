"""Head and loss in chunks of trained tokens: logits and gradients of a chunk live in the cache, never of a batch.

Of N tokens over a vocabulary of V, logits in bf16, their float32 copy, its softmax and two gradients take 16·N·V
bytes: 10 GB for 4,096 tokens of a 150k vocabulary. Here a chunk's gradients are made while its logits are there, in
the forward, so that nothing is computed twice and the backward only scales (as in Liger Kernel, Hsu et al., 2024,
arXiv:2410.10989, section 3.2).
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

from sft.distributed.dtensor import gathered, sharding_like, to_full, to_local, vocabulary_shard
from sft.loss.chunked import linear_chunks, module_chunks, score_rows
from sft.loss.load_balancing import load_balancing_loss
from sft.loss.output_head import OutputHead, find_output_head
from sft.loss.token_loss import Objective, TokenLoss, add_up, trained_positions
from sft.loss.vocab_parallel import choose_chunk_size, vocab_parallel_scores

_STATE = "_fused_head"


@dataclass(frozen=True, slots=True)
class _Installed:
    """What a model with a fused head remembers.

    Attributes:
        chunk_size: tokens whose logits are held at a time; None is chosen for the machine.
        original: a forward that was set on the instance before; None is the class's.
    """

    head: OutputHead
    chunk_size: int | None
    original: Any


def install(
    model: Any, chunk_size: int | None = None, head: OutputHead | None = None, outermost: Any = None
) -> str | None:
    """Makes `model(..., labels=, objective=)` return a dict of `TokenLoss`'s tensors, without ever holding all logits.

    Called without `objective` it stays what it was.

    Args:
        model: the causal LM itself, beneath an adapter's wrapper, with its adapter in place.
        chunk_size: tokens whose logits are held at a time; None is chosen for the machine.
        head: where it is known; else it is found by running the model on a few tokens.
        outermost: the module that training calls, around `model`, where that is another.

    Returns:
        None, or the reason why nothing was installed: the model's logits could not be made apart from its decoder.
    """
    found = head or find_output_head(model, outermost)
    if isinstance(found, str):
        return found
    before: _Installed | None = model.__dict__.get(_STATE)
    original = before.original if before else model.__dict__.get("forward")
    setattr(model, _STATE, _Installed(found, chunk_size, original))
    # A bound method follows a deep copy of the model; the signature is the original's, for those who look at it.
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
    result = head_loss(
        model, state.head, outputs[0], labels, objective, trained_positions, state.chunk_size, gradient_scale
    )
    if objective.router_aux:
        top_k = model.config.get_text_config().num_experts_per_tok
        mask = inputs.get("attention_mask")
        padding = mask if mask is not None and mask.ndim == 2 else None  # a flattened row has none
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
    objective: Objective,
    positions: torch.Tensor | None = None,
    chunk_size: int | None = None,
    gradient_scale: torch.Tensor | None = None,
) -> TokenLoss:
    """`losses.token_loss` from the decoder's output.

    Args:
        hidden: (B, T, D).
        labels: (B, T), aligned with the input: -100 where a token is not trained. Column 0 is never trained.
        positions: (N,) `trained_positions(labels)` where they are known, which spares a GPU a wait.
        chunk_size: tokens whose logits are held at a time.
        gradient_scale: the scalar, on the device, by which the objective will be multiplied before its backward.
            Gradients in half precision made with it are rounded once, as autograd's are, and not once more by it:
            without it those of the hidden states are 16 % further from float64's. The objective is the same.
    """
    positions = trained_positions(labels) if positions is None else positions
    targets = labels.flatten()[positions]  # (N,)
    hidden = to_full(hidden).flatten(0, 1)[positions - 1]  # (N, D)
    wants_gradient = torch.is_grad_enabled()
    module = model.get_submodule(head.linear)
    with torch.no_grad(), gathered(module):
        shard = vocabulary_shard(module)
        score: Any = score_rows if shard is None else functools.partial(vocab_parallel_scores, shard=shard)
        size = chunk_size or (choose_chunk_size(shard, hidden.device) if shard else None)
        linear = head.plain_linear(model)
        dtype = _autocast_dtype(hidden) or hidden.dtype
        if linear is not None and head.transform is not None and _multiplies(linear, hidden):
            tensors = [hidden, *(p for p in (linear.weight, linear.bias) if p is not None)]
            dtypes = [gradient_dtype(t) if wants_gradient and t.requires_grad else None for t in tensors]
            with torch.autocast(hidden.device.type, enabled=False):
                cast = [to_local(t).to(dtype) for t in tensors]
                scores, gradients = linear_chunks(
                    cast, head.transform, targets, objective, dtypes, size, gradient_scale, score
                )
            if shard and gradients[0] is not None:  # each rank has what comes through its slice
                dist.all_reduce(gradients[0], group=shard.group)
        else:
            tensors = [hidden, *(head.parameters(model, hidden) if wants_gradient else [])]
            dtypes = [gradient_dtype(t) if wants_gradient and t.requires_grad else None for t in tensors]
            scores, gradients = module_chunks(
                model, head, tensors, targets, objective, dtypes, size, gradient_scale, score
            )
        result = add_up(scores, positions)
    if not any(dtypes):
        return result
    return replace(result, objective=PrecomputedGradients.apply(result.objective, gradients, gradient_scale, *tensors))


def _autocast_dtype(tensor: torch.Tensor) -> torch.dtype | None:
    kind = tensor.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None


def _multiplies(linear: nn.Linear, hidden: torch.Tensor) -> bool:
    return _autocast_dtype(hidden) is not None or linear.weight.dtype == hidden.dtype


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
        ctx.spread = [sharding_like(tensor) for tensor in tensors]
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
