"""Everything that watches an optimizer step while it is made: what it adds up to, and whether it may be made at all."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import nullcontext
from typing import Any, Literal

import torch

from sft.loss.metrics import TokenSums
from sft.loss.token_loss import TokenLoss
from sft.training.first_step_checks import FirstStepChecks
from sft.training.loss_spikes import LossSpikes
from sft.training.neftune import Neftune
from sft.training.nonfinite import NonfiniteGuard

Inputs = dict[str, Any]


class StepMonitor:
    """The sums of one optimizer step, its rows, the guard against numbers that are not finite, and the first checks.

    Args:
        model: as it is trained, with its adapter.
        device: of the sums.
        decode: token ids to text, for messages.
        evaluate: the sums of one batch in evaluation mode, on this rank alone.
        on_nonfinite, nonfinite_limit: see `sft.training.nonfinite.NonfiniteGuard`.
        from_scratch: whether the model's weights are random on purpose.
        noise_alpha: of NEFTune; 0 for none.
        seed, rank: of NEFTune's noise.
    """

    def __init__(
        self,
        model: Any,
        device: torch.device,
        decode: Callable[[Any], Any],
        evaluate: Callable[[Inputs], TokenLoss],
        *,
        on_nonfinite: Literal["stop", "skip"],
        nonfinite_limit: int,
        from_scratch: bool,
        noise_alpha: float,
        seed: int,
        rank: int,
    ) -> None:
        self.sums = TokenSums(device)
        self._rows: list[torch.Tensor] = []
        self._evaluate = evaluate
        self._neftune = Neftune(model, noise_alpha, seed, rank) if noise_alpha else None
        self._guard = NonfiniteGuard(
            on_nonfinite, nonfinite_limit, decode, lambda inputs: evaluate(dict(inputs)).objective
        )
        vocab_size = model.get_output_embeddings().weight.shape[0]
        self._checks = FirstStepChecks(model, vocab_size, from_scratch=from_scratch, noise_alpha=noise_alpha)
        self._spikes = LossSpikes()

    @property
    def skipped(self) -> int:
        """Steps that were left out so far."""
        return self._guard.skipped

    @skipped.setter
    def skipped(self, count: int) -> None:
        self._guard.skipped = count

    def counts(self) -> Any:
        """What the passes of the step so far have come to, for `put_back`."""
        return self.sums.copy(), list(self._rows), self._guard.passes

    def put_back(self, counts: Any) -> None:
        """Forgets the passes since `counts` were read: they are made again, in smaller pieces."""
        sums, rows, passes = counts
        self.sums.clear()
        self.sums.absorb(sums.copy())
        self._rows = list(rows)
        self._guard.forget(passes)
        if self._checks.is_open and not passes:
            self._checks.forget_first_pass()

    def measure_pass(self, inputs: Inputs, step: int, measure: Callable[[], TokenLoss]) -> TokenLoss:
        """One pass of the step that comes after `step` others; its sums count once the step is made."""
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
        """`loss`, whose backward makes every gradient NaN on all ranks where it is not finite."""
        return self._guard.watch(loss, inputs)

    def settle(self) -> None:
        """Says what is wrong with the step made last, if it was left out on the device.

        Raises:
            TrainingStopped: its loss or gradients are not finite, and the run is to end for it.
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
        """Whether the step may be made whose passes have been measured. The step before it must be settled.

        Args:
            norm: of its gradients, not clipped yet.
            norms: of each of them.
            made, left: optimizer steps of the run, before this one and from this one on.
            rates: learning rates of the step.
            skipping: an optimizer that leaves the step out itself, on the device
            (`sft.training.optim.factory.find_fused_adam`): it is
                told whether it must, and `settle` what that was.
            scaled: whether an fp16 scaler judges the gradients as well.

        Raises:
            TrainingStopped: a loss or gradient is not finite, and the run is to end for it.
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

    def spikes(self) -> list[str]:
        """Losses far above those before them since the last call, in words; reads the device."""
        return [str(spike) for spike in self._spikes.read()]
