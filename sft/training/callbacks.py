"""Callbacks of the training loop: the config's intervals after a resume, and the sampler's epoch."""

from __future__ import annotations

from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_utils import IntervalStrategy

from sft.data.loading.sampler import EpochSampler


class FollowConfig(TrainerCallback):
    """Logs, evaluates and saves at the config's intervals, even if a checkpoint was saved with others.

    Steps after the last logging interval are logged when the run ends, as they are evaluated and saved.
    """

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Sets the intervals: the state of a resumed run comes from its checkpoint."""
        state.compute_steps(args, state.max_steps)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Logs before the last checkpoint, which has to hold the whole curve; upstream logs no step twice."""
        if state.global_step >= state.max_steps or control.should_training_stop:
            self._log_remaining(args, control)

    def on_epoch_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Logs if an evaluation stops the run, or the rows end before the steps."""
        if control.should_training_stop:
            self._log_remaining(args, control)

    @staticmethod
    def _log_remaining(args: TrainingArguments, control: TrainerControl) -> None:
        if args.logging_strategy == IntervalStrategy.STEPS:
            control.should_log = True


class FollowEpoch(TrainerCallback):
    """Tells the sampler its epoch; after a resume in mid-epoch the data loader's wrappers do not."""

    def __init__(self, sampler: EpochSampler) -> None:
        self._sampler = sampler

    def on_epoch_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Runs before the loader is iterated. `state.epoch` counts finished epochs, with a fraction after a resume."""
        self._sampler.set_epoch(int(state.epoch or 0))
