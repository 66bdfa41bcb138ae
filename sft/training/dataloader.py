"""The order in which training sees its rows: a function of the seed and the epoch, the same on every rank."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch.utils.data import DataLoader, Sampler
from transformers import Trainer

from sft.checkpoint.stream_state import StreamProgress
from sft.data.loading.collator import EvenRows, even_multiple, row_lengths
from sft.data.loading.document_offsets import DocumentOffsets
from sft.data.loading.sampler import EpochSampler
from sft.data.streaming.dataloader import StreamLoader
from sft.training.callbacks import FollowEpoch


class RowOrder(Trainer):
    """The Trainer's loading of training rows.

    Attributes:
        train_rows: the training rows, or a stream of them.
        progress: of the stream, where it is one.
    """

    train_rows: Any = None
    progress: StreamProgress | None = None

    @property
    def order_seed(self) -> int:
        """The seed of the order: `data_seed`, which is also how `shuffle_seed` comes here, or the run's."""
        return self.args.data_seed if self.args.data_seed is not None else self.args.seed

    def get_train_dataloader(self) -> DataLoader:
        """Batches of this rank; each real row is seen once an epoch on one rank, whatever their number."""
        if self.progress:
            return self._stream_loader(self.progress)
        multiple = 1 if self.args.dataloader_drop_last else even_multiple(self._train_batch_size, self.args.world_size)
        self.train_dataset: Any = EvenRows(self.train_rows, multiple)
        return super().get_train_dataloader()

    def _stream_loader(self, progress: StreamProgress) -> DataLoader:
        """Not through accelerate, which would share the stream's rows out among the ranks once more."""
        progress.rewind()
        args = self.args
        return StreamLoader(
            progress.stream,
            self.data_collator,
            self._train_batch_size,
            num_workers=args.dataloader_num_workers,
            pin_memory=args.dataloader_pin_memory,
            multiprocessing_context=args.dataloader_multiprocessing_context,
            prefetch_factor=args.dataloader_prefetch_factor,
        )

    def get_batch_samples(self, epoch_iterator: Iterator, num_batches: int, device: torch.device) -> tuple[list, Any]:
        """Those of a stream go to the device as they are taken, as accelerate's do.

        Their trained tokens are then counted there; a count in main memory would travel by a copy that waits for all
        passes queued before it.
        """
        return super().get_batch_samples(map(self._prepare_inputs, epoch_iterator), num_batches, device)

    def _prepare_input(self, data: Any) -> Any:
        """Moves `data` to the device; upstream has no `DocumentOffsets`, and its copies wait for queued passes."""
        if isinstance(data, DocumentOffsets) or (isinstance(data, torch.Tensor) and data.is_pinned()):
            return data.to(self.args.device, non_blocking=True)
        return super()._prepare_input(data)

    def _get_train_sampler(self, train_dataset: Any = None) -> Sampler | None:
        rows: EvenRows = train_dataset if train_dataset is not None else self.train_dataset
        strategy = self.args.train_sampling_strategy
        if strategy not in ("random", "sequential", "group_by_length"):
            return super()._get_train_sampler(train_dataset)
        per_step = self._train_batch_size * self.args.gradient_accumulation_steps * self.args.world_size
        lengths = row_lengths(rows.rows) if strategy == "group_by_length" else None
        sampler = EpochSampler(len(rows.rows), rows.fillers, self.order_seed, strategy, lengths, per_step)
        self.remove_callback(FollowEpoch)
        self.add_callback(FollowEpoch(sampler))
        return sampler
