"""Computes causal attention inside each document of a row by batched matrix multiplications, as one operator of torch.

A block of queries of one document is multiplied with the keys that it may see, and with no others. The scores of one
block are all that exists at a time; the backward pass recomputes them (as in Dao et al., FlashAttention, 2022, but a
block has all of its keys, and the softmax is an ordinary one). On AVX512_BF16 this took 0.4 to 0.6 of the time of
torch's CPU kernel called once per document in bf16, whose backward pass does not multiply in bf16, and 0.8 to 1.1 in
float32. Query heads that share a key head are rows of the same multiplication, so no key is repeated.

It is one operator and not a graph of small ones: autograd would write a full gradient for each slice, selective
checkpointing would see and keep every score, and a compiler would unroll the documents of each batch anew.
"""

from __future__ import annotations

from dataclasses import InitVar, dataclass
from typing import Any

import torch
from torch import Tensor

from sft.distributed.device import autocast_dtype
from sft.model.attention.kernel_blocks import QUERIES, Span, caches_kernels_by_shape, cut_blocks


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
    """Computes softmax(cap(scale · q·k)) · v for each query over its own document up to itself.

    Args:
        query: (H, N, D).
        key: (Hk, N, D), H a multiple of Hk; H / Hk consecutive query heads share a key head.
        value: (Hk, N, Dv).
        offsets: (documents + 1,) where each document starts, and N at the end; in main memory.
        window: the keys that a query sees, its own included; None is all up to it.
        softcap: scores become softcap · tanh(score / softcap) (Gemma 2).
        sinks: (H,) scores that take part in each softmax without a value (GPT-OSS).
        dropout: the probability of dropping a weight, drawn from torch's default generator.

    Returns:
        (N, H, Dv), contiguous.
    """
    device_type = query.device.type
    dtype = autocast_dtype(device_type)
    if dtype is not None:
        query, key, value = query.to(dtype), key.to(dtype), value.to(dtype)
    seed = torch.randint(2**62, (1,)) if dropout else None
    with torch.autocast(device_type, enabled=False):
        out: Tensor = forward_operator(query, key, value, offsets, sinks, seed, scale, window, softcap, dropout)
    return out


