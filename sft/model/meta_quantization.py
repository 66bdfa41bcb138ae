"""Layers that take the memory of quantized ones and compute nothing: for estimates on fake tensors.

bitsandbytes' own kernels need numbers. What they hold and make is simple to tell: packed weights with their scales,
and, in both directions, the weight in the format of the computation for as long as one product takes.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

_BLOCK_4BIT = 64  # weights that share a scale
_BLOCK_SCALES = 256  # scales that share a scale of their own, under double quantization


class _DequantizedProduct(torch.autograd.Function):
    """x · Wᵀ, where W stands unpacked only during the product, forward and backward; x is not kept."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, packed: torch.Tensor, out_features: int) -> torch.Tensor:
        ctx.shape = (out_features, x.shape[-1])
        ctx.dtype = x.dtype
        return x @ packed.new_empty(ctx.shape, dtype=x.dtype).t()

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        return grads[0] @ grads[0].new_empty(ctx.shape, dtype=ctx.dtype), None, None


class FakeQuantizedLinear(nn.Linear):
    """A frozen linear layer with packed weights in `weight`, shaped as one row of bytes, scales included."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """(..., in_features) -> (..., out_features), in the input's dtype."""
        product = _DequantizedProduct.apply(input, self.weight, self.out_features)
        return product if self.bias is None else product + self.bias.to(product.dtype)


def packed_bytes(weights: int, rows: int, bits: int, double_quantization: bool) -> int:
    """Bytes of a quantized matrix with all that belongs to it.

    Args:
        weights: its numbers.
        rows: its output features; 8 bits have a float32 scale for each (LLM.int8, arXiv:2208.07339).
        double_quantization: 4 bits only: the scales of the blocks of 64 are held in 8 bits themselves
            (QLoRA, arXiv:2305.14314, section 3).
    """
    if bits == 8:
        return weights + 4 * rows
    blocks = -(-weights // _BLOCK_4BIT)
    tables = 16 * 4  # the 16 values of the format
    scales = 4 * blocks
    if double_quantization:
        scales = blocks + 4 * -(-blocks // _BLOCK_SCALES) + 256 * 4 + 4
    return -(-weights // 2) + scales + tables


def fake_quantize(model: nn.Module, bits: int, double_quantization: bool, skipped: tuple[str, ...] = ()) -> int:
    """Makes the frozen linear layers of a model quantized in place, but for the head; returns their number.

    Args:
        model: on the meta device, with its adapters attached or not.
        skipped: ends of the names of layers that stay as they are (`llm_int8_skip_modules`).
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
