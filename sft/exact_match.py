"""How many questions a model answers exactly, found out by letting it answer: what the loss only hints at."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import Any

from sft.conversation import Conversation
from sft.out_of_memory import measuring
from sft.replies import exact_match
from sft.trained_models import stop_tokens

logger = logging.getLogger("sft")


def count_right(
    model: Any,
    tokenizer: Any,
    conversations: Sequence[Conversation],
    end_token_ids: Sequence[int],
    batch_size: int,
    on_progress: Callable[[int], None],
) -> int:
    """Answers the last turn of each conversation greedily; the first three are shown.

    Args:
        model: not wrapped for distribution.
        conversations: each ends with the right answer.
        end_token_ids: where an answer ends.
        batch_size: conversations answered at a time.
        on_progress: told how many have been answered since it was last told.

    Returns:
        How many answers, without white space around them, are the right ones.

    Raises:
        RankStopped: memory ran out.
    """
    stops = stop_tokens(tokenizer, end_token_ids)
    messages = [c.messages for c in conversations]
    with measuring("answering the questions of exact_match_samples", batch_size):
        result = exact_match(
            model, tokenizer, messages, batch_size=batch_size, stop_token_ids=stops, on_progress=on_progress
        )
    for example in result.examples[:3]:
        mark = "right" if example.reply == example.answer else f"wrong, expected {example.answer!r}"
        logger.info("  %r -> %r (%s)", example.question[-1]["content"], example.reply, mark)
    return result.right
