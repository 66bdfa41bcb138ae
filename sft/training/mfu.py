"""Counts the floating point operations of training by the usual rule: those of the weights, without attention's."""

from __future__ import annotations

import re
from typing import Any

from sft.model.embeddings import is_tied

# Dense bfloat16 operations per second, by a pattern in the device's name, from NVIDIA's and AMD's data sheets.
_PEAKS = {
    r"H100.*PCIe": 756e12,
    r"H100|H200": 989.4e12,
    r"H20\b": 148e12,
    r"B200|B300": 2250e12,
    r"A100|A800": 312e12,
    r"L40S": 362e12,
    r"\bL4\b": 121e12,
    r"RTX 4090": 165.2e12,
    r"RTX 3090": 71e12,
    r"A10\b|A10G": 125e12,
    r"MI300X": 1307e12,
}


def peak_flops_by_name(device_name: str) -> float | None:
    """Returns the data sheet's dense bfloat16 operations per second for a device name; None if it is not listed."""
    return next((peak for pattern, peak in _PEAKS.items() if re.search(pattern, device_name)), None)


def peak_flops(device: Any) -> float | None:
    """Returns `peak_flops_by_name` of a torch device's name; None for a CPU."""
    import torch

    return peak_flops_by_name(torch.cuda.get_device_name(device)) if device.type == "cuda" else None


def flops_per_token(model: Any) -> int:
    """Counts the operations of one token's forward and backward pass (Kaplan et al., 2020, arXiv:2001.08361, 2.1).

    Per weight 2 for the forward pass, 2 for the gradient of its input, and 2 for its own gradient if it is trained:
    6 N if all weights are trained, 4 N if they are frozen under an adapter. The input embedding is a look-up and counts
    only if it is tied to the output head. Of a mixture of experts only those that a token is routed to count.
    """
    embedding = model.get_input_embeddings()
    skipped = {id(p) for p in embedding.parameters()} if not is_tied(model) else set()
    share = _share_of_experts(model)
    total = 0.0
    for name, parameter in model.named_parameters():
        if id(parameter) in skipped:
            continue
        weights = _weights_in(parameter) * (share if ".experts." in name else 1.0)
        total += weights * (6 if parameter.requires_grad else 4)
    return round(total)


def _weights_in(parameter: Any) -> int:
    """Counts weights, not elements: bitsandbytes stores two 4-bit weights in a byte."""
    state = getattr(parameter, "quant_state", None)
    return int(state.shape.numel()) if state is not None else int(parameter.numel())


def _share_of_experts(model: Any) -> float:
    config = model.config.get_text_config()
    experts = getattr(config, "num_local_experts", None) or getattr(config, "num_experts", None)
    chosen = getattr(config, "num_experts_per_tok", None)
    return chosen / experts if experts and chosen else 1.0
