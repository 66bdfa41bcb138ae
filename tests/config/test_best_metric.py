"""The metrics of an evaluation, whether a higher value of each is better, and which checkpoint a run ends with."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

import sft_main
from sft.config.best_metric import greater_is_better, list_metrics
from sft.config.loading import load_config
from sft.errors import UserError
from sft.training.arguments import training_arguments
from tests.runs import arithmetic, write_config, write_rows

VALIDATION = "eval_strategy: steps\nvalidation_split: 0.1\n"
TWO_SETS = "eval_strategy: steps\neval_datasets: [{path: a/easy.jsonl}, {path: b.jsonl, name: sums}]\n"


@pytest.mark.parametrize(
    ("metric", "greater"),
    [
        ("loss", False),
        ("eval_loss", False),
        ("perplexity", False),
        ("eval_sums_perplexity", False),
        ("entropy", False),
        ("token_accuracy", True),
        ("eval_sums_sequence_accuracy", True),
    ],
)
@pytest.mark.parametrize(
    "keys", [{"load_best_model_at_end": True}, {"save_strategy": "best"}, {"lr_scheduler_type": "reduce_lr_on_plateau"}]
)
def test_the_metric_decides_whether_greater_is_better(
    tmp_path: Path, keys: dict[str, Any], metric: str, greater: bool
) -> None:
    common = {"output_dir": str(tmp_path), "eval_strategy": "steps", "eval_steps": 1, "save_steps": 1}
    given = {**common, **keys, "metric_for_best_model": metric}
    assert greater_is_better(metric) is greater
    arguments = training_arguments(given, bf16=False, fp16=False, plan=None)
    assert (arguments.metric_for_best_model, arguments.greater_is_better) == (metric, greater)
    asked = training_arguments({**given, "greater_is_better": not greater}, bf16=False, fp16=False, plan=None)
    assert asked.greater_is_better is not greater, "the user decides"


def test_without_a_metric_the_lowest_loss_is_best(tmp_path: Path) -> None:
    given = {"output_dir": str(tmp_path), "eval_strategy": "steps", "save_strategy": "best"}
    arguments = training_arguments(given, bf16=False, fp16=False, plan=None)
    assert (arguments.metric_for_best_model, arguments.greater_is_better) == ("loss", False)


@pytest.mark.parametrize("schedule", ["reduce_lr_on_plateau", "greedy"])
@pytest.mark.parametrize(("metric", "mode"), [("perplexity", "min"), ("token_accuracy", "max")])
@pytest.mark.parametrize("settings", [{"patience": 2}, '{"patience": 2}'])
def test_a_schedule_that_follows_a_metric_gets_its_mode(
    tmp_path: Path, schedule: str, metric: str, mode: str, settings: Any
) -> None:
    given = {"output_dir": str(tmp_path), "eval_strategy": "steps", "lr_scheduler_type": schedule}
    given |= {"metric_for_best_model": metric, "lr_scheduler_kwargs": settings}
    arguments = training_arguments(given, bf16=False, fp16=False, plan=None)
    assert arguments.lr_scheduler_kwargs == {"mode": mode, "patience": 2}


# Which metrics there are


def refusals(tmp_path: Path, text: str) -> list[tuple[str | None, str, str]]:
    (tmp_path / "run.yaml").write_text(text)
    try:
        load_config(tmp_path / "run.yaml")
    except UserError as error:
        return [(problem.key, problem.message, problem.hint) for problem in error.problems]
    return []


@pytest.mark.parametrize(
    "text",
    [
        VALIDATION + "metric_for_best_model: eval_perplexity",
        VALIDATION + "metric_for_best_model: sequence_accuracy",
        VALIDATION + "metric_for_best_model: entropy\nlog_entropy: true",
        TWO_SETS + "metric_for_best_model: eval_sums_loss",
        TWO_SETS + "metric_for_best_model: easy_token_accuracy",
        TWO_SETS + "metric_for_best_model: loss",
    ],
)
def test_a_metric_that_evaluations_have_is_accepted(tmp_path: Path, text: str) -> None:
    assert refusals(tmp_path, text) == []


@pytest.mark.parametrize(
    ("text", "metric"),
    [
        (VALIDATION + "metric_for_best_model: bleu", "bleu"),
        (VALIDATION + "metric_for_best_model: entropy", "entropy"),
        (VALIDATION + "metric_for_best_model: eval_runtime", "eval_runtime"),
        (VALIDATION + "metric_for_best_model: validation_loss", "validation_loss"),
        (TWO_SETS + "metric_for_best_model: other_loss", "other_loss"),
        (TWO_SETS.replace(", {path: b.jsonl, name: sums}", "") + "metric_for_best_model: easy_loss", "easy_loss"),
    ],
)
def test_a_metric_that_no_evaluation_has_is_refused_and_the_others_are_listed(
    tmp_path: Path, text: str, metric: str
) -> None:
    ((key, message, hint),) = refusals(tmp_path, text)
    assert key == "metric_for_best_model"
    assert message == f"no evaluation of this run has a metric {metric!r}"
    assert hint.startswith("There are loss, perplexity, token_accuracy, sequence_accuracy")
    assert ("sums_perplexity" in hint) is ("sums" in text)


def test_saving_the_best_needs_evaluation(tmp_path: Path) -> None:
    refused = refusals(tmp_path, "save_strategy: best\nvalidation_split: 0.1")
    assert refused == [("save_strategy", "best needs evaluation", "Write eval_strategy: steps or epoch.")]


# A run


def test_a_run_ends_with_the_lowest_perplexity_and_has_logged_every_metric(tmp_path: Path, model_dir: Path) -> None:
    config_file = write_config(
        tmp_path / "run.yaml",
        model_name_or_path=str(model_dir),
        dtype="float32",
        train_file=str(write_rows(tmp_path / "train.jsonl", arithmetic(24))),
        eval_datasets=[
            {"path": str(write_rows(tmp_path / "easy.jsonl", arithmetic(3, start=10)))},
            {"path": str(write_rows(tmp_path / "b.jsonl", arithmetic(4, start=50))), "name": "sums"},
        ],
        cache_dir=str(tmp_path / "cache"),
        output_dir=str(tmp_path / "out"),
        max_seq_length=128,
        per_device_train_batch_size=8,
        learning_rate=1e-2,
        max_steps=3,
        eval_strategy="steps",
        eval_steps=1,
        save_steps=1,
        log_entropy=True,
        load_best_model_at_end=True,
        metric_for_best_model="sums_perplexity",
    )
    assert sft_main.main(["--config_file", str(config_file)]) == 0
    state = json.loads((tmp_path / "out" / "trainer_state.json").read_text())
    logged: dict[str, list[float]] = {}
    for entry in state["log_history"]:
        for name, value in entry.items():
            logged.setdefault(name, []).append(value)
    perplexities = logged["eval_sums_perplexity"][:3]
    assert perplexities[2] < perplexities[0], "the run must learn, or its last checkpoint is its worst"
    best = perplexities.index(min(perplexities)) + 1
    assert state["best_metric"] == min(perplexities)
    assert Path(state["best_model_checkpoint"]).name == f"checkpoint-{best}"
    assert {f"eval_{name}" for name in list_metrics(load_config(config_file))} <= logged.keys()
