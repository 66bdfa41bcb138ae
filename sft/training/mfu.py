"""How many floating point operations training takes, by the usual count: the weights, without attention's products."""

from __future__ import annotations

import re
from typing import Any

from sft.model.embeddings import is_tied

# Dense bfloat16 operations a second by a part of the device's name, from NVIDIA's and AMD's data sheets.
_PEAKS = {
    r"H200|GH200": 989.4e12,
    r"H100.*PCIe": 756e12,
    r"H100": 989.4e12,
    r"H20\b": 148e12,
    r"B200|GB200": 2250e12,
    r"B300|GB300": 2250e12,
    r"A100|A800": 312e12,
    r"L40S": 362e12,
    r"\bL4\b": 121e12,
    r"RTX 4090": 165.2e12,
    r"RTX 3090": 71e12,
    r"A10\b|A10G": 125e12,
    r"MI300X": 1307e12,
}


def peak_flops_by_name(device_name: str) -> float | None:
    """Dense bfloat16 operations a second that the data sheet promises; None for a device that is not known here."""
    return next((peak for pattern, peak in _PEAKS.items() if re.search(pattern, device_name)), None)


def peak_flops(device: Any) -> float | None:
    """The same for a torch device; None where nobody promises anything, as of a CPU."""
    import torch

    return peak_flops_by_name(torch.cuda.get_device_name(device)) if device.type == "cuda" else None


def flops_per_token(model: Any) -> int:
    """Of a forward and a backward pass over one token (Kaplan et al., 2020, arXiv:2001.08361, section 2.1).

    2 a weight for the forward, 2 for the gradient of its input, 2 for its own where it is trained: 6 N where all
    weights are trained, 4 N where they are frozen beneath an adapter. The input embedding is looked up, not multiplied,
    unless it is the output head as well. Only the experts that a token goes through count; 4-bit weights count as
    weights.
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
    """Weights, not elements: bitsandbytes holds two 4-bit weights in a byte."""
    state = getattr(parameter, "quant_state", None)
    return int(state.shape.numel()) if state is not None else int(parameter.numel())


def _share_of_experts(model: Any) -> float:
    config = model.config.get_text_config()
    experts = getattr(config, "num_local_experts", None) or getattr(config, "num_experts", None)
    chosen = getattr(config, "num_experts_per_tok", None)
    return chosen / experts if experts and chosen else 1.0
