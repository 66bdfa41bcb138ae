"""`metrics.jsonl`: what a run writes, and what a resumed run keeps of it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from transformers import TrainerControl, TrainerState, TrainingArguments

from sft.report.metrics_file import MetricsFile


@pytest.mark.parametrize("cut", ['{"step": 4, "lo', "", "[4]", '{"loss": 1}'])
def test_a_resumed_run_drops_later_lines_and_those_it_cannot_read(
    cut: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    lines = [json.dumps({"step": step, "loss": 0.5}) for step in (1, 3, 4)]
    file = tmp_path / "metrics.jsonl"
    file.write_text("\n".join([*lines, cut]))
    with caplog.at_level("WARNING", logger="sft"):
        MetricsFile(tmp_path).on_train_begin(
            TrainingArguments(str(tmp_path), use_cpu=True), TrainerState(global_step=3), TrainerControl()
        )
    assert file.read_text().splitlines() == lines[:2]
    assert ("1 unreadable lines" in caplog.text) is bool(cut)


def test_every_log_is_a_line_of_json_with_its_step(tmp_path: Path) -> None:
    args = TrainingArguments(str(tmp_path), use_cpu=True)
    (tmp_path / "metrics.jsonl").write_text('{"step": 9}\n')
    state, metrics_file = TrainerState(), MetricsFile(tmp_path)
    metrics_file.on_train_begin(args, state, TrainerControl())
    state.global_step = 2
    metrics_file.on_log(args, state, TrainerControl(), logs={"loss": float("nan"), "epoch": 0.5})
    (line,) = map(json.loads, (tmp_path / "metrics.jsonl").read_text().splitlines())
    assert line.pop("time") > 0
    assert line == {"step": 2, "loss": "nan", "epoch": 0.5}
