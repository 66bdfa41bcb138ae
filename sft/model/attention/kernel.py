"""Causal attention inside each document of a row, from batched matrix products, as one operator of torch.

A block of queries of one document is multiplied with the keys it may see, and with no others. The scores of one block
are all that exists at a time; the backward pass computes them again (as in Dao et al., FlashAttention, 2022, but a
block holds whole rows, so that the softmax is an ordinary one). On AVX512_BF16 this took 0.4 to 0.6 of the time of
torch's CPU kernel called once a document in bf16, whose backward pass does not multiply in bf16, and 0.8 to 1.1 in
float32. Query heads that share a key head are rows of the same product, so no key is repeated.

One operator and not a graph of small ones: autograd would write a full gradient for each slice, checkpointing by policy
would see and keep every score, and a compiler would unroll the documents of each batch anew.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from sft.model.attention.kernel_blocks import QUERIES, Span, cut, keeps_code_by_shape


def attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    offsets: Tensor,
    scale: float,
    window: int | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    dropout: float = 0.0,
) -> Tensor:
    """softmax(cap(scale · q·k)) · v for each query over its own document up to itself: (N, H, Dv), contiguous.

    Args:
        query: (H, N, D).
        key: (Hk, N, D), H a multiple of Hk; H / Hk query heads in a row share a key head.
        value: (Hk, N, Dv).
        offsets: (documents + 1,) where each document starts, and N at the end; in the host's memory.
        window: the keys that a query sees, its own included; None is all up to it.
        softcap: scores become softcap · tanh(score / softcap) (Gemma 2).
        sinks: (H,) scores that stand in each softmax without a value (GPT-OSS).
        dropout: the probability of dropping a weight, drawn from torch's default generator.
    """
    kind = query.device.type
    if torch.is_autocast_enabled(kind):
        dtype = torch.get_autocast_dtype(kind)
        query, key, value = query.to(dtype), key.to(dtype), value.to(dtype)
    seed = torch.randint(2**62, (1,)) if dropout else None
    with torch.autocast(kind, enabled=False):
        out: Tensor = _attend(query, key, value, offsets, sinks, seed, scale, window, softcap, dropout)
    return out


@torch.library.custom_op("sft::document_attention", mutates_args=())
def _attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    offsets: Tensor,
    sinks: Tensor | None,
    seed: Tensor | None,
    scale: float,
    window: int | None,
    softcap: float | None,
    dropout: float,
) -> Tensor:
    heads, tokens, _ = query.shape
    if tokens != int(offsets[-1]):
        raise ValueError(f"the boundaries are of a row of {int(offsets[-1])} tokens, the row has {tokens}")
    out = query.new_empty(tokens, heads, value.shape[-1])
    softmax = _Softmax(query, key, sinks, seed, scale, window, softcap, dropout)
    for spans in cut(offsets.tolist(), window, keeps_code_by_shape(query)):
        for span in spans:
            block = softmax.of(span)
            result = torch.bmm(block.kept, span.keys_of(value))  # (Hk, G·C, Dv)
            out[span.own].transpose(0, 1).copy_(result.view(heads, span.queries, -1)[:, : span.real])
    return out


@torch.library.custom_op("sft::document_attention_backward", mutates_args=())
def _differentiate(
    grad: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    offsets: Tensor,
    sinks: Tensor | None,
    seed: Tensor | None,
    scale: float,
    window: int | None,
    softcap: float | None,
    dropout: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The gradients of `query`, `key`, `value` and `sinks` from that of the output: (N, H, Dv)."""
    heads, width = query.shape[0], query.shape[-1]
    key_heads = key.shape[0]
    grads = [_token_major(tensor) for tensor in (query, key, value)]
    grad_sinks = torch.zeros(heads, dtype=torch.float32, device=query.device)
    softmax = _Softmax(query, key, sinks, seed, scale, window, softcap, dropout)
    for spans in cut(offsets.tolist(), window, keeps_code_by_shape(query)):
        begin, stop, end = spans[0].start, spans[-1].stop, spans[-1].end
        sums = _Sums(key_heads, stop - begin, (width, value.shape[-1]), query) if len(spans) > 1 else None
        for span in spans:
            block = softmax.of(span)
            above = span.queries_of(grad.transpose(0, 1)).reshape(key_heads, -1, grad.shape[-1])  # (Hk, G·C, Dv)
            of_weights = torch.bmm(above, span.keys_of(value).transpose(1, 2))
            of_scores, of_sinks = block.differentiate(of_weights)
            of_query = torch.bmm(of_scores, block.keys).mul_(scale)
            grads[0][:, span.own].copy_(of_query.view(heads, span.queries, width)[:, : span.real])
            if of_sinks is not None:
                grad_sinks += of_sinks.view(heads, -1).sum(-1)
            pair = torch.bmm(of_scores.transpose(1, 2), block.rows), torch.bmm(block.kept.transpose(1, 2), above)
            if sums:
                sums.add(pair, slice(span.start - begin, span.stop - begin))
        for target, total in zip(grads[1:], sums.totals if sums else pair, strict=True):
            target[:, begin:end].copy_(total[:, : end - begin])
    return grads[0], grads[1], grads[2], grad_sinks


@_attend.register_fake
def _(query: Tensor, _key: Tensor, value: Tensor, *_: Any) -> Tensor:
    return query.new_empty(query.shape[1], query.shape[0], value.shape[-1])


