"""Turns the sums of the steps since the last log into the metrics of one log; writes the curve of all logs."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from transformers import TrainerState, TrainingArguments

from sft.distributed.memory import peak_memory_gb
from sft.loss.metrics import TokenCounts
from sft.training.mfu import peak_flops


class RunLog:
    """The tokens and seconds since the last log.

    Args:
        args: of the Trainer.
        flops_per_token: of the model, for `mfu`.

    Attributes:
        counts: over all ranks since the last log, as checkpoints hold them.
    """

    def __init__(self, args: TrainingArguments, flops_per_token: int) -> None:
        self._args, self._flops_per_token = args, flops_per_token
        self._peak_flops = peak_flops(args.device)
        self.counts = TokenCounts.zero()
        self._resumed_tokens = 0  # input tokens in `counts` that an earlier process trained
        self._clock, self._paused = time.perf_counter(), 0.0

    def start(self) -> None:
        """Starts the clock."""
        self._clock, self._paused = time.perf_counter(), 0.0

    def resume(self, counts: TokenCounts) -> None:
        """Continues the counts of a checkpoint."""
        self.counts, self._resumed_tokens = counts, counts.input_tokens

    def add(self, counts: TokenCounts) -> None:
        """Adds the counts of further steps."""
        self.counts += counts

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Evaluating and saving do not count into tokens per second."""
        started = time.perf_counter()
        try:
            yield
        finally:
            self._paused += time.perf_counter() - started

    def metrics(self, skipped: int, num_tokens: int) -> dict[str, Any]:
        """Returns the metrics since the last call and starts over.

        Args:
            skipped: optimizer steps skipped since the start of the run.
            num_tokens: input tokens since the start of the run.
        """
        seconds = time.perf_counter() - self._clock - self._paused
        self.start()
        metrics: dict[str, Any] = self.counts.metrics() or {"loss": math.nan}  # all steps were skipped
        if skipped:
            metrics["skipped_steps"] = skipped
        metrics["num_tokens"] = num_tokens
        metrics["tokens_per_second"] = (self.counts.input_tokens - self._resumed_tokens) / seconds
        if self._peak_flops:
            flops = metrics["tokens_per_second"] * self._flops_per_token / self._args.world_size
            metrics["mfu"] = flops / self._peak_flops
        metrics["memory_gb"] = peak_memory_gb(self._args.device)
        self.counts, self._resumed_tokens = TokenCounts.zero(), 0
        return metrics


def write_curve(state: TrainerState, args: TrainingArguments) -> None:
    """Writes `trainer_state.json` up to the last log. Ranks that stop alone may call it: all ranks have the same."""
    if not state.global_step:
        return  # there is no curve yet, and a resumed run's earlier one stays
    file = Path(str(args.output_dir)) / "trainer_state.json"
    file.parent.mkdir(parents=True, exist_ok=True)
    own = file.with_suffix(f".{args.process_index}")
    state.save_to_json(str(own))
    own.replace(file)  # atomic: ranks that stop together do not write into each other's file
