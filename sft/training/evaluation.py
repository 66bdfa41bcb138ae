"""Evaluates with sums over tokens: the same metrics on any number of ranks, of each set and of all sets together."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch.utils.data import DataLoader
from transformers import TrainingArguments

from sft.data.loading.collator import EvenRows, even_multiple
from sft.distributed.oom import oom_during_evaluation
from sft.loss.metrics import TokenCounts, TokenSums
from sft.loss.token_loss import TokenLoss

_REPORTED = ("loss", "perplexity", "token_accuracy", "sequence_accuracy", "tokens")


@contextmanager
def evaluation_mode(model: Any) -> Iterator[None]:
    """Puts the model into evaluation mode and makes no graph; afterwards it is in the mode that it was in."""
    was_training = model.training
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        model.train(was_training)


class Evaluation:
    """The evaluations of a run.

    Args:
        names: of the evaluation sets.
        args: of the Trainer.
    """

    def __init__(self, names: Sequence[str], args: TrainingArguments) -> None:
        self._names, self._args = list(names), args
        self._counts: list[TokenCounts] = []  # of each set, in the evaluation that is running
        self._latest: tuple[int, dict[str, float]] = (-1, {})  # optimizer steps made, and the metrics

    def begin(self) -> None:
        """Begins an evaluation of one or several sets."""
        self._counts = []

    def end(self, step: int, metrics: dict[str, float]) -> None:
        """Remembers the metrics of the evaluation after `step` optimizer steps."""
        self._latest = (step, metrics)

    def even_rows(self, rows: Any) -> EvenRows:
        """`rows` with fillers, so that every rank gets equal batches and each row is on exactly one rank.

        `dataloader_drop_last` is for training, but upstream applies it here too: fillers leave nothing to drop.
        """
        batch_size, ranks = self._args.eval_batch_size, self._args.world_size
        drops_last = self._args.dataloader_drop_last
        return EvenRows(rows, batch_size * ranks if drops_last else even_multiple(batch_size, ranks))

    def sum_batches(
        self, model: Any, batches: DataLoader, measure: Callable[[Any], tuple[TokenLoss, torch.Tensor]], when: str
    ) -> TokenCounts:
        """Adds up all batches on all ranks; logits never outlive their batch.

        Args:
            measure: the sums of a batch, and the input tokens in it, a scalar on the device.
            when: names the evaluation in an error.

        Raises:
            RankStopped: memory ran out.
        """
        sums = TokenSums(self._args.device)
        with evaluation_mode(model), oom_during_evaluation(when, self._args.eval_batch_size):
            for batch in batches:
                sums.add(*measure(batch))
        counts = sums.reduce_and_reset()
        self._counts.append(counts)
        return counts

    def together(self, prefix: str) -> dict[str, float]:
        """Returns the metrics of all sets of this evaluation as if they were one."""
        return named_metrics(sum(self._counts[1:], start=self._counts[0]), prefix)

    def is_current(self, step: int) -> bool:
        """Whether the latest evaluation is of the weights that the run ends with, after `step` steps."""
        return self._latest[0] == step and not self._args.load_best_model_at_end  # else the best may be loaded since

    def results(self) -> dict[str, Any]:
        """Returns SPEC's result of `evaluate`: the metrics of all sets together and of each; empty without sets."""
        if not self._names:
            return {}
        metrics = self._latest[1]
        several = len(self._names) > 1
        sets = {name: _reported(metrics, f"eval_{name}" if several else "eval") for name in self._names}
        return {**_reported(metrics, "eval"), "datasets": sets}


def named_metrics(counts: TokenCounts, prefix: str) -> dict[str, float]:
    """Returns the metrics of `counts`, with `prefix_` in front of their names."""
    return {**counts.metrics(f"{prefix}_"), f"{prefix}_tokens": counts.tokens}


def _reported(metrics: Mapping[str, float], prefix: str) -> dict[str, float]:
    return {f"eval_{name}": metrics[f"{prefix}_{name}"] for name in _REPORTED if f"{prefix}_{name}" in metrics}
