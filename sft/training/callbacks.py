"""What watches a training run: the epoch's row order, the log files, the console."""

from __future__ import annotations

import logging
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_utils import IntervalStrategy

from sft.data.loading.sampler import EpochSampler

logger = logging.getLogger("sft")


class FollowConfig(TrainerCallback):
    """Keeps the intervals of logging, evaluating and saving those of the config, also where a checkpoint has others.

    Steps behind the last interval of logging are logged when the run ends, as they are evaluated and saved.
    """

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """A resumed run's state comes from the checkpoint, with the intervals of the run that was stopped."""
        state.compute_steps(args, state.max_steps)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Before the last checkpoint, which is to hold the whole curve; the Trainer logs no step twice."""
        if state.global_step >= state.max_steps or control.should_training_stop:
            self._log_the_rest(args, control)

    def on_epoch_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """A stop that an evaluation asked for, or rows that ended before the steps did."""
        if control.should_training_stop:
            self._log_the_rest(args, control)

    @staticmethod
    def _log_the_rest(args: TrainingArguments, control: TrainerControl) -> None:
        if args.logging_strategy == IntervalStrategy.STEPS:
            control.should_log = True


class FollowEpoch(TrainerCallback):
    """Tells the sampler its epoch, also after a resume in mid-epoch, where the loader's wrappers do not reach it."""

    def __init__(self, sampler: EpochSampler) -> None:
        self._sampler = sampler

    def on_epoch_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Before the loader is iterated. `state.epoch` counts finished epochs, with a fraction after a resume."""
        self._sampler.set_epoch(int(state.epoch or 0))
