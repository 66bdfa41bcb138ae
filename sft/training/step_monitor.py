"""Watches one optimizer step while it is made: its sums, its rows, and whether the optimizer may step at all."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from typing import Any

import torch
from transformers import TrainingArguments

from sft.loss.metrics import TokenSums
from sft.loss.token_loss import TokenLoss
from sft.training.arguments import StepSettings
from sft.training.evaluation import evaluation_mode
from sft.training.first_step_checks import FirstStepChecks
from sft.training.loss_spikes import LossSpikes
from sft.training.neftune import Neftune
from sft.training.nonfinite import NonfiniteGuard

logger = logging.getLogger("sft")
Inputs = dict[str, Any]


class StepMonitor:
    """Keeps the sums and rows of one optimizer step and runs its checks: non-finite values, first step, loss spikes.

    Args:
        model: the trained model, with its adapter.
        args: of the Trainer.
        settings: how a step is made.
        decode: token ids to text, for messages.
        measure: the sums of one batch, on this rank alone.
    """

    def __init__(
        self,
        model: Any,
        args: TrainingArguments,
        settings: StepSettings,
        decode: Callable[[Any], Any],
        measure: Callable[[Inputs], TokenLoss],
    ) -> None:
        self.sums = TokenSums(args.device)
        self._rows: list[torch.Tensor] = []
        self._model, self._measure = model, measure
        alpha = args.neftune_noise_alpha or 0.0
        self._neftune = Neftune(model, alpha, args.seed, args.process_index) if alpha else None
        self._guard = NonfiniteGuard(
            settings.on_nonfinite, settings.nonfinite_limit, decode, lambda inputs: self._evaluate(inputs).objective
        )
        vocab_size = model.get_output_embeddings().weight.shape[0]
        self._checks = FirstStepChecks(model, vocab_size, from_scratch=settings.from_scratch, noise_alpha=alpha)
        self._spikes = LossSpikes()

    def _evaluate(self, inputs: Inputs) -> TokenLoss:
        with evaluation_mode(self._model):
            return self._measure(inputs)

    @property
    def skipped(self) -> int:
        """Optimizer steps skipped so far."""
        return self._guard.skipped

    def resume(self, skipped: int) -> None:
        """Continues the count of skipped steps."""
        self._guard.skipped = skipped

    def snapshot(self) -> Any:
        """Returns the state of the step so far, for `restore`."""
        return self.sums.copy(), list(self._rows), self._guard.passes

    def restore(self, snapshot: Any) -> None:
        """Forgets the micro-batches since `snapshot`: they are run again, in smaller pieces."""
        sums, rows, passes = snapshot
        self.sums.clear()
        self.sums.absorb(sums.copy())
        self._rows = list(rows)
        self._guard.forget(passes)
        if self._checks.is_open and not passes:
            self._checks.forget_first_pass()

    def measure_micro_batch(self, inputs: Inputs, step: int, measure: Callable[[], TokenLoss]) -> TokenLoss:
        """Runs the forward pass of a micro-batch; its sums count once the step is made.

        Args:
            step: optimizer steps made before this one.
        """
        if self._checks.is_open:
            self._checks.before_pass(lambda: self._evaluate(inputs))
        noise = self._neftune.training_pass(inputs, step, self._guard.passes) if self._neftune else nullcontext()
        with noise:
            result = measure()
        self._checks.after_pass(result)
        self.sums.add(result, inputs["lengths"].sum())
        self._rows.append(inputs["rows"])
        return result

    def guard_loss(self, loss: torch.Tensor, inputs: Mapping[str, Any]) -> torch.Tensor:
        """Returns `loss`; if it is not finite its backward pass makes every gradient NaN, on all ranks."""
        return self._guard.watch(loss, inputs)

    def check_previous_step(self) -> None:
        """Reports the previous step if the optimizer skipped it on the device.

        Raises:
            TrainingStopped: its loss or gradients were not finite and the run has to stop.
        """
        self._guard.answer()

    def should_step(
        self,
        norm: torch.Tensor,
        norms: Mapping[str, torch.Tensor],
        made: int,
        left: int,
        rates: list[float],
        *,
        skipping: torch.optim.Optimizer | None,
        scaled: bool,
    ) -> bool:
        """Decides whether the optimizer steps on the gradients at hand. Call `check_previous_step` before.

        Args:
            norm: of all gradients, before clipping.
            norms: of each gradient.
            made, left: optimizer steps before this one, and from this one to the end of the run.
            rates: learning rates of the step.
            skipping: an optimizer that skips the step itself, on the device, where its `found_inf` is set
                (`sft.training.optim.factory.find_fused_adam`); the outcome is read by the next `check_previous_step`.
            scaled: whether an fp16 scaler checks the gradients as well.

        Raises:
            TrainingStopped: a loss or gradient is not finite and the run has to stop.
        """
        rows, self._rows = self._rows, []
        must_skip = self._guard.ask(norm, norms, made + 1)
        if skipping is not None and not self._checks.is_open:
            skipping.found_inf = must_skip  # type: ignore[attr-defined]
            self.sums.clear_where(must_skip)
        elif self._guard.answer(scaled=scaled):
            self.sums.clear()
            return False
        if self._checks.is_open:
            self._checks.look(made, self.sums.total())
        self._checks.look_at_rates(made, left, rates)
        self._spikes.note(made + 1, self.sums.objective_and_tokens, rows)
        return True

    def log_spikes(self) -> None:
        """Logs the loss spikes since the last call; reads the device."""
        for spike in self._spikes.read():
            logger.warning("%s", spike)
