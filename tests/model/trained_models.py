"""Models after some training steps, as the tests of saving and merging need them."""

from __future__ import annotations

from typing import Any

import torch

import model_manager
from sft.config.schema import LoraKeys, ModelKeys, QuantizationKeys

PROBE = torch.arange(5, 45).reshape(2, 20)
IM_END = 2


def trained(keys: ModelKeys, lora: LoraKeys | None = None, quantization: QuantizationKeys | None = None) -> Any:
    """Returns a model after four steps, which moved each of its trained weights, and its tokenizer."""
    tokenizer = model_manager.load_tokenizer(keys)
    precision = model_manager.plan_precision(keys, lora, quantization)
    torch.manual_seed(0)
    model: Any = model_manager.load_model(keys, tokenizer, precision=precision, lora=lora, quantization=quantization)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    ids = torch.randint(0, len(tokenizer), (4, 16), generator=torch.Generator().manual_seed(0))
    ids[:, -2:] = torch.tensor([len(tokenizer) - 1, IM_END])
    for _ in range(4):
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return model.eval(), tokenizer


def logits(model: Any, probe: torch.Tensor = PROBE) -> torch.Tensor:
    """Returns (B, T, V) without gradients."""
    with torch.no_grad():
        return model(input_ids=probe, use_cache=False).logits
