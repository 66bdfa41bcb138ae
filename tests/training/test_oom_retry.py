"""A step that runs out of memory is run again in halves; the allocations fail as on a full machine."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from sft.data.loading.collator import Collator
from sft.distributed.oom import is_out_of_memory, oom_during_evaluation, out_of_memory
from sft.errors import RankStopped
from sft.loss.token_loss import token_loss
from sft.training.oom_retry import OomRetry
from sft.training.split_batch import split_batch
from tests.builders import tiny_llama


def allocate_too_much() -> None:
    """Fails as any allocator does: no machine has as much address space."""
    torch.empty(2**60, dtype=torch.uint8)


def rows(*lengths: int) -> list[dict[str, Any]]:
    rng = np.random.default_rng(0)
    made = [{"input_ids": rng.integers(0, 90, n)} for n in lengths]
    return [
        {**row, "labels": np.where(np.arange(n) < 2, -100, row["input_ids"])}
        for row, n in zip(made, lengths, strict=True)
    ]


# Splitting a micro-batch


def test_a_flattened_micro_batch_is_split_between_documents() -> None:
    batch = Collator(0, flatten=True)(rows(3, 2, 4, 1))
    first, second = split_batch(batch) or ({}, {})
    assert first["documents"].lengths == (3, 2)
    assert second["documents"].lengths == (4, 1)
    assert second["documents"].cu_seqlens.tolist() == [0, 4, 5]
    for name in ("input_ids", "labels", "position_ids"):
        assert torch.cat([first[name], second[name]], 1).equal(batch[name])
    assert first["trained_positions"].tolist() == [2]
    assert second["trained_positions"].tolist() == [2, 3]
    assert int(first["lengths"].sum() + second["lengths"].sum()) == int(batch["lengths"].sum()) == 10


def test_a_padded_micro_batch_is_split_between_samples() -> None:
    batch = Collator(0)(rows(3, 5, 4))
    first, second = split_batch(batch) or ({}, {})
    assert [len(first["input_ids"]), len(second["input_ids"])] == [1, 2]
    assert second["lengths"].tolist() == [5, 4]
    assert second["trained_positions"].tolist() == [2, 3, 4, 7, 8]


@pytest.mark.parametrize("flatten", [True, False])
def test_a_single_sample_is_not_split(flatten: bool) -> None:
    assert split_batch(Collator(0, flatten)(rows(4))) is None


# Running a step again


def test_only_failed_allocations_are_recognized() -> None:
    with pytest.raises(RuntimeError) as raised:
        allocate_too_much()
    assert is_out_of_memory(raised.value)
    assert is_out_of_memory(MemoryError())
    assert is_out_of_memory(torch.OutOfMemoryError("CUDA out of memory."))
    assert not is_out_of_memory(RuntimeError("mat1 and mat2 shapes cannot be multiplied"))
    assert not is_out_of_memory(ValueError("out of memory"))


@pytest.mark.parametrize(
    ("raised", "key", "hint"),
    [
        (out_of_memory("step 3", batch_size=8), "per_device_train_batch_size", "lower it from 8 "),
        (out_of_memory("step 3"), "max_seq_length", "shorten max_seq_length, set gradient_checkpointing"),
    ],
)
def test_the_hint_is_to_lower_the_batch_size_if_it_is_above_one(raised: RankStopped, key: str, hint: str) -> None:
    (problem,) = raised.problems
    assert (problem.key, raised.exit_code) == (key, 3)
    assert problem.hint.startswith(hint)
    assert "shorten max_seq_length" in problem.hint


@pytest.mark.parametrize(("rows", "key"), [(8, "per_device_eval_batch_size"), (1, "max_seq_length")])
def test_an_evaluation_that_is_out_of_memory_says_so(rows: int, key: str) -> None:
    with (
        pytest.raises(RankStopped, match="the evaluation ran out of memory: ") as raised,
        oom_during_evaluation("the evaluation", rows),
    ):
        allocate_too_much()
    assert [problem.key for problem in raised.value.problems] == [key]
    with pytest.raises(ZeroDivisionError), oom_during_evaluation("the evaluation", rows):
        1 / 0  # noqa: B018


class Step:
    """A weight whose gradient is the sum of the numbers; memory is enough for `room` numbers at a time."""

    def __init__(self, room: int) -> None:
        self.room, self.gradient, self.counted = room, 0.0, 0
        self.pieces: list[list[float]] = []
        self.retry = OomRetry(self.split, self.clear, lambda: self.counted, self.restore)

    def run_piece(self, numbers: list[float]) -> torch.Tensor:
        self.pieces.append(numbers)
        self.counted += len(numbers)
        self.gradient += numbers[0]  # what a backward pass has done before it fails
        if len(numbers) > self.room:
            allocate_too_much()
        self.gradient += sum(numbers[1:])
        return torch.tensor(sum(numbers))

    @staticmethod
    def split(numbers: list[float]) -> tuple[list[float], list[float]] | None:
        middle = len(numbers) // 2
        return (numbers[:middle], numbers[middle:]) if middle else None

    def clear(self) -> None:
        self.gradient = 0.0

    def restore(self, counted: int) -> None:
        self.counted = counted


def test_the_micro_batches_of_the_step_are_run_again_and_count_once() -> None:
    step = Step(room=2)
    step.retry.begin()
    losses = [
        float(step.retry.run(numbers, step.run_piece)) for numbers in ([1.0, 2.0], [3.0, 4.0, 5.0, 6.0], [7.0, 8.0])
    ]
    assert losses == [3.0, 18.0, 15.0]
    assert step.gradient == 36.0
    assert step.counted == 8
    assert step.pieces[2:] == [[1.0], [2.0], [3.0, 4.0], [5.0, 6.0], [7.0], [8.0]], "later pieces stay small"


def test_a_piece_that_cannot_be_split_ends_the_run() -> None:
    step = Step(room=0)
    step.retry.begin()
    with pytest.raises(RankStopped, match="a micro-batch of a single sample"):
        step.retry.run([1.0, 2.0], step.run_piece)


def test_other_errors_are_raised() -> None:
    step = Step(room=9)
    step.retry.begin()
    with pytest.raises(IndexError):
        step.retry.run([], step.run_piece)


def train(room_after_step_3: int) -> tuple[list[float], list[int]]:
    """Trains six steps of two micro-batches of 8 samples; returns the losses, and the number of cuts at each step.

    From the fourth step on the backward pass of the first layer fails for more samples than `room_after_step_3`, when
    the gradients of the head and of the second layer have been added already.
    """
    model = tiny_llama(400)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    collate = Collator(0)
    steps = [[collate(rows(*[10 + s + i + 4 * p for i in range(8)])) for p in range(2)] for s in range(6)]
    room = 8

    def limit_backward(_module: Any, _args: Any, output: torch.Tensor) -> None:
        def check(gradient: torch.Tensor) -> None:
            if len(gradient) > room:
                assert model.lm_head.weight.grad is not None
                allocate_too_much()

        output.register_hook(check)

    model.model.layers[0].register_forward_hook(limit_backward)

    def run_piece(batch: dict[str, Any]) -> torch.Tensor:
        logits = model(batch["input_ids"], attention_mask=batch["attention_mask"], use_cache=False).logits
        loss = token_loss(logits, batch["labels"]).objective / tokens
        loss.backward()
        return loss

    retry = OomRetry(split_batch, model.zero_grad, lambda: None, lambda _: None)
    curve, cuts = [], []
    for number, step in enumerate(steps):
        tokens = sum(len(batch["trained_positions"]) for batch in step)
        retry.begin()
        if number == 3:
            room = room_after_step_3
        curve.append(float(sum(retry.run(batch, run_piece) for batch in step)))
        cuts.append(retry.cuts)
        optimizer.step()
        optimizer.zero_grad()
    return curve, cuts


@pytest.mark.parametrize(("room", "cuts"), [(4, 1), (3, 2)])
def test_a_run_that_runs_out_of_memory_continues_with_the_same_losses(room: int, cuts: int) -> None:
    expected, without = train(8)
    curve, made = train(room)
    assert without == [0] * 6
    assert made == [0, 0, 0, cuts, cuts, cuts], "no more cuts than needed"
    assert expected[-1] < 0.95 * expected[0], "nothing was learned, so the comparison proves nothing"
    assert curve == pytest.approx(expected, abs=1e-5)
