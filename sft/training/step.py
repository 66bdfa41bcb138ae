"""An optimizer step: its passes, the judgement over its gradients, their clipping, and hearing how it went."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from torch.nn.parallel import DistributedDataParallel
from transformers import Trainer

from sft.checkpoint.stream_state import StreamProgress
from sft.data.streaming.stream import STEP
from sft.distributed.gradient_reducer import GradientReducer
from sft.errors import TrainingStopped
from sft.loss.metrics import TokenSums
from sft.loss.token_loss import Objective, TokenLoss
from sft.model.compile import CompileSettings
from sft.training.oom_retry import OomRetry
from sft.training.optim.factory import find_fused_adam, with_master_weights
from sft.training.optim.grad_norm import clip_factor, clip_gradients, gradient_norms, total_norm
from sft.training.optim.master_weights import MasterWeights
from sft.training.optim.resume import PEAK, ConfiguredOptimizer
from sft.training.optim.split_master_weights import find_summed_weights
from sft.training.split_batch import split_batch
from sft.training.step_monitor import StepMonitor


@dataclass(frozen=True, slots=True)
class StepSettings:
    """How an optimizer step is made.

    Attributes:
        objective: what is minimised; evaluation measures the plain cross entropy.
        loss_chunk_size: trained tokens whose logits are held at a time; None is chosen for the machine.
        dtype: of the weights at rest, noted in checkpoints.
        master_weights: whether the optimizer keeps float32 values of bfloat16 weights.
        on_nonfinite, nonfinite_limit: see `sft.training.nonfinite.NonfiniteGuard`.
        from_scratch: whether the model's weights are random on purpose.
        compiling: how the decoder layers are compiled; None is not at all.
        shrinks: whether a step that runs out of memory is made again in smaller passes, by the rank that ran out of
            it; the ranks then add up their gradients behind the last pass of a step and not during it.
    """

    objective: Objective = field(default_factory=Objective)
    loss_chunk_size: int | None = None
    dtype: str | None = None
    master_weights: bool = False
    on_nonfinite: Literal["stop", "skip"] = "stop"
    nonfinite_limit: int = 10
    from_scratch: bool = False
    compiling: CompileSettings | None = None
    shrinks: bool = False


class GuardedStep(Trainer):
    """The stepping half of the Trainer; the other half says what a pass adds up to.

    Attributes:
        progress: of the stream of training rows, where they are one.
    """

    progress: StreamProgress | None = None
    _masters: MasterWeights | None = None
    _shrinking: OomRetry | None = None
    _reducer: GradientReducer | None = None
    _settled_at: tuple[int, float] = (0, 0.0)  # steps and epochs before the step asked for last

    def _guard_steps(
        self,
        model: torch.nn.Module,
        settings: StepSettings,
        total_steps: int,
        noise_alpha: float,
        measure_evaluating: Callable[[dict[str, Any]], TokenLoss],
    ) -> None:
        """Makes ready what watches the steps of a run of `total_steps`."""
        self._settings = settings
        self._total_steps = total_steps
        self._sums = TokenSums(self.args.device)
        tokenizer: Any = self.processing_class
        self._watch = StepMonitor(
            model,
            self.args.device,
            tokenizer.decode,
            measure_evaluating,
            on_nonfinite=settings.on_nonfinite,
            nonfinite_limit=settings.nonfinite_limit,
            from_scratch=settings.from_scratch,
            noise_alpha=noise_alpha,
            seed=self.args.seed,
            rank=self.args.process_index,
        )
        if settings.shrinks:
            self._shrinking = OomRetry(split_batch, model.zero_grad, self._watch.counts, self._watch.put_back)
            if self.args.world_size > 1:
                self._reducer = GradientReducer([p for p in model.parameters() if p.requires_grad])

    def training_step(
        self,
        model: torch.nn.Module,
        inputs: dict[str, Any],
        num_items_in_batch: torch.Tensor | int | None = None,
    ) -> torch.Tensor:
        """Notes where a stream stands behind the batch, then trains on it."""
        if self.progress:
            self.progress.consume(inputs.pop(STEP))
        masters, is_last = self._masters, self.accelerator.sync_gradients
        make = super().training_step
        if self._shrinking is None:
            with masters.reducing(model, is_last) if masters else nullcontext():
                loss = make(model, inputs, num_items_in_batch)
        else:
            # Not through DDP: a pass that talks to other ranks could not be made again by one of them.
            alone = model.module if isinstance(model, DistributedDataParallel) else model
            loss = self._shrinking.run(inputs, lambda piece: make(alone, piece, num_items_in_batch))
            if self._reducer and is_last:
                self._reducer.begin(None)
                self._reducer.finish()
        # The Trainer adds these up for a summary of its own; of those that are not finite the guard knows already.
        return loss.nan_to_num(nan=0.0, posinf=0.0, neginf=0.0)

    def create_optimizer(self, model: torch.nn.Module | None = None) -> torch.optim.Optimizer:
        """The Trainer's optimizer, over float32 values of bfloat16 weights where the run keeps them."""
        if self.optimizer is None:
            super().create_optimizer(model)
            assert self.optimizer is not None
            if self._settings.master_weights:
                self.optimizer = self._masters = with_master_weights(self.optimizer, self._summed())
            for group in self.optimizer.param_groups:
                group.setdefault(PEAK, group["lr"])  # as most schedules do, so that each checkpoint tells it
        return self.optimizer  # type: ignore[return-value]

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        """Loads their states; their settings are the config's (see `sft.training.optim.resume`)."""
        if checkpoint is None:
            return
        assert self.optimizer is not None
        configured = ConfiguredOptimizer.of(self.optimizer)
        super()._load_optimizer_and_scheduler(checkpoint)
        configured.restore(self.optimizer, self.lr_scheduler, Path(checkpoint).name)

    def _summed(self) -> list[torch.nn.Parameter] | None:
        """Of a step that is one pass, the weights whose gradients are sums all the same; None for other steps."""
        if self.args.gradient_accumulation_steps > 1 or self.args.world_size > 1 or self._shrinking:
            return None
        return find_summed_weights(self.model)

    def _clip_grad_norm(self, model: torch.nn.Module) -> None:
        """Waits for `_get_grad_norm`, which comes next: gradients are judged before they are scaled."""

    def _get_grad_norm(self, model: torch.nn.Module, grad_norm: Any = None) -> torch.Tensor:
        """Judges the step, then clips its gradients; their norm is the step's before clipping.

        What the passes of a step add up to counts only once the step is made. Where the optimizer can leave a step
        out itself nothing is read from the device here but how the step before this one went, which is known by now.
        """
        if self._shrinking:
            self._shrinking.begin()  # the passes of this step are made, the next one is another step's
        self._settle()
        self._settled_at = self.state.global_step, self.state.epoch
        is_scaled = self.accelerator.scaler is not None
        self.accelerator.unscale_gradients()
        assert isinstance(self.model, torch.nn.Module)
        assert self.optimizer is not None
        norms = gradient_norms(self.model.named_parameters())
        norm = total_norm(norms.values())
        if self._watch.should_step(
            norm,
            norms,
            made=self.state.global_step,
            left=self._total_steps - self.state.global_step,
            rates=[group["lr"] for group in self.optimizer.param_groups],
            skipping=None if is_scaled else find_fused_adam(self.optimizer),
            scaled=is_scaled,
        ):
            self._sums.absorb(self._watch.sums)
            if self.args.max_grad_norm > 0:
                if self._masters:
                    self._masters.scale_gradients(clip_factor(self.args.max_grad_norm, norm))
                else:
                    clip_gradients(model.parameters(), self.args.max_grad_norm, norm)
        else:
            model.zero_grad()  # so that the optimizer moves nothing
        return norm

    def _settle(self) -> None:
        """Hears how the step made last went, before anything is built on it; every rank must call it.

        Raises:
            TrainingStopped: it was not made, and the run ends at the step before it.
        """
        try:
            self._watch.settle()
        except TrainingStopped:
            self.state.global_step, self.state.epoch = self._settled_at
            raise

    def _maybe_log_save_evaluate(self, *args: Any, **kwargs: Any) -> None:
        control = self.control
        if control.should_log or control.should_evaluate or control.should_save or control.should_training_stop:
            self._settle()
        super()._maybe_log_save_evaluate(*args, **kwargs)
