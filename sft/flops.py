"""How many floating point operations training takes, by the usual count: the weights, without attention's products."""

from __future__ import annotations

from typing import Any


def operations_a_token(model: Any) -> int:
    """Of a forward and a backward pass over one token (Kaplan et al., 2020, arXiv:2001.08361, section 2.1).

    2 a weight for the forward, 2 for the gradient of its input, 2 for its own where it is trained: 6 N where all
    weights are trained, 4 N where they are frozen beneath an adapter. The input embedding is looked up, not multiplied,
    unless it is the output head as well. Only the experts that a token goes through count; 4-bit weights count as
    weights.
    """
    embedding = model.get_input_embeddings()
    skipped = {id(p) for p in embedding.parameters()} if not _is_tied(model) else set()
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


def _is_tied(model: Any) -> bool:
    head = model.get_output_embeddings()
    return head is not None and getattr(head, "weight", None) is model.get_input_embeddings().weight


def _share_of_experts(model: Any) -> float:
    config = model.config.get_text_config()
    experts = getattr(config, "num_local_experts", None) or getattr(config, "num_experts", None)
    chosen = getattr(config, "num_experts_per_tok", None)
    return chosen / experts if experts and chosen else 1.0