@_differentiate.register_fake
def _(_grad: Tensor, query: Tensor, key: Tensor, value: Tensor, *_: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    of_sinks = torch.empty(query.shape[0], dtype=torch.float32, device=query.device)
    return _token_major(query), _token_major(key), _token_major(value), of_sinks


def _keep(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:  # noqa: ARG001 (torch passes it by name)
    ctx.save_for_backward(*inputs[:6])
    ctx.settings = inputs[6:]


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    saved = ctx.saved_tensors  # read once: a checkpointed layer makes them anew for each reading, and refuses a second
    sinks = saved[4]
    of_query, of_key, of_value, of_sinks = _differentiate(grad, *saved, *ctx.settings)
    return of_query, of_key, of_value, None, None if sinks is None else of_sinks.to(sinks.dtype), *[None] * 5


_attend.register_autograd(_backward, setup_context=_keep)


def _token_major(tensor: Tensor) -> Tensor:
    """An empty (H, N, D) with a token's heads side by side in memory, as projections write and read them."""
    heads, tokens, width = tensor.shape
    return tensor.new_empty(tokens, heads, width).transpose(0, 1)


class _Softmax:
    """Makes the weights of one block after another; forward and backward draw the same ones in the same order."""

    def __init__(
        self,
        query: Tensor,
        key: Tensor,
        sinks: Tensor | None,
        seed: Tensor | None,
        scale: float,
        window: int | None,
        softcap: float | None,
        dropout: float,
    ) -> None:
        self.query, self.key, self.scale, self.window, self.softcap = query, key, scale, window, softcap
        self.sinks = None if sinks is None else sinks.to(query.dtype)
        self.dropout = dropout
        self.generator = torch.Generator(query.device).manual_seed(int(seed)) if seed is not None else None
        self.future = query.new_full((QUERIES, QUERIES), -torch.inf).triu_(1)

    def of(self, span: Span) -> _Block:
        """The weights of the span's queries over its keys."""
        key_heads, size, keys = self.key.shape[0], span.queries, span.stop - span.start
        rows = (span.queries_of(self.query) * self.scale).reshape(key_heads, -1, self.query.shape[-1])  # (Hk, G·C, D)
        taken = span.keys_of(self.key)
        scores = torch.bmm(rows, taken.transpose(1, 2))  # (Hk, G·C, keys)
        slope = None
        if self.softcap is not None:
            squashed = scores.div_(self.softcap).tanh_()
            slope = 1 - squashed * squashed
            scores = squashed * self.softcap
        by_head = scores.view(-1, size, keys)  # (H, C, keys)
        by_head[..., keys - size :].add_(self.future[:size, :size])
        if self.window is not None and keys > self.window:
            back = torch.arange(keys - size, keys, device=scores.device)[:, None]
            by_head.masked_fill_(back - torch.arange(keys, device=scores.device) >= self.window, -torch.inf)
        if self.sinks is None:
            weights, sunk = torch.softmax(scores, -1), None
        else:
            column = self.sinks[:, None, None].expand(-1, size, 1)
            weights = torch.softmax(torch.cat([by_head, column], -1), -1).view(key_heads, -1, keys + 1)
            weights, sunk = weights[..., :-1].contiguous(), weights[..., -1].float()
        if self.generator is None:
            return _Block(rows, taken, weights, weights, slope, sunk, None)
        factor = torch.empty_like(weights).bernoulli_(1 - self.dropout, generator=self.generator)
        factor /= 1 - self.dropout
        return _Block(rows, taken, weights, weights * factor, slope, sunk, factor)


@dataclass
class _Block:
    """One block's weights, and what their gradient needs.

    Attributes:
        rows: (Hk, G·C, D) the queries, times the scale.
        keys: (Hk, keys, D).
        weights: (Hk, G·C, keys) of the softmax.
        kept: the same after dropout.
        slope: of the soft cap at each score.
        sunk: (Hk, G·C) the weight of the sink.
        factor: of dropout: 0 or 1 / (1 - p).
    """

    rows: Tensor
    keys: Tensor
    weights: Tensor
    kept: Tensor
    slope: Tensor | None
    sunk: Tensor | None
    factor: Tensor | None

    def differentiate(self, of_weights: Tensor) -> tuple[Tensor, Tensor | None]:
        """The gradients of the scores and of the sinks' scores: weight · (gradient - mean of gradients by weight)."""
        if self.factor is not None:
            of_weights = of_weights * self.factor
        of_sinks = None
        if self.sunk is not None:  # a sink has no value: its own gradient is 0, and the weights sum to 1 - sunk
            of_sinks = -self.sunk * (of_weights * self.weights).sum(-1, dtype=torch.float32)
        of_scores = torch.ops.aten._softmax_backward_data(of_weights, self.weights, -1, self.weights.dtype)
        return (of_scores if self.slope is None else of_scores.mul_(self.slope)), of_sinks


class _Sums:
    """Gradients of a document's keys and values over its blocks, in float32: a key is seen by many of them."""

    def __init__(self, heads: int, tokens: int, widths: tuple[int, int], like: Tensor) -> None:
        dtype = torch.promote_types(like.dtype, torch.float32)
        self.totals = [torch.zeros(heads, tokens, width, dtype=dtype, device=like.device) for width in widths]

    def add(self, parts: tuple[Tensor, Tensor], where: slice) -> None:
        for total, part in zip(self.totals, parts, strict=True):
            total[:, where] += part
