"""When a run logs."""

from __future__ import annotations

from pathlib import Path

import pytest
from transformers import TrainerControl, TrainerState, TrainingArguments

from sft.training.callbacks import FollowConfig


@pytest.mark.parametrize(
    ("step", "stops", "strategy", "logs"),
    [(4, False, "steps", False), (4, True, "steps", True), (5, False, "steps", True), (5, True, "no", False)],
)
def test_a_run_that_ends_logs_its_last_steps(step: int, stops: bool, strategy: str, logs: bool, tmp_path: Path) -> None:
    """Also where an evaluation ended it, behind the step's own chance to log."""
    args = TrainingArguments(str(tmp_path), logging_strategy=strategy, use_cpu=True)
    state = TrainerState(global_step=step, max_steps=5)
    control = TrainerControl(should_training_stop=stops)
    FollowConfig().on_step_end(args, state, control)
    assert control.should_log is logs
    control = TrainerControl(should_training_stop=stops or step == 5)
    FollowConfig().on_epoch_end(args, state, control)
    assert control.should_log is logs
