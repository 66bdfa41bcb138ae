"""The share of rows that a model answers exactly, measured by letting it answer: what the loss only hints at."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist

from sft.formats import Conversation
from sft.generation import exact_match
from sft.trained_models import generation_config

logger = logging.getLogger("sft")


def measure(
    model: Any, tokenizer: Any, conversations: Sequence[Conversation], end_token_ids: Sequence[int], when: str
) -> float:
    """Answers the last turn of each conversation greedily and compares; the rows are shared among the ranks.

    Args:
        model: not wrapped for distribution.
        conversations: each ends with the right answer.
        end_token_ids: where an answer ends.
        when: for the log, e.g. `before`.

    Returns:
        The share of rows whose answer, without white space around it, is the right one; the same on every rank.
    """
    model.generation_config = generation_config(model, tokenizer, end_token_ids)
    rank, world_size = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    mine = conversations[rank::world_size]
    result = exact_match(model, tokenizer, [c.messages for c in mine])
    counts = torch.tensor([result.right, len(mine)], dtype=torch.float64, device=model.device)
    if world_size > 1:
        dist.all_reduce(counts)
    right, total = (int(n) for n in counts.tolist())
    logger.info("Exact match %s training: %d of %d (%.1f %%)", when, right, total, 100 * right / max(total, 1))
    for example in result.examples[:3]:
        logger.info("  %r -> %r (right: %r)", example.question, example.reply, example.answer)
    return right / max(total, 1)
