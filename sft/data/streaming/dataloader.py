"""Batches of a stream, each with the place where the stream stands behind it."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils.data import DataLoader

from sft.data.streaming.stream import PROBLEMS, STEP, Account, Step, TrainingStream
from sft.errors import UserError


@dataclass(frozen=True)
class StreamCollator:
    """A collator of rows, and the step of the stream that the batch means under `STEP`."""

    collate: Callable[[list[dict[str, Any]]], dict[str, Any]]

    def __call__(self, rows: list[dict[str, Any]]) -> dict[str, Any]:
        """The batch, or the problems that one of its rows stands for."""
        for row in rows:
            if PROBLEMS in row:
                return row
        account = Account()
        for row in rows:
            account.add(row[STEP].account or Account())
        step = Step(rows[-1][STEP].place, account if account.has_news else None)
        return {**self.collate([{n: v for n, v in row.items() if n != STEP} for row in rows]), STEP: step}


class StreamLoader(DataLoader):
    """Batches of a stream, from its workers in turn.

    Args:
        stream: planned for as many workers as `options` ask for.
        collate: makes a batch of rows.
        batch_size: rows of a batch.
        options: what else a `DataLoader` takes.
    """

    def __init__(
        self, stream: TrainingStream, collate: Callable[[Any], dict[str, Any]], batch_size: int, **options: Any
    ) -> None:
        if options.get("num_workers"):
            # A process that is forked from one whose tokenizer ran its threads would wait for them for ever.
            os.environ["TOKENIZERS_PARALLELISM"] = "false"
        # Of its own, so that the loader's draw of a seed for its workers, which need none, leaves the model's dropout
        # as it is: a resumed run draws once more often.
        generator = torch.Generator().manual_seed(0)
        super().__init__(stream, batch_size, collate_fn=StreamCollator(collate), generator=generator, **options)

    def __iter__(self) -> Iterator[dict[str, Any]]:  # type: ignore[override]
        """The batches. Raises `UserError` with the problems that a worker met."""
        for batch in super().__iter__():
            if PROBLEMS in batch:
                raise UserError(*batch[PROBLEMS])
            yield batch
