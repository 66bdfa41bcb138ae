"""How many questions a model answers exactly, found out by letting it answer: what the loss only hints at."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from sft.data.formats.conversation import Conversation, Message
from sft.distributed.oom import oom_during_evaluation
from sft.inference.generate import Sampling, generate_replies


@dataclass(frozen=True)
class Example:
    """A question with the right answer and the reply it got, both without white space at the ends."""

    question: list[Message]
    answer: str
    reply: str

    def __str__(self) -> str:
        mark = "right" if self.reply == self.answer else f"wrong, expected {self.answer!r}"
        return f"{self.question[-1].get('content')!r} -> {self.reply!r} ({mark})"


@dataclass(frozen=True)
class ExactMatch:
    """How many replies were the right answer to the letter; `examples` has all of them, in the order given."""

    right: int
    examples: tuple[Example, ...]


def exact_match(
    model: Any,
    tokenizer: Any,
    conversations: Sequence[Conversation],
    *,
    batch_size: int = 8,
    stop_token_ids: Sequence[int] | None = None,
    on_progress: Callable[[int], None] | None = None,
) -> ExactMatch:
    """Answers the last turn of each conversation greedily and compares with the answer that it ends with.

    A reply may be 16 tokens longer than the longest right answer.

    Args:
        model: not wrapped for distribution.
        conversations: each ends with the assistant's message that is the right answer.
        batch_size: conversations answered at a time.
        stop_token_ids, on_progress: as for `generate_replies`.

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
    examples = tuple(Example(q.messages, a, r.strip()) for q, a, r in zip(questions, answers, replies, strict=True))
    return ExactMatch(sum(e.answer == e.reply for e in examples), examples)
