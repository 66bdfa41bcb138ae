"""Loads the training rows of one process, in an order that is a function of the seed and the epoch alone."""

from __future__ import annotations

from typing import Any

from torch.utils.data import DataLoader
from transformers import TrainingArguments

from sft.checkpoint.compatibility import digest_lengths
from sft.checkpoint.stream_state import StreamProgress
from sft.data.loading.collator import PACKED, EvenRows, even_multiple, row_lengths
from sft.data.loading.sampler import EpochSampler
from sft.data.streaming.stream import TrainingStream
from sft.data.streaming.stream_loader import StreamLoader


class TrainingRows:
    """The training rows and their order.

    Args:
        rows: a data set of `input_ids` and `labels`, a `TrainingStream`, or None where nothing is trained.
        args: of the Trainer.
        progress: of the stream, where `rows` is one.
    """

    def __init__(self, rows: Any, args: TrainingArguments, progress: StreamProgress | None = None) -> None:
        self._rows, self._args = rows, args
        self.progress = progress

    @property
    def order_seed(self) -> int:
        """The seed of the order: `data_seed` (which `shuffle_seed` becomes), else `seed`."""
        return self._args.data_seed if self._args.data_seed is not None else self._args.seed

    def padded_with_fillers(self, batch_size: int) -> EvenRows:
        """The rows, with fillers at the end so that every rank gets equal batches."""
        drops_last = self._args.dataloader_drop_last
        return EvenRows(self._rows, 1 if drops_last else even_multiple(batch_size, self._args.world_size))

    def stream_loader(self, collator: Any, batch_size: int) -> DataLoader:
        """The data loader of a stream. accelerate would shard the stream among the ranks a second time."""
        assert self.progress is not None
        self.progress.rewind()
        args = self._args
        return StreamLoader(
            self.progress.stream,
            collator,
            batch_size,
            num_workers=args.dataloader_num_workers,
            pin_memory=args.dataloader_pin_memory,
            multiprocessing_context=args.dataloader_multiprocessing_context,
            prefetch_factor=args.dataloader_prefetch_factor,
        )

    def sampler(self, rows: EvenRows, batch_size: int) -> EpochSampler | None:
        """The sampler for `train_sampling_strategy`; None for a strategy that only upstream has."""
        args = self._args
        strategy = args.train_sampling_strategy
        if strategy not in ("random", "sequential", "group_by_length"):
            return None
        rows_per_step = batch_size * args.gradient_accumulation_steps * args.world_size
        lengths = row_lengths(rows.rows) if strategy == "group_by_length" else None
        return EpochSampler(len(rows.rows), rows.fillers, self.order_seed, strategy, lengths, rows_per_step)

    def fingerprint(self) -> dict[str, Any]:
        """What a resumed run must find unchanged: the fields of `ResumeFingerprint` that are about data."""
        if self.progress:
            return {"train_rows": 0, "row_lengths": "", **self.progress.stream.identity()}
        return {"train_rows": len(self._rows), "row_lengths": digest_lengths(row_lengths(self._rows))}


def is_packed(rows: Any) -> bool:
    """Whether samples share rows, of a data set or a stream; None has no rows."""
    return rows.is_packed if isinstance(rows, TrainingStream) else PACKED in getattr(rows, "column_names", ())
