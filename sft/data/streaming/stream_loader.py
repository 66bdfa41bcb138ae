"""Loads batches of a stream, each with the position of the stream after it."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch.utils.data import DataLoader

from sft.data.streaming.stream import PROBLEMS, STEP, Account, Step, TrainingStream
from sft.errors import UserError

Collate = Callable[[list[dict[str, Any]]], dict[str, Any]]


def _collate_with_steps(rows: list[dict[str, Any]], collate: Collate) -> dict[str, Any]:
    """Collates sequences, and their steps into the batch's `STEP`; or returns the problems that one item carries."""
    account = Account()
    for row in rows:
        if PROBLEMS in row:
            return row
        account.add(row[STEP].account or Account())
    step = Step(rows[-1][STEP].place, account if account.has_news else None)
    return {**collate([{n: v for n, v in row.items() if n != STEP} for row in rows]), STEP: step}


class StreamLoader(DataLoader):
    """Loads batches of a stream from its workers in turn.

    Args:
        stream: planned for as many workers as `options` ask for.
        options: other arguments of a `DataLoader`.
    """

    def __init__(self, stream: TrainingStream, collate: Collate, batch_size: int, **options: Any) -> None:
        if options.get("num_workers"):
            # A process forked from one whose tokenizer has used its threads would wait for them forever.
            os.environ["TOKENIZERS_PARALLELISM"] = "false"
        # The loader draws a seed for its workers, which need none. A generator of its own keeps that from changing the
        # model's dropout: a resumed run draws once more often.
        generator = torch.Generator().manual_seed(0)
        collate_fn = partial(_collate_with_steps, collate=collate)
        super().__init__(stream, batch_size, collate_fn=collate_fn, generator=generator, **options)

    def __iter__(self) -> Iterator[dict[str, Any]]:  # type: ignore[override]
        """Yields the batches. Raises `UserError` with the problems that a worker found."""
        for batch in super().__iter__():
            if PROBLEMS in batch:
                raise UserError(*batch[PROBLEMS])
            yield batch
