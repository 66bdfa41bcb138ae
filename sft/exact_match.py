"""The share of rows that a model answers exactly, measured by letting it answer: what the loss only hints at."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist

from sft.conversation import Conversation
from sft.replies import exact_match
from sft.trained_models import stop_tokens

logger = logging.getLogger("sft")


def measure(
    model: Any,
    tokenizer: Any,
    conversations: Sequence[Conversation],
    end_token_ids: Sequence[int],
    batch_size: int,
    when: str,
) -> float:
    """Answers the last turn of each conversation greedily and compares; the rows are shared among the ranks.

    Args:
        model: not wrapped for distribution.
        conversations: each ends with the right answer.
        end_token_ids: where an answer ends.
        batch_size: conversations answered at a time on each rank.
        when: for the log, e.g. `before`.

    Returns:
        The share of rows whose answer, without white space around it, is the right one; the same on every rank.
    """
    rank, world_size = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    mine = conversations[rank::world_size]
    result = exact_match(
        model,
        tokenizer,
        [c.messages for c in mine],
        batch_size=batch_size,
        stop_token_ids=stop_tokens(tokenizer, end_token_ids),
    )
    counts = torch.tensor([result.right, len(mine)], dtype=torch.float64, device=model.device)
    if world_size > 1:
        dist.all_reduce(counts)
    right, total = (int(n) for n in counts.tolist())
    logger.info("Exact match %s training: %d of %d (%.1f %%)", when, right, total, 100 * right / max(total, 1))
    for example in result.examples[:3]:
        mark = "right" if example.reply == example.answer else f"wrong, expected {example.answer!r}"
        logger.info("  %r -> %r (%s)", example.question[-1]["content"], example.reply, mark)
    return right / max(total, 1)
