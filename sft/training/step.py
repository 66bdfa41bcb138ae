"""Makes an optimizer step: its micro-batches, the check of their gradients, clipping, and float32 master weights."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import torch
from torch.nn.parallel import DistributedDataParallel
from transformers import TrainerState, TrainingArguments

from sft.distributed.gradient_reducer import GradientReducer
from sft.errors import TrainingStopped
from sft.loss.metrics import TokenSums
from sft.loss.token_loss import TokenLoss
from sft.training.arguments import StepSettings
from sft.training.oom_retry import OomRetry
from sft.training.optim.factory import find_fused_adam, with_master_weights
from sft.training.optim.grad_norm import clip_factor, clip_gradients, gradient_norms, total_norm
from sft.training.optim.master_weights import MasterWeights
from sft.training.optim.resumed_settings import PEAK
from sft.training.optim.split_master_weights import find_summed_weights
from sft.training.split_batch import split_batch
from sft.training.step_monitor import StepMonitor


class OptimizerStep:
    """The optimizer steps of a run, one after another.

    Args:
        model: the trained model, not wrapped by DDP.
        args: of the Trainer.
        settings: how a step is made.
        total_steps: optimizer steps of the whole run.
        decode, measure: as for `StepMonitor`.

    Attributes:
        monitor: checks each step.
        sums: over the steps made since they were last read.
    """

    def __init__(
        self,
        model: torch.nn.Module,
        args: TrainingArguments,
        settings: StepSettings,
        total_steps: int,
        decode: Callable[[Any], Any],
        measure: Callable[[dict[str, Any]], TokenLoss],
    ) -> None:
        self._model, self._args, self._settings, self._total_steps = model, args, settings, total_steps
        self.monitor = StepMonitor(model, args, settings, decode, measure)
        self.sums = TokenSums(args.device)
        self._masters: MasterWeights | None = None
        self._retry: OomRetry | None = None
        self._reducer: GradientReducer | None = None
        self._before = (0, 0.0)  # steps and epochs before the latest step
        if settings.retries_oom:
            self._retry = OomRetry(split_batch, model.zero_grad, self.monitor.snapshot, self.monitor.restore)
            if args.world_size > 1:
                self._reducer = GradientReducer([p for p in model.parameters() if p.requires_grad])

    def run_micro_batch(
        self,
        model: torch.nn.Module,
        inputs: dict[str, Any],
        is_last: bool,
        run: Callable[[torch.nn.Module, dict[str, Any]], torch.Tensor],
    ) -> torch.Tensor:
        """Runs one micro-batch of the step.

        Args:
            model: as the Trainer has wrapped it.
            is_last: whether it is the last micro-batch of the step, after which the gradients are complete.
            run: forward and backward; returns the loss, a scalar without graph.
        """
        if self._retry is None:
            with self._masters.reducer.in_place_of_ddp(model, is_last) if self._masters else nullcontext():
                return run(model, inputs)
        # Not through DDP: a rank could not repeat a micro-batch that talks to other ranks.
        alone = model.module if isinstance(model, DistributedDataParallel) else model
        loss = self._retry.run(inputs, lambda piece: run(alone, piece))
        if self._reducer and is_last:
            self._reducer.begin(None)
            self._reducer.finish()
        return loss

    def wrap_optimizer(self, optimizer: torch.optim.Optimizer) -> torch.optim.Optimizer:
        """Returns the optimizer, over float32 values of bfloat16 weights where the run keeps them."""
        if self._settings.master_weights:
            # A step of one micro-batch sums the gradients of few weights, any other step those of all.
            adds = self._args.gradient_accumulation_steps > 1 or self._args.world_size > 1 or self._retry
            summed = None if adds else find_summed_weights(self._model)
            optimizer = self._masters = with_master_weights(optimizer, summed)
        for group in optimizer.param_groups:
            group.setdefault(PEAK, group["lr"])  # as most schedules do; each checkpoint then holds it
        return optimizer

    def check_and_clip(self, optimizer: torch.optim.Optimizer, state: TrainerState, *, scaled: bool) -> torch.Tensor:
        """Decides whether the step is made, then clips its gradients; returns their norm before clipping, a scalar.

        The sums of the step's micro-batches count only if the step is made. Where the optimizer can skip a step on the
        device, nothing is read from the device here but the outcome of the previous step, which is known by now.

        Args:
            state: of the Trainer.
            scaled: whether an fp16 scaler is used; the gradients are unscaled already.

        Raises:
            TrainingStopped: this step or the one before it is not finite, and the run has to stop.
        """
        if self._retry:
            self._retry.begin()  # the next micro-batch belongs to the next step
        self.check_previous(state)
        self._before = state.global_step, state.epoch
        norms = gradient_norms(self._model.named_parameters())
        norm = total_norm(norms.values())
        if not self.monitor.should_step(
            norm,
            norms,
            made=state.global_step,
            left=self._total_steps - state.global_step,
            rates=[group["lr"] for group in optimizer.param_groups],
            skipping=None if scaled else find_fused_adam(optimizer),
            scaled=scaled,
        ):
            self._model.zero_grad()  # the optimizer then moves nothing
            return norm
        self.sums.absorb(self.monitor.sums)
        max_norm = self._args.max_grad_norm
        if max_norm > 0 and self._masters:
            self._masters.scale_gradients(clip_factor(max_norm, norm))
        elif max_norm > 0:
            clip_gradients(self._model.parameters(), max_norm, norm)
        return norm

    def check_previous(self, state: TrainerState) -> None:
        """Reads how the previous step went, before anything is built on it. Every rank must call it.

        Raises:
            TrainingStopped: it was not made, and the run ends at the step before it.
        """
        try:
            self.monitor.check_previous_step()
        except TrainingStopped:
            state.global_step, state.epoch = self._before
            raise
