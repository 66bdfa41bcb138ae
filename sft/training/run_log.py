"""What a run writes down: metrics over all tokens since the last log, and what its checkpoints hold of ours."""

from __future__ import annotations

import logging
import math
import os
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from sft.checkpoint import compatibility, stream_state
from sft.checkpoint.compatibility import ResumeFingerprint, adapter_facts, describe_adapter, digest_lengths
from sft.data.loading.collator import row_lengths
from sft.distributed.collectives import barrier
from sft.distributed.memory import peak_memory_gb
from sft.loss.metrics import TokenCounts, TokenSums
from sft.model.saving import save_companions
from sft.report import run_files
from sft.training.dataloader import RowOrder
from sft.training.mfu import peak_flops
from sft.training.nonfinite import require_finite
from sft.training.step import StepSettings
from sft.training.step_monitor import StepMonitor

logger = logging.getLogger("sft")


class RunRecords(RowOrder):
    """The logs and checkpoints of the Trainer."""

    _settings: StepSettings
    _watch: StepMonitor
    _sums: TokenSums
    seconds_evaluating: float

    def _keep_records(self, end_token_ids: Sequence[int], flops_per_token: int) -> None:
        """Begins to count."""
        self._end_token_ids = end_token_ids
        self._flops_per_token = flops_per_token
        self._peak_operations = peak_flops(self.args.device)
        self._counts = TokenCounts.zero()
        self._streamed: dict[str, Any] | None = None  # what the stream's ranks gathered for the checkpoint
        self._tokens_before = 0  # of the counts since the last log, the input tokens that an earlier process trained
        self._clock = time.perf_counter()

    def _restore_counts(self, checkpoint: Path) -> None:
        """Goes on counting where the run that left the checkpoint was; see `sft.checkpoint.compatibility.load`."""
        self._counts, self._watch.skipped = compatibility.load(checkpoint, self._shape())
        self._tokens_before = self._counts.input_tokens

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Replaces the Trainer's mean of step means by the metrics over all tokens since the last log."""
        if "loss" in logs:
            self._count_tokens()
            counts, self._counts = self._counts, TokenCounts.zero()
            seconds = time.perf_counter() - self._clock - self.seconds_evaluating
            self._clock, self.seconds_evaluating = time.perf_counter(), 0.0
            logs |= counts.metrics() or {"loss": math.nan}  # each step was left out
            if self._watch.skipped:
                logs["skipped_steps"] = self._watch.skipped
            for spike in self._watch.spikes():
                logger.warning("%s", spike)
            logs["num_tokens"] = self.state.num_input_tokens_seen
            logs["tokens_per_second"] = (counts.input_tokens - self._tokens_before) / seconds
            self._tokens_before = 0
            if self._peak_operations:
                operations = logs["tokens_per_second"] * self._flops_per_token / self.args.world_size
                logs["mfu"] = operations / self._peak_operations
            logs["memory_gb"] = peak_memory_gb(self.args.device)
        super().log(logs, start_time)

    def _count_tokens(self) -> None:
        """Reads the sums from the device into the counts since the last log and into the state that is saved."""
        counts = self._sums.reduce_and_reset()
        self._counts += counts
        if self.args.include_num_input_tokens_seen == "no":  # else the Trainer counts them itself
            self.state.num_input_tokens_seen += counts.input_tokens

    def floating_point_ops(self, inputs: dict[str, Any]) -> int:
        """6 a weight and token; 2 less a frozen weight, whose gradient is not made. Attention is not counted."""
        return self._flops_per_token * inputs["input_ids"].numel()

    def _save_checkpoint(self, model: torch.nn.Module, trial: Any) -> None:
        started = time.perf_counter()
        named = self.model.named_parameters()  # type: ignore[union-attr]
        require_finite(named, f"checkpoint-{self.state.global_step}")
        self._count_tokens()  # so that num_tokens goes on from the right number after a resume
        if self.progress:
            self._streamed = self.progress.gather()
            self._end_token_ids = self._streamed["end_token_ids"]
        super()._save_checkpoint(model, trial)
        if self.progress and self._streamed:
            if self.is_world_process_zero():
                run_files.write_ledger(Path(str(self.args.output_dir)), self.progress.document(self._streamed))
            self.progress.require_enough_rows(stream_state.account_in(self._streamed))
        self._clock += time.perf_counter() - started

    def _save_rng_state(self, output_dir: str) -> None:
        """Behind it every rank's part of the checkpoint is there, so that the first rank may delete an older one."""
        super()._save_rng_state(output_dir)
        barrier()

    def _issue_warnings_after_load(self, load_result: Any) -> None:
        """Not of tied weights: they stand in the file once, under one of their names."""
        tied = getattr(self.model, "all_tied_weights_keys", {})
        load_result.missing_keys[:] = [name for name in load_result.missing_keys if name not in tied]
        super()._issue_warnings_after_load(load_result)

    def stream_account(self) -> tuple[dict[str, Any], tuple[int, ...]]:
        """SPEC's LEDGER of the rows that were streamed to all ranks, which all must call it; and their end tokens."""
        assert self.progress is not None
        streamed = self.progress.gather()
        return self.progress.document(streamed), tuple(streamed["end_token_ids"])

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        """Also what is ours in a checkpoint: older ones are deleted once all of the new one is there."""
        super()._save(output_dir, state_dict)
        if not self.args.should_save:
            return
        model: Any = self.model
        tokenizer: Any = self.processing_class
        folder = Path(output_dir or str(self.args.output_dir))
        save_companions(model, tokenizer, folder, self._end_token_ids)
        if self._streamed:
            stream_state.save(folder, self._streamed)
        ranks = range(self.args.world_size)
        if self.args.save_on_each_node:  # on its own disk, by its first rank, which this is
            first = self.args.process_index
            ranks = range(first, first + int(os.environ.get("LOCAL_WORLD_SIZE", "1")))
        compatibility.save(folder, self._shape(), self._counts, self._watch.skipped, ranks, self._settings.dtype)

    def _leave_logs(self) -> None:
        """Logs the steps since the last log, and leaves the curve up to here; every rank must call it."""
        if self.state.global_step > self._globalstep_last_logged:
            self.log({"loss": math.nan})
        self._leave_curve()

    def _leave_curve(self) -> None:
        """Leaves the curve up to the last log; a rank that stops alone may call it, for it is the same on all ranks."""
        if self.state.global_step:  # else there is none yet, and a resumed run's earlier one stays
            file = Path(str(self.args.output_dir)) / "trainer_state.json"
            file.parent.mkdir(parents=True, exist_ok=True)
            own = file.with_suffix(f".{self.args.process_index}")
            self.state.save_to_json(str(own))
            own.replace(file)  # at once: ranks that stop together do not write into each other's file
        self.callback_handler.on_train_end(self.args, self.state, self.control)  # trackers write what they hold

    def _shape(self) -> ResumeFingerprint:
        data: dict[str, Any] = {"train_rows": 0, "row_lengths": ""}
        if self.progress:
            data |= self.progress.stream.identity()
        else:
            data = {"train_rows": len(self.train_rows), "row_lengths": digest_lengths(row_lengths(self.train_rows))}
        return ResumeFingerprint(
            world_size=self.args.world_size,
            per_device_train_batch_size=self.args.per_device_train_batch_size,
            gradient_accumulation_steps=self.args.gradient_accumulation_steps,
            seed=self.order_seed,
            adapter=describe_adapter(self.model),
            adapter_facts=adapter_facts(self.model),
            train_sampling_strategy=self.args.train_sampling_strategy,
            master_weights=self._settings.master_weights,
            **data,
        )
