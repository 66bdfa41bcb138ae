"""When a run logs, and what it keeps of an earlier run's logs."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from transformers import TrainerControl, TrainerState, TrainingArguments

from sft.report.metrics_file import METRICS_FILE, MetricsFile
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


@pytest.mark.parametrize("cut", ['{"step": 4, "lo', "", "[4]", '{"loss": 1}'])
def test_a_resumed_run_drops_later_lines_and_those_it_cannot_read(
    cut: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    lines = [json.dumps({"step": step, "loss": 0.5}) for step in (1, 3, 4)]
    file = tmp_path / METRICS_FILE
    file.write_text("\n".join([*lines, cut]))
    with caplog.at_level("WARNING", logger="sft"):
        MetricsFile(tmp_path).on_train_begin(
            TrainingArguments(str(tmp_path), use_cpu=True), TrainerState(global_step=3), TrainerControl()
        )
    assert file.read_text().splitlines() == lines[:2]
    assert ("1 unreadable lines" in caplog.text) is bool(cut)
