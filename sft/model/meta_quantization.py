"""Replaces layers of a meta model by ones that take the memory of quantized layers and compute nothing.

bitsandbytes' own kernels need real weights. Their memory is simple to model: packed weights with their scales, and in
the forward and the backward pass the dequantized weight for as long as one matrix multiplication takes.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

_BLOCK_4BIT = 64  # weights that share a scale
_BLOCK_SCALES = 256  # scales that share a scale, under double quantization


class _DequantizedMatmul(torch.autograd.Function):
    """x · Wᵀ, where W is dequantized for the matrix multiplication alone, forward and backward; x is not kept."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, packed: torch.Tensor, out_features: int) -> torch.Tensor:
        ctx.shape = (out_features, x.shape[-1])
        ctx.dtype = x.dtype
        return x @ packed.new_empty(ctx.shape, dtype=x.dtype).t()

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        return grads[0] @ grads[0].new_empty(ctx.shape, dtype=ctx.dtype), None, None


class FakeQuantizedLinear(nn.Linear):
    """A frozen linear layer whose `weight` holds the packed weights and their scales, as a vector of bytes."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """Maps (..., in_features) to (..., out_features), in the input's dtype."""
        product = _DequantizedMatmul.apply(input, self.weight, self.out_features)
        return product if self.bias is None else product + self.bias.to(product.dtype)


def packed_bytes(weights: int, rows: int, bits: int, double_quantization: bool) -> int:
    """Returns the bytes of a quantized matrix, scales included.

    Args:
        weights: how many the matrix has.
        rows: its output features; with 8 bits each has a float32 scale (LLM.int8, arXiv:2208.07339).
        double_quantization: with 4 bits: the scales of the blocks of 64 are quantized to 8 bits
            (QLoRA, arXiv:2305.14314, section 3).
    """
    if bits == 8:
        return weights + 4 * rows
    blocks = -(-weights // _BLOCK_4BIT)
    tables = 16 * 4  # the 16 values that 4 bits encode
    scales = 4 * blocks
    if double_quantization:
        scales = blocks + 4 * -(-blocks // _BLOCK_SCALES) + 256 * 4 + 4
    return -(-weights // 2) + scales + tables


def fake_quantize(model: nn.Module, bits: int, double_quantization: bool, skipped: tuple[str, ...] = ()) -> int:
    """Replaces the frozen linear layers of a meta model by fake quantized ones, except the head; returns their number.

    Args:
        model: on the meta device, with or without an adapter.
        skipped: ends of the names of layers that are not quantized (`llm_int8_skip_modules`).
    """
    head = model.get_output_embeddings()  # type: ignore[operator]
    head = getattr(head, "base_layer", head)
    count = 0
    for name, module in model.named_modules():
        frozen = type(module) is nn.Linear and not module.weight.requires_grad
        if not frozen or module is head or "lora_" in name or name.removesuffix(".base_layer").endswith(skipped):
            continue
        assert isinstance(module, nn.Linear)
        size = packed_bytes(module.weight.numel(), module.out_features, bits, double_quantization)
        packed = module.weight.new_empty(size, dtype=torch.uint8)
        module.weight = nn.Parameter(packed, requires_grad=False)
        module.__class__ = FakeQuantizedLinear
        count += 1
    return count
