"""Exact match: the number of questions whose generated reply equals the right answer."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from sft.data.formats.conversation import Conversation, Message
from sft.distributed.collectives import current_rank, group_size, sum_over_ranks
from sft.distributed.oom import oom_during_evaluation
from sft.inference.generate import Sampling, generate_replies
from sft.model.saving import stop_tokens
from sft.report.console import counting

logger = logging.getLogger("sft")


@dataclass(frozen=True)
class Example:
    """A question with its right answer and the model's reply, both stripped of white space."""

    question: list[Message]
    answer: str
    reply: str

    @property
    def is_right(self) -> bool:
        """Whether they are equal."""
        return self.reply == self.answer

    def __str__(self) -> str:
        mark = "right" if self.is_right else f"wrong, expected {self.answer!r}"
        return f"{self.question[-1].get('content')!r} -> {self.reply!r} ({mark})"


def exact_match(
    model: Any,
    tokenizer: Any,
    conversations: Sequence[Conversation],
    *,
    batch_size: int = 8,
    stop_token_ids: Sequence[int] | None = None,
    on_progress: Callable[[int], None] | None = None,
) -> list[Example]:
    """Generates a greedy reply to each conversation without its last message, to be compared with that message.

    A reply may be 16 tokens longer than the longest right answer.

    Args:
        conversations: each ends with the right answer as the assistant's message.
        batch_size: conversations generated at the same time.
        model, stop_token_ids, on_progress: as for `generate_replies`.

    Raises:
        ValueError: a conversation does not end with an answer.
        RankStopped: memory ran out.
    """
    for number, conversation in enumerate(conversations):
        if not conversation.ends_with_answer:
            raise ValueError(f"conversation {number} does not end with an answer")
    questions = [replace(c, messages=c.messages[:-1], trainable=c.trainable[:-1]) for c in conversations]
    answers = [c.messages[-1]["content"].strip() for c in conversations]
    longest = max((len(tokenizer.encode(answer, add_special_tokens=False)) for answer in answers), default=0)
    with oom_during_evaluation("answering the questions of exact_match_samples", batch_size):
        replies = generate_replies(
            model,
            tokenizer,
            questions,
            Sampling(longest + 16),
            batch_size=batch_size,
            stop_token_ids=stop_token_ids,
            on_progress=on_progress,
        )
    return [Example(q.messages, a, r.strip()) for q, a, r in zip(questions, answers, replies, strict=True)]


def measure_exact_match(
    model: Any,
    tokenizer: Any,
    conversations: Sequence[Conversation],
    *,
    batch_size: int,
    end_token_ids: Sequence[int],
    when: str = "",
) -> dict[str, float]:
    """Logs and returns the share of exact replies over all ranks, which all must call it; empty without conversations.

    Args:
        conversations: the same on every rank; each rank answers its part.
        batch_size, model, tokenizer: as for `exact_match`.
        end_token_ids: the tokens that end an answer.
        when: of the metric's name: "" or e.g. "_before".
    """
    if not conversations:
        return {}
    with counting("questions answered:") as on_progress:
        examples = exact_match(
            model,
            tokenizer,
            conversations[current_rank() :: group_size()],
            batch_size=batch_size,
            stop_token_ids=stop_tokens(tokenizer, end_token_ids),
            on_progress=on_progress,
        )
    for example in examples[:3]:
        logger.info("  %s", example)
    right, total = int(sum_over_ranks(torch.tensor(sum(e.is_right for e in examples)))), len(conversations)
    logger.info("Exact match%s: %d of %d (%.1f %%)", when.replace("_", " "), right, total, 100 * right / total)
    return {f"exact_match{when}": right / total}
