"""A loss or gradient that is not finite never reaches the weights: the run stops and names the row, or skips it."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoTokenizer

import sft.training.step
import sft_main
from sft.data.loading.collator import Collator
from sft.data.loading.sampler import EpochSampler
from sft.errors import TrainingStopped
from sft.training.nonfinite import NonfiniteGuard, nonfinite_parameters, require_finite
from sft.training.nonfinite_report import split_into_documents
from sft.training.optim.factory import find_fused_adam, with_master_weights
from sft.training.optim.grad_norm import clip_gradients, gradient_norms, total_norm
from tests.builders import save_model_dir
from tests.by_hand import rows_of
from tests.runs import arithmetic, log_history, run, write_config, write_rows

BAD = 7  # a token whose document has a loss that is not finite


def batch_of(*documents: list[int], flatten: bool, first_row: int = 20) -> dict[str, Any]:
    rows = [{"input_ids": np.array(ids), "labels": np.array(ids)} for ids in documents]
    return {**Collator(0, flatten)(rows), "rows": torch.arange(first_row, first_row + len(rows))}


def measure(inputs: dict[str, Any]) -> torch.Tensor:
    return torch.tensor(math.nan if BAD in inputs["input_ids"] else 1.0)


def guard_of(action: Any = "stop", limit: int = 10, **options: Any) -> NonfiniteGuard:
    return NonfiniteGuard(action, limit, str, options.get("measure", measure))


class Weights(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.one, self.other = nn.Parameter(torch.ones(3)), nn.Parameter(torch.ones(2))


def judged(guard: NonfiniteGuard, model: nn.Module, step: int = 5, *, late: bool = False, scaled: bool = False) -> bool:
    """Whether the step is skipped, read at once or `late`: without its gradients, after the next micro-batch."""
    norms = gradient_norms(model.named_parameters())
    must_skip = guard.ask(total_norm(norms.values()), norms, step)
    if late:
        model.zero_grad()
        guard.watch(torch.ones(()), batch_of([9, 9, 9], flatten=True, first_row=90))
    answer = guard.answer(scaled=scaled)
    assert answer == bool(must_skip) or scaled
    return answer


# One micro-batch


@pytest.mark.parametrize("value", [0.0, -0.0, 1.7, -3e-30, 3e36])
def test_a_finite_loss_and_its_gradients_stay_the_same_to_the_last_bit(value: float) -> None:
    weights = torch.randn(50, generator=torch.Generator().manual_seed(0)).requires_grad_()
    plain, watched = ((weights.sin().sum() * 0 + weights * value).sum() for _ in range(2))
    (expected,) = torch.autograd.grad(plain, weights)
    (found,) = torch.autograd.grad(guard_of().watch(watched, {}), weights)
    assert found.equal(expected)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_loss_that_is_not_finite_makes_its_gradients_nan_so_that_all_ranks_see_it(value: float) -> None:
    """An infinite constant has gradients that look sound."""
    weights = torch.ones(3, requires_grad=True)
    guard_of().watch(weights.sum() + value, {}).backward()
    assert weights.grad is not None
    assert weights.grad.isnan().all()


# One step


def test_a_sound_step_is_made() -> None:
    guard, model = guard_of(), Weights()
    guard.watch((model.one.sum() + model.other.sum()) * 2, batch_of([1, 2], flatten=True)).backward()
    assert guard.passes == 1
    assert judged(guard, model) is False
    assert guard.passes == 0
    assert guard.answer() is False, "no other step was asked for"
    assert model.one.grad is not None
    assert model.one.grad.tolist() == [2, 2, 2]


@pytest.mark.parametrize("late", [False, True])
@pytest.mark.parametrize("flatten", [True, False])
def test_the_run_stops_and_names_step_micro_batch_and_row(flatten: bool, late: bool) -> None:
    guard, model = guard_of(), Weights()
    guard.watch(model.one.sum(), batch_of([1, 2], [3], flatten=flatten, first_row=10)).backward()
    batch = batch_of([1, 2], [3, BAD, 4], [5, 6], flatten=flatten)
    guard.watch(model.other.sum() * math.nan, batch).backward()
    with pytest.raises(TrainingStopped) as caught:
        judged(guard, model, step=5, late=late)
    assert guard.passes == late
    assert caught.value.exit_code == 3
    first, second, last = caught.value.problems
    assert first.message == "step 5: the loss is not finite on rank 0"
    assert (
        second.message
        == "rank 0, micro-batch 2 of 2: row 21 of the prepared training data (from 0) has such a loss by itself"
    )
    assert second.hint == "begins '[3, 7, 4]'"
    assert "the weights and the last checkpoint are unchanged" in last.message


def test_if_no_document_does_it_alone_all_of_the_micro_batch_are_named() -> None:
    guard, model = guard_of(measure=lambda _: torch.tensor(1.0)), Weights()
    guard.watch(model.one.sum() * math.nan, batch_of([1, 2], [3, 4], flatten=True)).backward()
    with pytest.raises(TrainingStopped) as caught:
        judged(guard, model)
    assert caught.value.problems[1].message == (
        "rank 0, micro-batch 1 of 1: row 20, 21 of the prepared training data (from 0) is in this micro-batch"
    )


@pytest.mark.parametrize("late", [False, True])
def test_gradients_that_are_not_finite_under_a_finite_loss_are_named(late: bool) -> None:
    guard, model = guard_of(), Weights()
    loss = guard.watch((model.one.sum() + (model.other * 0).sqrt().sum()), batch_of([1, 2], flatten=True))
    loss.backward()  # the square root's slope at 0 is infinite, times 0
    with pytest.raises(TrainingStopped) as caught:
        judged(guard, model, late=late)
    first, second, _ = caught.value.problems
    assert first.message == (
        "step 5: the loss is finite, but not the gradients (or they exceed 1e19) of 1 of 2 parameters: other"
    )
    assert second.message == "rank 0: row 20 of the prepared training data (from 0) is in this step"


def test_a_norm_that_overflows_is_told_as_such() -> None:
    """The square of 2e19 is no float32; where the squares are, their sum may be none."""
    guard, model = guard_of(), Weights()
    model.one.grad, model.other.grad = torch.tensor([2e19, 0, 0]), torch.tensor([1.0, 0])
    with pytest.raises(TrainingStopped, match=r"\(or they exceed 1e19\) of 1 of 2 parameters: one"):
        judged(guard, model)
    model.one.grad, model.other.grad = torch.tensor([1.7e19, 0, 0]), torch.tensor([1.7e19, 0])
    with pytest.raises(TrainingStopped, match="every gradient is finite, but their norm overflows float32"):
        judged(guard, model)


@pytest.mark.parametrize("masters", [False, True])
@pytest.mark.parametrize("fused", [False, True])
def test_skipping_changes_nothing_and_stops_after_the_limit(fused: bool, masters: bool) -> None:
    """A fused optimizer skips the step itself: it gets NaN gradients, and the flag may be read after its step."""
    model = Weights().bfloat16() if masters else Weights()
    optimizer: Any = torch.optim.AdamW(model.parameters(), lr=0.1, weight_decay=0.1, fused=fused)
    optimizer = with_master_weights(optimizer) if masters else optimizer
    guard = guard_of("skip", limit=2)
    skips = find_fused_adam(optimizer)
    assert (skips is not None) == fused

    def step(factor: float) -> bool:
        guard.watch((model.one.sum() + model.other.sum()) * factor, batch_of([1, BAD], flatten=True)).backward()
        norms = gradient_norms(model.named_parameters())
        must_skip = guard.ask(total_norm(norms.values()), norms, 5)
        if skips:
            skips.found_inf = must_skip  # type: ignore[attr-defined]
        elif must_skip:
            optimizer.zero_grad()
        optimizer.step()
        optimizer.zero_grad()
        return guard.answer()

    assert step(1.0) is False
    weights = [p.detach().clone() for p in model.parameters()]
    moments = [{name: value.clone() for name, value in state.items()} for state in optimizer.state.values()]
    assert step(math.nan) is True
    assert step(math.inf) is True
    assert guard.skipped == 2
    assert all(p.equal(before) for p, before in zip(model.parameters(), weights, strict=True))
    for state, before in zip(optimizer.state.values(), moments, strict=True):
        assert all(state[name].equal(before[name]) for name in before)
    assert step(1.0) is False
    with pytest.raises(TrainingStopped, match=r"2 steps were skipped before this one \(nonfinite_limit\)"):
        step(math.nan)


def test_a_loss_scale_handles_its_own_overflows_but_not_a_loss_that_is_not_finite() -> None:
    guard, model = guard_of(), Weights()
    for _ in range(16):
        guard.watch(model.one.sum(), batch_of([1, 2], flatten=True))
        model.one.grad = torch.full((3,), math.inf)
        assert judged(guard, model, scaled=True) is False
        assert model.one.grad is not None, "the scaler sees it and skips the step"
    guard.watch(model.one.sum() * math.nan, batch_of([1, BAD], flatten=True))
    with pytest.raises(TrainingStopped, match="the loss is not finite"):
        judged(guard, model, scaled=True)


def test_a_loss_scale_that_never_fits_is_no_overflow() -> None:
    guard, model = guard_of(), Weights()
    model.one.grad = torch.full((3,), math.inf)
    for _ in range(32):  # halved as often, the first scale of 65,536 is 2e-5
        assert judged(guard, model, scaled=True) is False
    with pytest.raises(TrainingStopped, match="but not the gradients"):
        judged(guard, model, scaled=True)


# The documents of a batch


@pytest.mark.parametrize("flatten", [True, False])
def test_each_document_alone_is_a_batch_that_the_collator_would_have_made(flatten: bool) -> None:
    documents = [[1, 2, 3], [4, 5], [6, 7, 8, 9]]
    found = list(split_into_documents(batch_of(*documents, flatten=flatten)))
    assert [row for row, _ in found] == [20, 21, 22]
    for (_, part), ids in zip(found, documents, strict=True):
        expected = batch_of(ids, flatten=flatten)
        assert part.keys() == expected.keys() - {"rows"}
        for name in part.keys() - {"documents"}:
            assert part[name].equal(expected[name]), name
        if flatten:
            assert part["documents"].lengths == (len(ids),)
            assert part["documents"].cu_seqlens.equal(expected["documents"].cu_seqlens)


def test_documents_of_a_packed_row_have_its_number_and_fillers_are_skipped() -> None:
    rows: list[dict[str, Any]] = [
        {"input_ids": np.arange(5), "labels": np.arange(5), "seq_lengths": np.array([2, 3])},
        {"input_ids": np.arange(4), "labels": np.arange(4), "seq_lengths": np.array([4])},
        {"input_ids": np.arange(1), "labels": np.arange(1), "seq_lengths": np.array([1]), "filler": True},
    ]
    batch = {**Collator(0, flatten=True)(rows), "rows": torch.tensor([8, 3, -1])}
    assert [(row, part["input_ids"].shape[1]) for row, part in split_into_documents(batch)] == [(8, 2), (8, 3), (3, 4)]


def test_rows_without_a_number_are_identified_by_their_text() -> None:
    guard, model = guard_of(), Weights()
    batch = batch_of([1, BAD], flatten=True, first_row=-1)
    guard.watch(model.one.sum() * math.nan, batch).backward()
    with pytest.raises(TrainingStopped, match=r"row without a number has such a loss by itself\n    begins '\[1, 7\]'"):
        judged(guard, model)


# Norm and clipping


@pytest.mark.parametrize("max_norm", [0.5, 1e3])
def test_norm_and_clipping_are_torchs_own(max_norm: float) -> None:
    models = [Weights(), Weights()]
    for model in models:
        model.one.grad, model.other.grad = torch.tensor([3.0, 0.1, 0.0]), torch.tensor([-4.0, 0.0])
    expected = nn.utils.clip_grad_norm_(models[0].parameters(), max_norm)
    norm = total_norm(gradient_norms(models[1].named_parameters()).values())
    clip_gradients(models[1].parameters(), max_norm, norm)
    assert norm.equal(expected)
    for one, other in zip(models[0].parameters(), models[1].parameters(), strict=True):
        assert one.grad is not None
        assert other.grad is not None
        assert one.grad.equal(other.grad)


def test_no_gradient_has_the_norm_zero() -> None:
    assert total_norm(gradient_norms(Weights().named_parameters()).values()).item() == 0


# Before a save


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_parameters_that_are_not_finite_are_not_saved(value: float, dtype: torch.dtype) -> None:
    model = Weights().to(dtype)
    require_finite(model, "checkpoint-3")
    with torch.no_grad():
        model.other[1] = value
    assert nonfinite_parameters(model) == ["other"]
    with pytest.raises(TrainingStopped, match="checkpoint-3 is not saved: other would hold"):
        require_finite(model, "checkpoint-3")


def test_frozen_parameters_are_the_users_own() -> None:
    model = Weights()
    with torch.no_grad():
        model.other[1] = math.nan
    model.other.requires_grad_(False)
    assert nonfinite_parameters(model) == []


# Real runs: the embedding of a character that only one row has is NaN


ROW = 17


@pytest.fixture(scope="module")
def config_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """40 rows, 4 per step in micro-batches of 2; the weights of the adapter, which are saved, are sound."""
    folder = tmp_path_factory.mktemp("nonfinite")
    model_dir = save_model_dir(folder / "model")
    tokenizer = AutoTokenizer.from_pretrained(model_dir)
    weights = load_file(model_dir / "model.safetensors")
    weights["model.embed_tokens.weight"][tokenizer("§", add_special_tokens=False)["input_ids"][-1]] = math.nan
    save_file(weights, model_dir / "model.safetensors", metadata={"format": "pt"})
    rows = arithmetic(40)
    rows[ROW] = {"question": "What does § 17 say?", "answer": "Nothing."}
    return write_config(
        folder / "run.yaml",
        model_name_or_path=str(model_dir),
        train_file=str(write_rows(folder / "train.jsonl", rows)),
        cache_dir=str(folder / "cache"),
        lora_config={"r": 4},
        max_seq_length=128,
        per_device_train_batch_size=2,
        gradient_accumulation_steps=2,
        learning_rate=3e-3,
        max_steps=10,
        logging_steps=3,
        save_steps=2,
    )


def step_of_the_row() -> int:
    """The optimizer step, counted from 1, that has it; the tests below need checkpoints before it."""
    step = EpochSampler(40, 0, seed=42).order().tolist().index(ROW) // 4 + 1
    assert 4 < step < 10
    return step


def assert_stopped_cleanly(out: Path) -> None:
    """Every checkpoint is complete and finite, the logs end before the step, and there is no final model."""
    last = step_of_the_row() - 1
    found = sorted(int(path.name.rpartition("-")[2]) for path in out.glob("checkpoint-*"))
    assert found == list(range(2, last + 1, 2))
    for step in found:
        weights = load_file(out / f"checkpoint-{step}" / "adapter_model.safetensors")
        assert all(weight.isfinite().all() for weight in weights.values())
    logs = log_history(out)
    assert [entry["step"] for entry in logs] == sorted({*range(3, last + 1, 3), last})
    assert all(math.isfinite(entry["loss"]) for entry in logs)
    assert json.loads((out / "logs" / "metrics.jsonl").read_text().splitlines()[-1])["step"] == last
    assert not (out / "adapter_model.safetensors").exists()


@pytest.mark.parametrize("packing", ["false", "bfd"])
def test_a_run_stops_with_exit_code_3_and_names_the_row(
    config_file: Path, packing: str, capsys: pytest.CaptureFixture[str]
) -> None:
    out = config_file.parent / f"stopped_{packing}"
    arguments = ["--config_file", str(config_file), f"output_dir={out}", f"packing={packing}"]
    if packing == "bfd":
        arguments += ["max_seq_length=100", "save_strategy=no"]
    assert sft_main.main(arguments) == 3
    said = capsys.readouterr().err
    assert "begins '<|im_start|>user\\nWhat does § 17 say?" in said
    assert "has such a loss by itself" in said
    assert "Traceback" not in said
    if packing == "false":
        assert f"step {step_of_the_row()}: the loss is not finite on rank 0" in said
        assert f"row {ROW} of the prepared training data" in said
        assert_stopped_cleanly(out)
    else:
        rows = rows_of(out).train
        number = int(said.partition(": row ")[2].split()[0])
        tokenizer = AutoTokenizer.from_pretrained(config_file.parent / "model")
        assert "§ 17" in tokenizer.decode(rows[number]["input_ids"])


@pytest.fixture(scope="module")
def skipped_run(config_file: Path) -> Path:
    """A run that skips the step, with a log and a checkpoint at each step."""
    out = config_file.parent / "skipped"
    arguments = ["--config_file", str(config_file), f"output_dir={out}", "on_nonfinite=skip"]
    assert sft_main.main([*arguments, "logging_steps=1", "save_steps=1"]) == 0
    return out


def test_a_run_that_skips_continues_with_the_weights_it_had(skipped_run: Path) -> None:
    out, step = skipped_run, step_of_the_row()
    logs = {entry["step"]: entry for entry in log_history(out)}
    assert len(logs) == 10
    assert math.isnan(logs[step]["loss"])
    assert all(math.isfinite(entry["loss"]) for number, entry in logs.items() if number != step)
    assert [entry.get("skipped_steps", 0) for entry in logs.values()] == [0] * (step - 1) + [1] * (11 - step)
    assert logs[step]["num_tokens"] == logs[step - 1]["num_tokens"], "its tokens were not trained"
    before, after, later = (out / f"checkpoint-{number}" for number in (step - 1, step, step + 1))
    weights = [load_file(folder / "adapter_model.safetensors") for folder in (before, after, later)]
    assert all(weights[0][name].equal(weights[1][name]) for name in weights[0])
    assert not all(weights[1][name].equal(weights[2][name]) for name in weights[1])
    states = [torch.load(folder / "optimizer.pt", weights_only=True)["state"] for folder in (before, after)]
    assert states[0].keys() == states[1].keys()
    for number, state in states[0].items():
        assert all(torch.as_tensor(value).equal(torch.as_tensor(states[1][number][n])) for n, value in state.items())


@pytest.mark.parametrize(("action", "code"), [("stop", 3), ("skip", 0)])
def test_a_flag_read_one_step_later_has_the_same_effect_as_at_once(
    config_file: Path,
    action: str,
    code: int,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """No log or checkpoint needs the flag earlier: the run ends, or continues, as if it had waited for it."""
    found: list[Any] = []
    step = step_of_the_row()
    for when in ("later", "at_once"):
        if when == "at_once":
            monkeypatch.setattr(sft.training.step, "find_fused_adam", lambda _: None)
        out = config_file.parent / f"{action}_{when}"
        arguments = ["--config_file", str(config_file), f"output_dir={out}", "save_strategy=no", "logging_steps=10"]
        assert sft_main.main([*arguments, f"on_nonfinite={action}"]) == code
        said = capsys.readouterr().err.splitlines()
        start = next(at for at, line in enumerate(said) if f"step {step}: the loss is not finite" in line)
        state = json.loads((out / "trainer_state.json").read_text())
        (log,) = log_history(out)
        ours = {name: value for name, value in log.items() if name not in ("tokens_per_second", "memory_gb")}
        weights = {file.name: file.read_bytes() for file in out.glob("*.safetensors")}
        assert len(weights) == (action == "skip")
        found.append([said[start : start + 4], state["global_step"], state["epoch"], ours, weights])
    later, at_once = found
    assert later == at_once
    assert later[1] == (step - 1 if action == "stop" else 10)


def test_a_skipped_step_counts_in_no_mean(config_file: Path, skipped_run: Path) -> None:
    """The log over all steps is the mean of the others, weighted by their tokens."""
    window = config_file.parent / "window"
    arguments = ["--config_file", str(config_file), f"output_dir={window}", "on_nonfinite=skip", "save_strategy=no"]
    assert sft_main.main([*arguments, "logging_steps=10"]) == 0
    rows, order = rows_of(skipped_run).train, EpochSampler(40, 0, seed=42).order()
    trained = [sum(int((rows[int(i)]["labels"] != -100).sum()) for i in step) for step in order.reshape(10, 4)]
    kept = [at for at in range(10) if at != step_of_the_row() - 1]
    losses = [entry["loss"] for entry in log_history(skipped_run)]
    (whole,) = log_history(window)
    expected = sum(losses[at] * trained[at] for at in kept) / sum(trained[at] for at in kept)
    assert whole["loss"] == pytest.approx(expected, abs=1e-6)
    assert whole["skipped_steps"] == 1


def test_a_resumed_run_counts_a_skipped_step_that_was_not_logged(config_file: Path) -> None:
    """It is in the log, and counts for the limit."""
    out, step = config_file.parent / "remembered", step_of_the_row()
    common = ["--config_file", str(config_file), "on_nonfinite=skip", "save_steps=1"]
    assert sft_main.main([*common, f"output_dir={out}", "logging_strategy=no"]) == 0
    again = [f"output_dir={out}_again", f"resume_from_checkpoint={out / f'checkpoint-{step}'}", "logging_steps=1"]
    assert sft_main.main([*common, *again]) == 0
    logs = log_history(Path(f"{out}_again"))
    assert [entry["step"] for entry in logs] == list(range(step + 1, 11))
    assert [entry["skipped_steps"] for entry in logs] == [1] * (10 - step)


@pytest.mark.slow
def test_a_checkpoint_of_weights_that_are_not_finite_is_not_written(
    config_file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """All weights are trained, the embedding among them that is NaN; the rows before the poisoned one are sound."""
    out = config_file.parent / "whole_model"
    assert sft_main.main(["--config_file", str(config_file), f"output_dir={out}", "lora_config=null"]) == 3
    assert "checkpoint-2 is not saved: model.embed_tokens.weight would hold" in capsys.readouterr().err
    assert not list(out.glob("checkpoint-*"))


@pytest.mark.slow
def test_two_processes_of_which_one_sees_it_stop_together(config_file: Path) -> None:
    out = config_file.parent / "two"
    arguments = ["--config_file", str(config_file), f"output_dir={out}", "per_device_train_batch_size=1"]
    done = run(*arguments, processes=2)
    position = EpochSampler(40, 0, seed=42).order().tolist().index(ROW) % 4
    guilty = position % 2  # rows are dealt out to the processes in turn
    assert f"step {step_of_the_row()}: the loss is not finite on rank {guilty}\n" in done.stderr
    assert f"rank {guilty}, micro-batch {position // 2 + 1} of 2: row {ROW} of" in done.stderr
    assert "exitcode  : 3" in done.stderr
    assert_stopped_cleanly(out)


@pytest.mark.slow
def test_two_processes_skip_together(config_file: Path) -> None:
    """As one process with twice the rows does; in float32, where the micro-batch size hardly changes the rounding."""
    one, two = config_file.parent / "skip_one", config_file.parent / "skip_two"
    common = ["--config_file", str(config_file), "on_nonfinite=skip", "logging_steps=1", "save_strategy=no"]
    common.append("dtype=float32")
    assert sft_main.main([*common, f"output_dir={one}"]) == 0
    done = run(*common, f"output_dir={two}", "per_device_train_batch_size=1", processes=2)
    assert done.returncode == 0, done.stderr[-3000:]
    curves = [[entry["loss"] for entry in log_history(out)] for out in (one, two)]
    assert curves[1] == pytest.approx(curves[0], abs=1e-5, nan_ok=True)
    assert math.isnan(curves[0][step_of_the_row() - 1])
    assert sum(map(math.isnan, curves[0])) == 1
    assert log_history(two)[-1]["skipped_steps"] == 1
