"""What a run reports is what its model does: evaluation, the best checkpoint, smoothing, noise, half precision."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import sft_main
from tests.by_hand import Measured, measure, model_in, rows_of
from tests.runs import arithmetic, log_history, losses, run, write_config, write_rows
from trainer_utils import SFTTrainer

WORKERS = ["dataloader_num_workers=1", "dataloader_persistent_workers=true"]


def easy(count: int, start: int = 0) -> list[dict[str, str]]:
    """Questions that all have one answer."""
    return [{"question": f"Is {n} a number?", "answer": "Yes."} for n in range(start, start + count)]


@pytest.fixture(scope="module")
def config_file(tmp_path_factory: pytest.TempPathFactory, model_dir: Path) -> Path:
    """32 rows in one step; evaluation sets of 5 and 13 rows, which no number of processes and rows of a pass divides.

    The answer `Yes.` is learned in a few steps, those to the sums are not: accuracies lie between 0 and 1.
    """
    folder = tmp_path_factory.mktemp("trainer")
    write_rows(folder / "train.jsonl", [*easy(16), *arithmetic(16)])
    write_rows(folder / "easy.jsonl", easy(5, start=16))
    write_rows(folder / "sums.jsonl", arithmetic(13, start=1000))
    return write_config(
        folder / "run.yaml",
        model_name_or_path=str(model_dir),
        dtype="float32",
        train_file=str(folder / "train.jsonl"),
        eval_datasets=[{"path": str(folder / f"{name}.jsonl"), "name": name} for name in ("easy", "sums")],
        cache_dir=str(folder / "cache"),
        max_seq_length=128,
        per_device_train_batch_size=32,
        per_device_eval_batch_size=2,
        learning_rate=1e-2,
        lr_scheduler_type="constant",
        max_steps=20,
        logging_steps=1,
        eval_strategy="steps",
        eval_steps=10,
        save_strategy="no",
    )


def trained(config_file: Path, name: str, *overrides: str) -> Path:
    output_dir = config_file.parent / name
    assert sft_main.main(["--config_file", str(config_file), f"output_dir={output_dir}", *overrides]) == 0
    return output_dir


def evaluation_logs(out: Path) -> dict[int, dict[str, Any]]:
    """All that evaluation logged, by step; of the last step what came first, before the best model was measured."""
    steps: dict[int, dict[str, Any]] = {}
    for entry in json.loads((out / "trainer_state.json").read_text())["log_history"]:
        if any(name.startswith("eval_") for name in entry):
            steps[entry["step"]] = entry | steps.get(entry["step"], {})
    return steps


def results(out: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((out / "logs" / "eval_results.json").read_text())
    return found


def expected(measured: Measured, prefix: str) -> dict[str, Any]:
    """The metrics of one evaluation set under `prefix`."""
    metrics = {
        "loss": measured.loss(),
        "perplexity": math.exp(measured.loss()),
        "token_accuracy": measured.token_accuracy(),
        "sequence_accuracy": measured.sequence_accuracy(),
    }
    approximate: dict[str, Any] = {
        f"{prefix}_{name}": pytest.approx(value, rel=1e-6) for name, value in metrics.items()
    }
    return {**approximate, f"{prefix}_tokens": measured.tokens}


def assert_evaluated(out: Path) -> None:
    """The last evaluation of the run, and its results, are those of the saved model on every row once."""
    model = model_in(out)
    sets = {name: measure(model, rows) for name, rows in rows_of(out).evals.items()}
    together = sets["easy"] + sets["sums"]
    assert (sets["easy"].answers, sets["sums"].answers) == (5, 13)
    assert 0 < together.answers_correct < together.answers, "an accuracy of 0 or 1 says nothing about its weights"
    assert abs(together.loss() - (sets["easy"].loss() + sets["sums"].loss()) / 2) > 1e-3, "nor do equal losses"

    logged = evaluation_logs(out)
    assert sorted(logged) == [10, 20]
    assert logged[10]["eval_loss"] > 1.05 * logged[20]["eval_loss"], "both evaluations saw the same model"
    wanted = {
        **expected(together, "eval"),
        **expected(sets["easy"], "eval_easy"),
        **expected(sets["sums"], "eval_sums"),
    }
    assert {name: logged[20][name] for name in wanted} == wanted
    each = {name: expected(measured, "eval") for name, measured in sets.items()}
    assert results(out) == {**expected(together, "eval"), "datasets": each}


@pytest.fixture(scope="module")
def plain_run(config_file: Path) -> Path:
    """The run as the config has it."""
    return trained(config_file, "plain")


def test_each_evaluation_set_is_measured_row_by_row_and_all_together_by_their_tokens(plain_run: Path) -> None:
    assert_evaluated(plain_run)


@pytest.mark.slow
def test_loading_in_processes_that_stay_changes_no_number(config_file: Path, plain_run: Path) -> None:
    out = trained(config_file, "workers", *WORKERS)
    assert losses(out) == losses(plain_run)
    assert_evaluated(out)


def test_rows_that_training_drops_are_measured_all_the_same(config_file: Path, plain_run: Path) -> None:
    """32 rows are one whole batch of training, 5 and 13 no whole number of those of evaluation."""
    out = trained(config_file, "drop_last", "dataloader_drop_last=true")
    assert_evaluated(out)
    assert losses(out) == losses(plain_run)


@pytest.mark.slow
@pytest.mark.parametrize("drop_last", ["false", "true"])
def test_two_processes_count_each_row_once(config_file: Path, drop_last: str) -> None:
    """2 processes of 2 rows: 5 and 13 rows leave 1 row over, which an even split would drop or count twice."""
    out = config_file.parent / f"two_{drop_last}"
    settings = [f"output_dir={out}", "per_device_train_batch_size=16", f"dataloader_drop_last={drop_last}", *WORKERS]
    done = run("--config_file", config_file, *settings, processes=2)
    assert done.returncode == 0, done.stderr[-3000:]
    assert_evaluated(out)


# The best checkpoint


@pytest.mark.parametrize(
    ("kind", "weights", "settings"),
    [
        ("full", "model.safetensors", []),
        ("adapter", "adapter_model.safetensors", ["lora_config.r=8", "learning_rate=3e-2"]),
    ],
)
def test_the_best_checkpoint_is_loaded_measured_and_kept(
    config_file: Path, kind: str, weights: str, settings: list[str]
) -> None:
    """Five steps teach what the evaluation asks, the next seven another answer to all questions."""
    right = [row for pair in zip(easy(20), arithmetic(20), strict=True) for row in pair]
    wrong = [{**row, "answer": "Ask Natalia in April, and ask her friends in May."} for row in right]
    rows = write_rows(config_file.parent / "astray.jsonl", [*right, *wrong, *wrong[:16]])
    order = [f"train_file={rows}", "train_sampling_strategy=sequential", "per_device_train_batch_size=8"]
    saving = ["save_strategy=steps", "save_steps=1", "eval_steps=1", "save_total_limit=2", "max_steps=12"]
    out = trained(config_file, f"best_{kind}", *order, *saving, *settings, "load_best_model_at_end=true")

    logged = evaluation_logs(out)
    best = min(logged, key=lambda step: logged[step]["eval_loss"])
    assert 2 < best < 11, "there must be checkpoints to remove on both sides of the best one"
    assert logged[12]["eval_loss"] > 1.02 * logged[best]["eval_loss"]
    assert {folder.name for folder in out.glob("checkpoint-*")} == {f"checkpoint-{best}", "checkpoint-12"}

    final = load_file(out / weights)
    of_best, of_last = (load_file(out / f"checkpoint-{step}" / weights) for step in (best, 12))
    assert all(final[name].equal(of_best[name]) for name in final)
    assert not any(final[name].equal(of_last[name]) for name in final)

    found = results(out)
    assert found["eval_loss"] == pytest.approx(logged[best]["eval_loss"], rel=1e-6)
    assert found["eval_token_accuracy"] == logged[best]["eval_token_accuracy"]
    assert found["datasets"]["sums"]["eval_loss"] == pytest.approx(logged[best]["eval_sums_loss"], rel=1e-6)
    if kind == "full":
        assert found["datasets"]["sums"] == expected(measure(model_in(out), rows_of(out).evals["sums"]), "eval")

    # To resume the run, which is finished, finds the same model again.
    (out / weights).unlink()
    again = [*order, *saving, *settings, "load_best_model_at_end=true", "resume_from_checkpoint=auto"]
    trained(config_file, f"best_{kind}", *again)
    resumed = load_file(out / weights)
    assert all(resumed[name].equal(of_best[name]) for name in of_best)
    assert results(out) == found


# Out of memory


@pytest.mark.parametrize(
    ("overrides", "said", "logged"),
    [
        (["eval_steps=2"], "the evaluation after step 2 ran out of memory", [1, 2]),
        (["eval_strategy=no"], "the evaluation ran out of memory", []),
    ],
)
def test_an_evaluation_that_is_out_of_memory_ends_the_run_and_says_what_to_lower(
    config_file: Path,
    overrides: list[str],
    said: str,
    logged: list[int],
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    measure = SFTTrainer.measure

    def fail(self: SFTTrainer, model: Any, inputs: Any, gradient_scale: Any = None) -> Any:
        if gradient_scale is None and (self.state.global_step or not self.is_in_train):
            torch.empty(2**60, dtype=torch.uint8)  # not the one pass that the first step makes without gradients
        return measure(self, model, inputs, gradient_scale)

    monkeypatch.setattr(SFTTrainer, "measure", fail)
    out = config_file.parent / f"evaluation_{len(logged)}"
    common = ["--config_file", str(config_file), f"output_dir={out}"]
    assert sft_main.main([*common, *overrides, "max_steps=3"]) == 3
    told = " ".join(capsys.readouterr().err.split())
    assert f"per_device_eval_batch_size: {said}: " in told
    assert "lower it from 2, which changes no metric" in told
    assert "Traceback" not in told
    if logged:
        assert [entry["step"] for entry in log_history(out)] == logged
    else:
        assert load_file(out / "model.safetensors"), "the trained model is there"


def test_a_step_that_is_out_of_memory_ends_the_run_and_leaves_the_curve(
    config_file: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    measure = SFTTrainer.measure

    def fail(self: SFTTrainer, model: Any, inputs: Any, gradient_scale: Any = None) -> Any:
        if self.state.global_step == 2:
            torch.empty(2**60, dtype=torch.uint8)
        return measure(self, model, inputs, gradient_scale)

    monkeypatch.setattr(SFTTrainer, "measure", fail)
    out = config_file.parent / "training_memory"
    assert sft_main.main(["--config_file", str(config_file), f"output_dir={out}"]) == 3
    told = " ".join(capsys.readouterr().err.split())
    assert "per_device_train_batch_size: step 3 ran out of memory: " in told
    assert "lower it from 32 " in told
    assert [entry["step"] for entry in log_history(out)] == [1, 2]


def test_the_command_that_evaluates_says_so_too(
    config_file: Path, plain_run: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(SFTTrainer, "measure", lambda *_: torch.empty(2**60, dtype=torch.uint8))
    assert sft_main.main(["evaluate", "--config_file", str(config_file), "--model", str(plain_run)]) == 3
    assert "per_device_eval_batch_size: the evaluation ran out of memory: " in " ".join(capsys.readouterr().err.split())


# What changes training and leaves evaluation alone


def test_label_smoothing_is_trained_and_not_evaluated(config_file: Path, model_dir: Path) -> None:
    """Loss of a step: (1 - 0.2) of the nll and 0.2 of the mean over the vocabulary (arXiv:1512.00567, section 7)."""
    out = trained(config_file, "smoothed", "label_smoothing_factor=0.2", "max_steps=1")
    data = rows_of(out)
    before = measure(model_in(model_dir), data.train)
    assert abs(before.loss(0.2) - before.loss()) > 1e-3
    (step,) = log_history(out)
    assert step["loss"] == pytest.approx(before.loss(0.2), rel=1e-6)
    assert step["perplexity"] == pytest.approx(math.exp(before.loss()), rel=1e-6)
    after = measure(model_in(out), [*data.evals["easy"], *data.evals["sums"]])
    assert results(out)["eval_loss"] == pytest.approx(after.loss(), rel=1e-6)


def test_noise_on_the_embeddings_is_trained_and_not_evaluated(config_file: Path, plain_run: Path) -> None:
    """The last evaluation runs before training ends, while the noise is still on."""
    out = trained(config_file, "noisy", "neftune_noise_alpha=30", "max_steps=3", "eval_steps=3")
    assert all(abs(one / other - 1) > 1e-3 for one, other in zip(losses(out), losses(plain_run), strict=False))
    after = measure(model_in(out), [*rows_of(out).evals["easy"], *rows_of(out).evals["sums"]])
    assert evaluation_logs(out)[3]["eval_loss"] == pytest.approx(after.loss(), rel=1e-6)
    assert results(out)["eval_loss"] == pytest.approx(after.loss(), rel=1e-6)


def test_bf16_computes_in_half_precision_and_keeps_the_weights_whole(config_file: Path) -> None:
    common = ["learning_rate=1e-3", "max_steps=10"]
    half, whole = (trained(config_file, f"bf16_{on}", f"bf16={on}", *common) for on in ("true", "false"))
    assert losses(half) == pytest.approx(losses(whole), rel=0.02)
    assert all(one != other for one, other in zip(losses(half), losses(whole), strict=True)), "this was float32"
    assert losses(half)[-1] < 0.9 * losses(half)[0]
    assert results(half)["eval_loss"] == pytest.approx(results(whole)["eval_loss"], rel=0.02)
    assert {str(tensor.dtype) for tensor in load_file(half / "model.safetensors").values()} == {"torch.float32"}