@torch.library.custom_op("sft::document_attention", mutates_args=())
def forward_operator(
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
    """Computes `attend` without autocast, its dropout drawn from `seed`."""
    heads, tokens, _ = query.shape
    if tokens != int(offsets[-1]):
        raise ValueError(f"the document offsets are of a row of {int(offsets[-1])} tokens, the row has {tokens}")
    out = query.new_empty(tokens, heads, value.shape[-1])
    softmax = _Softmax(query, key, sinks, seed, scale, window, softcap, dropout)
    for spans in cut_blocks(offsets.tolist(), window, caches_kernels_by_shape(query)):
        for span in spans:
            block = softmax.compute(span)
            result = torch.bmm(block.kept, span.keys_of(value))  # (Hk, G·C, Dv)
            out[span.tokens].transpose(0, 1).copy_(result.view(heads, span.query_count, -1)[:, : span.token_count])
    return out


@torch.library.custom_op("sft::document_attention_backward", mutates_args=())
def _backward_operator(
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
    """Computes the gradients of `query`, `key`, `value` and `sinks` from that of the output: (N, H, Dv)."""
    heads, key_heads, width, value_width = len(query), len(key), query.shape[-1], value.shape[-1]
    grads = [_empty_token_major(tensor) for tensor in (query, key, value)]
    grad_sinks = torch.zeros(heads, dtype=torch.float32, device=query.device)
    softmax = _Softmax(query, key, sinks, seed, scale, window, softcap, dropout)
    for spans in cut_blocks(offsets.tolist(), window, caches_kernels_by_shape(query)):
        begin, stop, end = spans[0].start, spans[-1].stop, spans[-1].end
        sums: tuple[Tensor, ...] = ()
        if len(spans) > 1:  # of keys and values, in float32: many blocks see each key
            dtype = torch.promote_types(query.dtype, torch.float32)
            sums = tuple(query.new_zeros(key_heads, stop - begin, size, dtype=dtype) for size in (width, value_width))
        for span in spans:
            block = softmax.compute(span)
            grad_out = span.queries_of(grad.transpose(0, 1)).reshape(key_heads, -1, value_width)  # (Hk, G·C, Dv)
            grad_weights = torch.bmm(grad_out, span.keys_of(value).transpose(1, 2))
            grad_scores, grad_sink_scores = block.differentiate(grad_weights)
            grad_queries = torch.bmm(grad_scores, block.keys).mul_(scale)
            grads[0][:, span.tokens].copy_(grad_queries.view(heads, span.query_count, width)[:, : span.token_count])
            if grad_sink_scores is not None:
                grad_sinks += grad_sink_scores.view(heads, -1).sum(-1)
            grad_keys = torch.bmm(grad_scores.transpose(1, 2), block.queries)
            pair = grad_keys, torch.bmm(block.kept.transpose(1, 2), grad_out)
            for total, part in zip(sums, pair, strict=False):  # no sums: the only block is the sum
                total[:, span.start - begin : span.stop - begin] += part
        for target, total in zip(grads[1:], sums or pair, strict=True):
            target[:, begin:end].copy_(total[:, : end - begin])
    return grads[0], grads[1], grads[2], grad_sinks


@forward_operator.register_fake
def _(query: Tensor, _key: Tensor, value: Tensor, *_: Any) -> Tensor:
    return query.new_empty(query.shape[1], query.shape[0], value.shape[-1])


@_backward_operator.register_fake
def _(_grad: Tensor, query: Tensor, key: Tensor, value: Tensor, *_: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    grad_sinks = torch.empty(query.shape[0], dtype=torch.float32, device=query.device)
    return _empty_token_major(query), _empty_token_major(key), _empty_token_major(value), grad_sinks


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:  # noqa: ARG001 (torch passes it by name)
    ctx.save_for_backward(*inputs[:6])
    ctx.settings = inputs[6:]


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    saved = ctx.saved_tensors  # read once: a checkpointed layer recomputes them for each reading, and refuses a second
    sinks = saved[4]
    grad_query, grad_key, grad_value, grad_sinks = _backward_operator(grad, *saved, *ctx.settings)
    grad_sinks = None if sinks is None else grad_sinks.to(sinks.dtype)
    return grad_query, grad_key, grad_value, None, grad_sinks, *[None] * 5


forward_operator.register_autograd(_backward, setup_context=_save)


def _empty_token_major(tensor: Tensor) -> Tensor:
    """Returns an empty (H, N, D) with a token's heads adjacent in memory, as projections write and read them."""
    heads, tokens, width = tensor.shape
    return tensor.new_empty(tokens, heads, width).transpose(0, 1)


@dataclass
class _Softmax:
    """Computes the weights of one block after another; forward and backward draw the same dropout in the same order."""

    query: Tensor
    key: Tensor
    sinks: Tensor | None
    seed: InitVar[Tensor | None]
    scale: float
    window: int | None
    softcap: float | None
    dropout: float

    def __post_init__(self, seed: Tensor | None) -> None:
        self.sinks = None if self.sinks is None else self.sinks.to(self.query.dtype)
        self.generator = None if seed is None else torch.Generator(self.query.device).manual_seed(int(seed))
        self.future = self.query.new_full((QUERIES, QUERIES), -torch.inf).triu_(1)

    def compute(self, span: Span) -> _Block:
        """Computes the weights of the span's queries over its keys."""
        key_heads, size, count = self.key.shape[0], span.query_count, span.stop - span.start
        scaled = span.queries_of(self.query) * self.scale
        queries = scaled.reshape(key_heads, -1, scaled.shape[-1])  # (Hk, G·C, D)
        keys = span.keys_of(self.key)
        scores = torch.bmm(queries, keys.transpose(1, 2))  # (Hk, G·C, keys)
        slope = None
        if self.softcap is not None:
            capped = scores.div_(self.softcap).tanh_()
            slope = 1 - capped * capped
            scores = capped * self.softcap
        by_head = scores.view(-1, size, count)  # (H, C, keys)
        by_head[..., count - size :].add_(self.future[:size, :size])
        if self.window is not None and count > self.window:
            position = torch.arange(count - size, count, device=scores.device)[:, None]
            by_head.masked_fill_(position - torch.arange(count, device=scores.device) >= self.window, -torch.inf)
        if self.sinks is None:
            weights, sink_weights = torch.softmax(scores, -1), None
        else:
            column = self.sinks[:, None, None].expand(-1, size, 1)
            weights = torch.softmax(torch.cat([by_head, column], -1), -1).view(key_heads, -1, count + 1)
            weights, sink_weights = weights[..., :-1].contiguous(), weights[..., -1].float()
        if self.generator is None:
            return _Block(queries, keys, weights, weights, slope, sink_weights, None)
        factor = torch.empty_like(weights).bernoulli_(1 - self.dropout, generator=self.generator)
        factor /= 1 - self.dropout
        return _Block(queries, keys, weights, weights * factor, slope, sink_weights, factor)


@dataclass
class _Block:
    """One block's weights, and what their gradient needs.

    Attributes:
        queries: (Hk, G·C, D), times the scale.
        keys: (Hk, keys, D).
        weights: (Hk, G·C, keys) of the softmax.
        kept: the weights after dropout.
        slope: of the soft cap at each score.
        sink_weights: (Hk, G·C) of the sink.
        factor: of dropout: 0 or 1 / (1 - p).
    """

    queries: Tensor
    keys: Tensor
    weights: Tensor
    kept: Tensor
    slope: Tensor | None
    sink_weights: Tensor | None
    factor: Tensor | None

    def differentiate(self, grad: Tensor) -> tuple[Tensor, Tensor | None]:
        """Returns the gradients of the scores and of the sinks' scores from that of `kept`.

        weight · (gradient - mean of gradients by weight)
        """
        if self.factor is not None:
            grad = grad * self.factor
        grad_sinks = None
        if self.sink_weights is not None:  # a sink has no value: its own gradient is 0, and the weights sum to 1 - sink
            grad_sinks = -self.sink_weights * (grad * self.weights).sum(-1, dtype=torch.float32)
        grad_scores = torch.ops.aten._softmax_backward_data(grad, self.weights, -1, self.weights.dtype)
        return (grad_scores if self.slope is None else grad_scores.mul_(self.slope)), grad_sinks
