"""The summed loss in chunks of tokens, with its gradients made while a chunk's logits are there."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from sft.losses import Objective, TokenScores
from sft.output_head import LogitTransform, OutputHead

Gradients = list[torch.Tensor | None]

_CPU_LOGITS = 2**25  # of a chunk: 128 MB in float32. Less slows the products of 150k vocabularies, more gains nothing
_CUDA_LOGITS = 2**28  # 1 GiB in float32, unless less is free
# Rows of a float32 gradient that a half-precision product is added to at a time: on a CPU few, so that the product is
# still in the cache, which makes it as fast as adding up in bfloat16; on a GPU many, to fill it.
_CPU_SLICE, _CUDA_SLICE = 1024, 32768


def tokens_of_a_chunk(device: torch.device, vocab_size: int, tokens: int) -> int:
    """How many of `tokens` to take at a time, in chunks of equal size; at least 1."""
    room = _CPU_LOGITS
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        cached = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        room = min(_CUDA_LOGITS, (free + cached) // 64)  # a chunk takes up to 16 bytes a logit: a quarter of the rest
    most = max(room // vocab_size, 1)
    chunks = -(-tokens // most)
    return max(-(-tokens // max(chunks, 1)), 1)


def score_in_place(
    logits: torch.Tensor,
    raw: torch.Tensor | None,
    targets: torch.Tensor,
    objective: Objective,
    transform: LogitTransform,
    with_gradient: bool,
    scale: torch.Tensor | None = None,
) -> TokenScores:
    """What `losses.score` gives, and in `logits` the gradient of the summed loss, by few passes over memory.

    With p = softmax(x), w the token's weight, e the smoothing, z the coefficient of the z-loss and L = logsumexp(x):

        d loss / d x_j = p_j · (w + 2 z L)  -  w (1 - e) [j = target]  -  w e / V

    Args:
        logits: (n, V) float32 before `transform`; the gradient is with respect to them.
        raw: a copy of them, overwritten; needed for the gradient through a cap.
        targets: (n,) int64.
        scale: a scalar by which the gradient is multiplied, while it is float32.
    """
    vocab_size = logits.shape[-1]
    column = targets[:, None]
    first, choice = logits.max(-1)  # (n,)
    of_first, of_target = transform(first), transform(logits.gather(1, column).squeeze(1))
    transform(logits)
    mean = logits.mean(-1) if objective.label_smoothing else None
    # In place on a CPU, whose kernel reads a row before it writes it; fresh memory costs four times the softmax there.
    p = torch.softmax(logits, -1, out=logits) if logits.device.type == "cpu" else logits.copy_(logits.softmax(-1))
    # From the largest probability, at least 1/V: precise where the target's own underflows.
    log_first = p.gather(1, choice[:, None]).squeeze(1).log_()
    nll = (of_first - of_target) - log_first
    normalizer = of_first - log_first
    entropy = torch.special.entr(p).sum(-1) if objective.entropy else None
    loss = nll if mean is None else nll.lerp(normalizer - mean, objective.label_smoothing)
    weight = torch.exp(-nll) if objective.loss_type == "dft" else torch.ones_like(nll)
    loss = loss * weight + objective.z_loss * normalizer.square()
    if with_gradient:
        if objective.loss_type == "dft" or objective.z_loss:
            p.mul_((weight + 2 * objective.z_loss * normalizer)[:, None])
        if mean is not None:
            p.sub_((weight * (objective.label_smoothing / vocab_size))[:, None])
        p.scatter_add_(1, column, -weight[:, None] * (1 - objective.label_smoothing))
        if transform.cap is not None and raw is not None:
            p.mul_(transform.factor(raw))
        elif transform.scale != 1.0:
            p.mul_(transform.scale)
        if scale is not None:
            p.mul_(scale)
    return TokenScores(loss, nll, choice == targets, entropy)


def linear_chunks(
    tensors: Sequence[torch.Tensor],
    transform: LogitTransform,
    targets: torch.Tensor,
    objective: Objective,
    needed: Sequence[bool],
    chunk_size: int | None = None,
    scale: torch.Tensor | None = None,
) -> tuple[TokenScores, Gradients]:
    """Scores and gradients for logits = transform(hidden · weightᵀ + bias), in matrix products written out.

    Buffers are made once: fresh memory costs a CPU 1 ns a logit, as much as all that is done with it.

    Args:
        tensors: hidden (N, D), weight (V, D) and perhaps bias (V,), all of one dtype.
        needed: which of them get a gradient. Those of weight and bias are float32, for they add up over chunks.
        scale: of all gradients, a scalar; None is 1.
    """
    hidden, weight, *bias = tensors
    gradients = _zeros(tensors, needed)
    of_hidden, of_weight, *of_bias = gradients
    size = chunk_size or tokens_of_a_chunk(hidden.device, len(weight), len(hidden))
    projected = hidden.new_empty(min(size, len(hidden)), len(weight))
    logits = projected if projected.dtype == torch.float32 else torch.empty_like(projected, dtype=torch.float32)
    capped = torch.empty_like(logits) if transform.cap is not None and any(needed) else None
    parts = []
    for start in range(0, len(hidden), size):
        h = hidden[start : start + size]  # (n, D)
        z = projected[: len(h)]  # (n, V)
        torch.mm(h, weight.t(), out=z)
        if bias:
            z += bias[0]
        x = z if logits is projected else logits[: len(h)].copy_(z)
        raw = capped[: len(h)].copy_(z) if capped is not None else None
        parts.append(score_in_place(x, raw, targets[start : start + size], objective, transform, any(needed), scale))
        if not any(needed):
            continue
        d = x if x is z else z.copy_(x)
        if of_hidden is not None:
            torch.mm(d, weight, out=of_hidden[start : start + size])
        if of_weight is not None:
            _add_product(of_weight, d, h)
        if bias and of_bias[0] is not None:
            of_bias[0] += d.sum(0, dtype=torch.float32)
    return _join(parts, hidden, objective), gradients


def module_chunks(
    model: nn.Module,
    head: OutputHead,
    tensors: Sequence[torch.Tensor],
    targets: torch.Tensor,
    objective: Objective,
    needed: Sequence[bool],
    chunk_size: int | None = None,
    scale: torch.Tensor | None = None,
) -> tuple[TokenScores, Gradients]:
    """The same for any head: its own code makes the logits, autograd the gradients behind them.

    Args:
        tensors: hidden (N, D), and the leaves of the head's graph.
        needed: which of them get a gradient. Those of the leaves are float32, for they add up over chunks.
        scale: of all gradients, a scalar; None is 1.
    """
    hidden = tensors[0]
    gradients = _zeros(tensors, needed)
    wanted = [i for i, is_needed in enumerate(needed) if is_needed]
    size = chunk_size or tokens_of_a_chunk(hidden.device, head.vocab_size, len(hidden))
    parts = []
    for start in range(0, len(hidden), size):
        with torch.set_grad_enabled(bool(wanted)):
            h = hidden[start : start + size].detach().requires_grad_(needed[0])
            logits = head.logits(model, h)
        x = torch.empty_like(logits, dtype=torch.float32).copy_(logits)
        parts.append(
            score_in_place(x, None, targets[start : start + size], objective, LogitTransform(), bool(wanted), scale)
        )
        if not wanted:
            continue
        inputs = [tensors[i] if i else h for i in wanted]
        found = torch.autograd.grad(logits, inputs, x.to(logits.dtype), allow_unused=True)
        for i, gradient in zip(wanted, found, strict=True):
            total = gradients[i]
            if gradient is not None and total is not None:
                (total if i else total[start : start + size]).add_(gradient)
    return _join(parts, hidden, objective), gradients


def _zeros(tensors: Sequence[torch.Tensor], needed: Sequence[bool]) -> Gradients:
    """Of the hidden states in their own dtype: no row of theirs is added to twice."""
    dtypes = [tensors[0].dtype, *(torch.float32 for _ in tensors[1:])]
    return [torch.zeros_like(t, dtype=d) if n else None for t, d, n in zip(tensors, dtypes, needed, strict=True)]


def _add_product(total: torch.Tensor, d: torch.Tensor, h: torch.Tensor) -> None:
    """total += dᵀ h: (V, D) float32 from (n, V) and (n, D)."""
    if d.dtype == total.dtype:
        total.addmm_(d.t(), h)
        return
    size = _CPU_SLICE if total.device.type == "cpu" else _CUDA_SLICE
    product = h.new_empty(min(size, len(total)), h.shape[1])
    for start in range(0, len(total), size):
        part = total[start : start + size]
        part += torch.mm(d[:, start : start + size].t(), h, out=product[: len(part)])


def _join(parts: list[TokenScores], hidden: torch.Tensor, objective: Objective) -> TokenScores:
    """The scores of all chunks, in order."""
    empty = hidden.new_zeros(0, dtype=torch.float32)
    parts = parts or [TokenScores(empty, empty, empty.bool(), empty if objective.entropy else None)]
    entropies = [part.entropy for part in parts if part.entropy is not None]
    return TokenScores(
        loss=torch.cat([part.loss for part in parts]),
        nll=torch.cat([part.nll for part in parts]),
        correct=torch.cat([part.correct for part in parts]),
        entropy=torch.cat(entropies) if entropies else None,
    )


class KnownGradients(torch.autograd.Function):
    """A sum whose gradients are known already: the backward multiplies them by what arrives."""

    @staticmethod
    def forward(
        ctx: Any, total: torch.Tensor, gradients: Gradients, scale: torch.Tensor | None, *tensors: torch.Tensor
    ) -> torch.Tensor:
        """`total`, a scalar, with `gradients` for `tensors`, made with `scale`; None where one has none."""
        ctx.scale = scale
        ctx.gradients = gradients
        ctx.dtypes = [tensor.dtype for tensor in tensors]
        return total.clone()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, factor: torch.Tensor) -> Any:  # type: ignore[override]
        """In place, once: a copy of the head's gradient would be as large as the head."""
        if ctx.gradients is None:
            raise RuntimeError("the head's gradients were used up by an earlier backward through the same graph")
        factor = factor if ctx.scale is None else factor / ctx.scale
        scaled = [None if g is None else g.mul_(factor).to(d) for g, d in zip(ctx.gradients, ctx.dtypes, strict=True)]
        ctx.gradients = None
        return None, None, None, *scaled
