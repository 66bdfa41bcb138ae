"""The launcher's command line, and the environment variables that become overrides."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest

from sft.errors import UserError
from sft.launch.options import ENVIRONMENT, environment_overrides, override_keys, parse_arguments
from sft.launch.plan import Plan
from tests.launch.conftest import Planner


@pytest.mark.parametrize(
    "words",
    [
        ["--learning_rate", "1e-5", "lora_config.r=4"],
        ["--", "--learning_rate", "1e-5", "lora_config.r=4"],
        ["--learning_rate", "1e-5", "--", "lora_config.r=4"],
    ],
)
def test_overrides_are_passed_on_as_typed(plan: Planner, words: list[str]) -> None:
    assert plan(*words).command == plan.command("--learning_rate", "1e-5", "lora_config.r=4")


def test_options_are_recognized_after_overrides(plan: Planner) -> None:
    result = plan("max_steps=3", "--nodes", "2", "--node-rank=1", "--master_addr", "h", "--bf16", "--master_port=7")
    assert result == Plan(plan.command("max_steps=3", "--bf16"), 1, 2, 1, "h", 7)
    assert not result.is_single_process


def test_options_are_not_abbreviated(config: Path) -> None:
    arguments = parse_arguments(["--config", str(config), "--node", "2"])
    assert arguments.nodes is None
    assert arguments.overrides == ("--node", "2")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "the following arguments are required: --config/--config_file"),
        (["--config"], "argument --config/--config_file: expected one argument"),
        (["--config", "c", "--gpus", "two"], "argument --gpus: invalid whole number, 0 or more, value: 'two'"),
        (["--config", "c", "--gpus", "-1"], "argument --gpus: invalid whole number, 0 or more, value: '-1'"),
        (["--config", "c", "--nodes", "0"], "argument --nodes: invalid whole number, 1 or more, value: '0'"),
    ],
)
def test_wrong_options_are_errors_of_the_user(words: list[str], message: str) -> None:
    with pytest.raises(UserError) as raised:
        parse_arguments(words)
    (problem,) = raised.value.problems
    assert (problem.file, problem.message) == ("command line", message)


def test_keys_are_recognized_in_each_spelling() -> None:
    words = ["--learning-rate", "1e-5", "--lora_config.r=32", "max_steps=1", "--bf16", "--run_name", "a=b"]
    assert override_keys(words) == {"learning_rate", "lora_config.r", "max_steps", "bf16", "run_name"}


def test_every_variable_becomes_its_override(plan: Planner) -> None:
    values = {
        "MODEL_NAME": "m",
        "TRAIN_FILE": "t.jsonl",
        "VAL_FILE": "v.jsonl",
        "OUTPUT_DIR": "o",
        "BATCH_SIZE": "2",
        "LEARNING_RATE": "1e-5",
        "EPOCHS": "3",
        "MAX_STEPS": "5",
        "LORA_RANK": "8",
        "LORA_ALPHA": "16",
    }
    assert values.keys() == ENVIRONMENT.keys()
    expected = (
        "model_name_or_path=m",
        "train_file=t.jsonl",
        "validation_file=v.jsonl",
        "output_dir=o",
        "per_device_train_batch_size=2",
        "learning_rate=1e-5",
        "num_train_epochs=3",
        "max_steps=5",
        "lora_config.r=8",
        "lora_config.lora_alpha=16",
    )
    assert plan(env=values).command == plan.command(*expected)


def test_an_empty_variable_is_ignored(plan: Planner) -> None:
    assert plan(env={"MODEL_NAME": "", "NPROC_PER_NODE": ""}) == Plan(plan.command())


def test_the_command_line_wins_over_the_environment_and_both_are_logged(caplog: pytest.LogCaptureFixture) -> None:
    env = {"MAX_STEPS": "5", "LORA_RANK": "8", "EPOCHS": "2"}
    with caplog.at_level(logging.INFO, logger="sft.launch"):
        assert environment_overrides(env, {"max_steps", "lora_config"}) == ["num_train_epochs=2"]
    assert caplog.messages == [
        "EPOCHS=2 from the environment sets num_train_epochs",
        "MAX_STEPS=5 from the environment is not used: the command line sets max_steps",
        "LORA_RANK=8 from the environment is not used: the command line sets lora_config.r",
    ]


def test_a_wrong_variable_is_an_error_of_the_config(plan: Planner) -> None:
    with pytest.raises(UserError, match=r"max_steps.*many"):
        plan(env={"MAX_STEPS": "many"})
