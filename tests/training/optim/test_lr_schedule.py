"""Learning rate schedules are checked before the run: no setting is ignored, and none fails in mid-run."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from sft.config.schema import Config, TrainingKeys
from sft.config.upstream_schema import facts
from sft.config.validation import find_broken_rules
from sft.errors import Problem, UserError
from sft.training.optim.lr_schedule import require_schedule
from tests.runs import arithmetic, refused_before_data, write_config, write_rows

NEEDED: dict[str, dict[str, Any]] = {
    "cosine_with_min_lr": {"min_lr": 1e-6},
    "cosine_warmup_with_min_lr": {"min_lr_rate": 0.1},
    "warmup_stable_decay": {"num_decay_steps": 3},
}


def refusal(schedule: str, settings: Any = None, **keys: Any) -> Problem | None:
    """What stops a run with this schedule and these `lr_scheduler_kwargs`."""
    given = {"lr_scheduler_type": schedule, **({} if settings is None else {"lr_scheduler_kwargs": settings}), **keys}
    try:
        require_schedule(TrainingKeys(**given))
    except UserError as error:
        (problem,) = error.problems
        return problem
    return None


def dropped(schedule: str, **keys: Any) -> list[tuple[str | None, str]]:
    config = Config(**{"lr_scheduler_type": schedule, "validation_split": 0.1, "eval_strategy": "steps", **keys})
    return [(problem.key, problem.message) for problem in find_broken_rules(config)]


@pytest.mark.parametrize("schedule", facts()["TrainingArguments"]["lr_scheduler_type"]["choices"])
def test_every_schedule_runs_with_what_it_needs_and_no_more(schedule: str) -> None:
    needed = NEEDED.get(schedule)
    assert refusal(schedule, needed) is None
    assert (refusal(schedule) is None) == (needed is None)
    if needed:
        assert refusal(schedule, json.dumps(needed)) is None
        assert refusal(schedule, needed, max_steps=5, warmup_ratio=0.2) is None


def test_a_missing_setting_is_reported_for_the_schedule() -> None:
    problem = refusal("cosine_with_min_lr")
    assert problem is not None
    assert problem.key == "lr_scheduler_type"
    assert problem.message.startswith("cosine_with_min_lr: One of min_lr or min_lr_rate should be set")
    assert problem.hint == "Its settings, in lr_scheduler_kwargs, are num_cycles, min_lr, min_lr_rate."
    problem = refusal("warmup_stable_decay")
    assert problem is not None
    assert "missing 1 required positional argument: 'num_decay_steps'" in problem.message


@pytest.mark.parametrize(
    ("schedule", "settings", "told"),
    [
        ("cosine", {"num_cycle": 2}, "cosine: got an unexpected keyword argument 'num_cycle'"),
        ("linear", {"num_cycles": 2}, "linear: got an unexpected keyword argument 'num_cycles'"),
        ("greedy", {"patiens": 2}, "got an unexpected keyword argument 'patiens'"),
        ("reduce_lr_on_plateau", {"factor": 2.0}, "reduce_lr_on_plateau: Factor should be < 1.0"),
        ("reduce_lr_on_plateau", {"patience": "two"}, "not supported between instances of 'int' and 'str'"),
        ("cosine", {"num_cycles": "two"}, "could not convert string to float: 'two'"),  # computed only after the warmup
        ("polynomial", {"lr_end": 0.5}, "lr_end (0.5) must be smaller than initial lr"),
        ("cosine", "{num_cycles: 2}", "Expecting property name"),
        ("cosine", "[2]", "expected a mapping of settings"),
    ],
)
def test_an_invalid_setting_is_reported_for_the_settings(schedule: str, settings: Any, told: str) -> None:
    problem = refusal(schedule, settings, warmup_steps=0 if "lr" in schedule else 10)
    assert problem is not None
    assert problem.key == "lr_scheduler_kwargs"
    assert told in problem.message
    assert problem.hint.startswith("Its settings, in lr_scheduler_kwargs, are ")


@pytest.mark.parametrize("key", ["warmup_ratio", "warmup_steps"])
@pytest.mark.parametrize("schedule", facts()["TrainingArguments"]["lr_scheduler_type"]["choices"])
def test_a_warmup_for_a_schedule_without_one_is_an_error(schedule: str, key: str) -> None:
    without = schedule in ("constant", "reduce_lr_on_plateau", "greedy")
    told = [(key, f"lr_scheduler_type: {schedule} has no warmup")] if without else []
    assert dropped(schedule, **{key: 0.1}) == told
    assert dropped(schedule, **{key: 0}) == []


@pytest.mark.parametrize("schedule", ["constant", "constant_with_warmup"])
def test_settings_that_would_be_ignored_are_an_error(schedule: str) -> None:
    told = [("lr_scheduler_kwargs", f"lr_scheduler_type: {schedule} has no further settings")]
    assert dropped(schedule, lr_scheduler_kwargs={"num_cycles": 2}) == told
    assert dropped(schedule, lr_scheduler_kwargs={}) == []


def test_check_and_train_report_it_before_the_data_is_read(
    tmp_path: Path, model_dir: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    config_file = write_config(
        tmp_path / "run.yaml",
        model_name_or_path=str(model_dir),
        train_file=str(write_rows(tmp_path / "train.jsonl", arithmetic(4))),
        cache_dir=str(tmp_path / "cache"),
        output_dir=str(tmp_path / "out"),
        lr_scheduler_type="cosine_with_min_lr",
    )
    told, (said,) = refused_before_data(config_file, monkeypatch, capsys)
    assert (told["key"], told["line"]) == ("lr_scheduler_type", 5)
    assert "min_lr or min_lr_rate should be set" in said
    assert not (tmp_path / "out").exists()
