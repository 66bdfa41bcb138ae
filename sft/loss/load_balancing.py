"""The load balancing loss of a mixture of experts, added so that its scale is the same for any number of micro-batches.

The balance is a property of a micro-batch, not of a token, so micro-batches must be averaged, each weighted by its
supervised tokens: its balance times its tokens is added to the summed loss, and dividing that sum by the tokens N of
the whole step, on all ranks, gives

    loss of a step = sum of token losses / N  +  coefficient · sum over micro-batches of balance · tokens / N

The weights tokens / N add up to 1. A micro-batch without supervised tokens adds nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F


def router_coefficient(config: Any) -> float:
    """Returns the coefficient of the model's load balancing loss; 0 where its config does not enable router logits."""
    config = config.get_text_config()
    if not getattr(config, "output_router_logits", False):
        return 0.0
    return float(getattr(config, "router_aux_loss_coef", 0.0) or 0.0)


def load_balancing_loss(
    router_logits: Sequence[torch.Tensor], top_k: int, attention_mask: torch.Tensor | None = None
) -> torch.Tensor:
    """Computes E · Σ_e f_e P_e, with f_e the share of choices that fall on expert e and P_e its mean probability.

    Even routing gives the minimum, `top_k`. Fedus, Zoph and Shazeer, 2021, arXiv:2101.03961, equations 4 to 6, with k
    choices per token and the mean over the tokens of all layers together, as transformers computes it.

    Args:
        router_logits: of each layer (tokens, E), before the softmax.
        top_k: experts that a token is sent to.
        attention_mask: (B, T), 0 where a token is padding and does not count.
    """
    chosen: torch.Tensor | float = 0.0  # (E,)
    probability: torch.Tensor | float = 0.0  # (E,)
    tokens: torch.Tensor | float = 0.0
    for logits in router_logits:
        experts = logits.shape[-1]
        probabilities = F.softmax(logits.flatten(0, -2), dim=-1, dtype=torch.float32)  # (tokens, E)
        if attention_mask is None:
            weights = torch.ones_like(probabilities[:, :1])  # (tokens, 1)
        else:
            weights = attention_mask.flatten()[:, None].to(probabilities)
        choices = torch.zeros_like(probabilities).scatter_(1, probabilities.topk(top_k, dim=-1).indices, 1.0)
        chosen = chosen + (choices * weights).sum(0)
        probability = probability + (probabilities * weights).sum(0)
        tokens = tokens + weights.sum()
    return experts * torch.as_tensor(chosen / tokens * (probability / tokens)).sum()
