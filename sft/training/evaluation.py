"""Evaluation whose metrics are sums over tokens: the same on any number of ranks, of each set and of all together."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

import torch
from torch.utils.data import DataLoader, Sampler, SequentialSampler
from transformers import Trainer
from transformers.trainer_utils import EvalLoopOutput

from sft.data.loading.collator import EvenRows, even_multiple
from sft.distributed.oom import oom_during_evaluation
from sft.loss.metrics import TokenCounts, TokenSums
from sft.loss.token_loss import TokenLoss


class TokenEvaluation(Trainer):
    """The evaluating half of the Trainer; the other half says what a batch adds up to.

    Attributes:
        eval_names: of the evaluation sets.
        seconds_evaluating: spent in evaluation since the last log of training; not counted into its tokens a second.
    """

    eval_names: Sequence[str] = ()
    seconds_evaluating = 0.0
    _last_evaluation: tuple[int, dict[str, float]] = (-1, {})

    def measure(
        self, model: torch.nn.Module, inputs: dict[str, Any], gradient_scale: torch.Tensor | None = None
    ) -> TokenLoss:
        """What a batch on the device adds up to."""
        raise NotImplementedError

    @torch.no_grad()
    def _measure_evaluating(self, inputs: dict[str, Any]) -> TokenLoss:
        """The sums of one batch in evaluation mode, on this rank alone."""
        model: Any = self.model
        was_training = model.training
        model.eval()
        try:
            with self.accelerator.autocast():
                return self.measure(model, inputs)
        finally:
            model.train(was_training)

    def evaluate(
        self,
        eval_dataset: Any = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> dict[str, float]:
        """Metrics weighted by tokens: of each set under its name and, where there are several, of all together."""
        started = time.perf_counter()
        eval_dataset = self.eval_dataset if eval_dataset is None else eval_dataset
        self._evaluated: list[TokenCounts] = []
        metrics: dict[str, float] = {}
        if isinstance(eval_dataset, dict):
            for name, dataset in eval_dataset.items():
                metrics |= super().evaluate(dataset, ignore_keys, f"{metric_key_prefix}_{name}")
            together = sum(self._evaluated[1:], start=self._evaluated[0])
            total = self._named(together, metric_key_prefix)
            self.log(dict(total))
            metrics |= total
        else:
            metrics = super().evaluate(eval_dataset, ignore_keys, metric_key_prefix)
        self._last_evaluation = (self.state.global_step, metrics)
        self.seconds_evaluating += time.perf_counter() - started
        return metrics

    def get_eval_dataloader(self, eval_dataset: Any = None) -> DataLoader:
        """Batches of this rank, every row on exactly one rank."""
        rows = self.eval_dataset if eval_dataset is None else eval_dataset
        # Upstream keeps the loader with persistent workers for all sets under one name.
        getattr(self, "_eval_dataloaders", {}).clear()
        batch_size, ranks = self.args.eval_batch_size, self.args.world_size
        # dataloader_drop_last is for training, but upstream heeds it here too: fillers leave it no rest to drop.
        multiple = batch_size * ranks if self.args.dataloader_drop_last else even_multiple(batch_size, ranks)
        return super().get_eval_dataloader(EvenRows(rows, multiple))

    def _get_eval_sampler(self, eval_dataset: Any) -> Sampler:
        return SequentialSampler(eval_dataset)

    def evaluation_loop(
        self,
        dataloader: DataLoader,
        description: str,
        prediction_loss_only: bool | None = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> EvalLoopOutput:
        """Adds up the sums of all batches and ranks; logits never leave their batch."""
        model: Any = self.model
        was_training = model.training
        self.callback_handler.eval_dataloader = dataloader
        model.eval()
        sums = TokenSums(self.args.device)
        what = f"the evaluation behind step {self.state.global_step}" if self.is_in_train else "the evaluation"
        try:
            with torch.no_grad(), oom_during_evaluation(what, self.args.eval_batch_size):
                for batch in dataloader:
                    inputs = self._prepare_inputs(batch)
                    with self.accelerator.autocast():
                        sums.add(self.measure(model, inputs), inputs["lengths"].sum())
                    self.control = self.callback_handler.on_prediction_step(self.args, self.state, self.control)
        finally:
            model.train(was_training)
        counts = sums.take()
        self._evaluated.append(counts)
        rows = len(dataloader.dataset.rows)  # type: ignore[attr-defined]
        return EvalLoopOutput(
            predictions=None,  # type: ignore[arg-type]
            label_ids=None,
            metrics=self._named(counts, metric_key_prefix),
            num_samples=rows,
        )

    @staticmethod
    def _named(counts: TokenCounts, prefix: str) -> dict[str, float]:
        return {**counts.metrics(f"{prefix}_"), f"{prefix}_tokens": counts.tokens}

    def evaluate_all(self) -> dict[str, Any]:
        """SPEC's result of `evaluate`: the metrics of all sets together, and of each set under `datasets`."""
        if self.eval_dataset is None:
            return {}
        # The evaluation of the last step stands, unless the best checkpoint has been loaded since.
        step, metrics = self._last_evaluation
        if step != self.state.global_step or self.args.load_best_model_at_end:
            metrics = self.evaluate()
        kept = ("loss", "perplexity", "token_accuracy", "sequence_accuracy", "tokens")

        def named(prefix: str) -> dict[str, float]:
            return {f"eval_{name}": metrics[f"{prefix}_{name}"] for name in kept if f"{prefix}_{name}" in metrics}

        sets = self.eval_names
        each = {name: named(f"eval_{name}" if len(sets) > 1 else "eval") for name in sets}
        return {**named("eval"), "datasets": each}
