"""Writes and reads what this pipeline adds to a checkpoint of upstream's Trainer."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from transformers import TrainingArguments

from sft.checkpoint import compatibility, stream_state
from sft.checkpoint.compatibility import ResumeFingerprint, adapter_facts, describe_adapter
from sft.loss.metrics import TokenCounts
from sft.model.saving import save_companions
from sft.report.run_files import write_ledger
from sft.training.arguments import StepSettings
from sft.training.training_rows import TrainingRows


class CheckpointFiles:
    """The fingerprint by which a resume knows its run, the counts since the last log, the state of a stream.

    Args:
        end_token_ids: the tokens that end an answer, for the generation config; a stream finds more of them.
    """

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        args: TrainingArguments,
        rows: TrainingRows,
        settings: StepSettings,
        end_token_ids: Sequence[int],
    ) -> None:
        self._model, self._tokenizer, self._args = model, tokenizer, args
        self._rows, self._settings, self._end_token_ids = rows, settings, end_token_ids
        self._streamed: dict[str, Any] | None = None  # the state of the stream on all ranks

    def gather_stream(self) -> None:
        """Gathers the state of a stream from all ranks, which must all call it, before `save`."""
        if progress := self._rows.progress:
            self._streamed = progress.gather()
            self._end_token_ids = self._streamed["end_token_ids"]

    def save(self, folder: Path, counts: TokenCounts, skipped: int) -> None:
        """Writes this pipeline's files into the checkpoint `folder`; one rank of each disk calls it.

        Args:
            counts: since the last log.
            skipped: optimizer steps skipped so far.
        """
        save_companions(self._model, self._tokenizer, folder, self._end_token_ids)
        if self._streamed:
            stream_state.save(folder, self._streamed)
        ranks = range(self._args.world_size)
        if self._args.save_on_each_node:  # each node's first rank, which this is, writes for the ranks of its node
            first = self._args.process_index
            ranks = range(first, first + int(os.environ.get("LOCAL_WORLD_SIZE", "1")))
        compatibility.save(folder, self._fingerprint(), counts, skipped, ranks, self._settings.dtype)

    def report_stream(self, *, writes: bool) -> None:
        """Writes the ledger of a stream beside the checkpoint that was just saved.

        Raises:
            UserError: too many of its rows were lost.
        """
        progress = self._rows.progress
        if progress and self._streamed:
            if writes:
                write_ledger(Path(str(self._args.output_dir)), progress.document(self._streamed))
            progress.require_enough_rows(stream_state.account_in(self._streamed))

    def load(self, checkpoint: Path) -> tuple[TokenCounts, int]:
        """Returns the counts since the last log and the skipped steps of `checkpoint`; sets a stream to its place.

        Raises:
            UserError: the checkpoint is of another run, or its state of a stream is damaged.
        """
        loaded = compatibility.load(checkpoint, self._fingerprint())
        if self._rows.progress:
            self._rows.progress.load(checkpoint)
        return loaded

    def _fingerprint(self) -> ResumeFingerprint:
        return ResumeFingerprint(
            world_size=self._args.world_size,
            per_device_train_batch_size=self._args.per_device_train_batch_size,
            gradient_accumulation_steps=self._args.gradient_accumulation_steps,
            seed=self._rows.order_seed,
            adapter=describe_adapter(self._model),
            adapter_facts=adapter_facts(self._model),
            train_sampling_strategy=self._args.train_sampling_strategy,
            master_weights=self._settings.master_weights,
            **self._rows.fingerprint(),
        )
