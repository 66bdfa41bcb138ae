"""Runs that must give the same numbers, compared by their loss curves: accumulation, processes, checkpointing."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

import sft_main
from tests.runs import arithmetic, log_history, losses, run, write_config, write_rows

STEPS = 20
Curve = Callable[..., list[float]]


@pytest.fixture(scope="module")
def config_file(tmp_path_factory: pytest.TempPathFactory, model_dir: Path) -> Path:
    """8 rows a step; 76 rows, so that the tenth step of each epoch has 4; 13 validation rows, which is odd."""
    folder = tmp_path_factory.mktemp("equivalence")
    return write_config(
        folder / "run.yaml",
        model_name_or_path=str(model_dir),
        train_file=str(write_rows(folder / "train.jsonl", arithmetic(76))),
        validation_file=str(write_rows(folder / "validation.jsonl", arithmetic(13, start=1000))),
        cache_dir=str(folder / "cache"),
        output_dir=str(folder / "out"),
        max_seq_length=128,
        per_device_train_batch_size=8,
        per_device_eval_batch_size=4,
        learning_rate=3e-3,
        max_steps=STEPS,
        logging_steps=1,
        save_strategy="no",
    )


@pytest.fixture(scope="module")
def reference(config_file: Path) -> Path:
    """The run in one process with all rows in one pass."""
    sft_main.main(["--config_file", str(config_file)])
    return config_file.parent / "out"


def trained(config_file: Path, name: str, *overrides: str) -> Path:
    output_dir = config_file.parent / name
    assert sft_main.main(["--config_file", str(config_file), f"output_dir={output_dir}", *overrides]) == 0
    return output_dir


def assert_same_run(one: Path, other: Path, tolerance: float = 1e-5) -> None:
    """The same losses, token counts and evaluation."""
    curves = losses(one), losses(other)
    assert len(curves[0]) == STEPS
    assert curves[0][-1] < 0.9 * curves[0][0], "nothing was learned, so that nothing was compared"
    assert np.abs(np.subtract(*curves)).mean() < tolerance
    assert [e["num_tokens"] for e in log_history(one)] == [e["num_tokens"] for e in log_history(other)]
    results = [json.loads((out / "logs" / "eval_results.json").read_text()) for out in (one, other)]
    assert results[0]["eval_tokens"] == results[1]["eval_tokens"]
    assert results[0]["eval_loss"] == pytest.approx(results[1]["eval_loss"], abs=tolerance)
    assert results[0]["eval_sequence_accuracy"] == results[1]["eval_sequence_accuracy"]


@pytest.mark.slow
@pytest.mark.parametrize(("batch", "accumulation"), [(4, 2), (1, 8)])
def test_accumulation_changes_nothing(config_file: Path, reference: Path, batch: int, accumulation: int) -> None:
    settings = [f"per_device_train_batch_size={batch}", f"gradient_accumulation_steps={accumulation}"]
    assert_same_run(reference, trained(config_file, f"accumulated_{batch}", *settings))


@pytest.mark.slow
def test_global_batch_size_is_the_same_as_accumulation(config_file: Path, reference: Path) -> None:
    settings = ["per_device_train_batch_size=2", "global_batch_size=8"]
    assert_same_run(reference, trained(config_file, "global", *settings))


@pytest.mark.slow
def test_gradient_checkpointing_changes_nothing(config_file: Path, reference: Path) -> None:
    assert_same_run(reference, trained(config_file, "checkpointed", "gradient_checkpointing=true"))


@pytest.mark.slow
def test_grouping_by_length_sees_the_same_rows(config_file: Path, reference: Path) -> None:
    grouped = trained(config_file, "grouped", "train_sampling_strategy=group_by_length")
    epoch_ends = [entry["num_tokens"] for entry in log_history(grouped)][9::10]
    assert epoch_ends == [entry["num_tokens"] for entry in log_history(reference)][9::10]


@pytest.mark.slow
def test_two_processes_equal_one_with_twice_the_batch(config_file: Path, reference: Path) -> None:
    output_dir = config_file.parent / "two"
    done = run("--config_file", config_file, f"output_dir={output_dir}", "per_device_train_batch_size=4", processes=2)
    assert done.returncode == 0, done.stderr[-3000:]
    assert_same_run(reference, output_dir)
    assert done.stderr.count("Batches:") == 1, "only the first process prints"


@pytest.mark.slow
def test_two_processes_with_an_adapter_and_accumulation_equal_one(config_file: Path) -> None:
    lora = ["lora_config.r=8", "learning_rate=1e-2"]
    one = trained(config_file, "lora_one", *lora)
    output_dir = config_file.parent / "lora_two"
    done = run(
        "--config_file",
        config_file,
        f"output_dir={output_dir}",
        *lora,
        "per_device_train_batch_size=2",
        "gradient_accumulation_steps=2",
        processes=2,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert_same_run(one, output_dir)


@pytest.mark.slow
def test_packed_rows_give_the_loss_of_lone_rows(config_file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The model's loss on the same rows, evaluated packed and padded, is the same: no document sees another."""
    out = trained(config_file, "short", "max_steps=2")
    results = []
    for packing in ("false", "bfd"):
        capsys.readouterr()
        arguments = ["--config_file", str(config_file), "--model", str(out), "--json", f"packing={packing}"]
        assert sft_main.main(["evaluate", *arguments]) == 0
        results.append(json.loads(capsys.readouterr().out))
    assert results[0]["eval_tokens"] == results[1]["eval_tokens"]
    assert results[0]["eval_loss"] == pytest.approx(results[1]["eval_loss"], abs=1e-6)
    assert results[0]["eval_sequence_accuracy"] == results[1]["eval_sequence_accuracy"]
