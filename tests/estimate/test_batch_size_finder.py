"""The size of a pass is found by real passes, in real memory, and the search leaves nothing behind."""

from __future__ import annotations

import mmap
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import nn

from sft.distributed.memory import held_bytes
from sft.errors import UserError
from sft.estimate.batch_size_finder import BatchChoice, candidate_sizes, choose_batch_size, longest_rows, undisturbed
from tests.builders import tiny_llama
from tests.ranks import spawn_ranks

CPU = torch.device("cpu")
ROW = 32 * 2**20  # bytes that a row of `Hungry` takes in the forward pass


class _Keep(torch.autograd.Function):
    """Returns the weight and keeps `ROW` bytes for each row until the backward pass."""

    @staticmethod
    def forward(ctx: Any, weight: torch.Tensor, rows: int) -> torch.Tensor:
        # From the system itself: malloc may have as much left over from an earlier test, and then nothing grows.
        ctx.kept = torch.frombuffer(mmap.mmap(-1, rows * ROW + 1), dtype=torch.uint8).fill_(1)
        return weight.sum()

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor, None]:
        ctx.kept = None
        return grads[0].expand(1), None


class Hungry(nn.Module):
    """One weight whose passes take `ROW` bytes a row, in real memory, and a tenth of a second on a clock of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.now = 0.0
        self.weight = nn.Parameter(torch.ones(1))
        self.run_pass(1)  # whatever a first pass and a first clearing load is there before anybody measures
        self.zero_grad()

    def run_pass(self, rows: int, seconds: float = 0.1) -> None:
        loss = _Keep.apply(self.weight, rows)
        loss.backward()
        self.now += seconds

    def clock(self) -> float:
        return self.now


def search(candidates: list[int], room: int, seconds_of: list[float] | None = None, seconds: float = 20) -> BatchChoice:
    """Chooses for passes that take memory; or for such that only take time, as much as `seconds_of` says for each."""
    model = Hungry()

    def run_pass(rows: int) -> None:
        if seconds_of:
            model.run_pass(0, seconds_of[candidates.index(rows)])
        else:
            model.run_pass(rows)

    budget = held_bytes(CPU) + room
    return choose_batch_size(
        model, run_pass, candidates, budget=budget, reserve=0, device=CPU, seconds=seconds, clock=model.clock
    )


@pytest.mark.parametrize(
    ("rows_per_step", "longest", "sizes"),
    [
        (12, 99, [1, 2, 3, 4, 6, 12]),
        (12, 5, [1, 2, 3, 4]),
        (7, 99, [1, 7]),
        (None, 20, [1, 2, 4, 8, 16]),
        (None, 1, [1]),
    ],
)
def test_sizes_divide_the_rows_of_a_step(rows_per_step: int | None, longest: int, sizes: list[int]) -> None:
    assert candidate_sizes(rows_per_step, longest) == sizes


def test_the_longest_rows_come_first() -> None:
    assert longest_rows(np.array([3, 9, 1, 9, 5]), 3).tolist() == [1, 3, 4]


def test_the_largest_size_that_fits_is_taken_where_larger_is_faster() -> None:
    """Room for 5 rows and a half: 4 of 1, 2, 4, 8, which is never run because 1, 2 and 4 foretell it."""
    choice = search([1, 2, 4, 8], room=11 * ROW // 2)
    assert choice.rows == 4
    assert [probe.rows for probe in choice.probes] == [1, 2, 4]
    assert "8 rows would take more" in choice.reason
    grown = [b.peak - a.peak for a, b in zip(choice.probes, choice.probes[1:], strict=False)]
    assert grown == pytest.approx([ROW, 2 * ROW], rel=0.25)


def test_a_larger_size_that_is_no_faster_is_not_taken() -> None:
    """Rows a second: 10, 20, 10, 10; the two that do not pay end the search before 16."""
    choice = search([1, 2, 4, 8, 16], room=2**40, seconds_of=[0.1, 0.1, 0.4, 0.8, 1.6])
    assert choice.rows == 2
    assert [probe.rows for probe in choice.probes] == [1, 2, 4, 8]
    assert choice.reason == "larger passes are not faster"


def test_what_the_optimizer_will_hold_is_left_free() -> None:
    model = Hungry()
    choice = choose_batch_size(
        model,
        model.run_pass,
        [1, 2, 4],
        budget=held_bytes(CPU) + 11 * ROW // 2,
        reserve=2 * ROW,
        device=CPU,
        clock=model.clock,
    )
    assert choice.rows == 2


def test_a_pass_that_does_not_fit_at_all_is_the_users_to_change() -> None:
    with pytest.raises(UserError, match=r"1 of the longest rows brings the process to .* GiB") as raised:
        search([1, 2], room=ROW // 2)
    assert raised.value.problems[0].key == "per_device_train_batch_size"


def test_the_search_ends_when_its_time_is_over() -> None:
    choice = search([1, 2, 4], room=2**40, seconds=0.01)
    assert [probe.rows for probe in choice.probes] == [1]
    assert choice.reason == "the time for probing was over"


def random_numbers() -> list[object]:
    return [random.random(), np.random.rand(), torch.rand(3).tolist()]


def test_nothing_of_the_model_or_the_random_numbers_changes() -> None:
    model = tiny_llama(100, attention_dropout=0.5)
    model.register_buffer("counter", torch.zeros(1))
    model.eval()
    model(torch.tensor([[1, 2, 3]]), labels=torch.tensor([[1, 2, 3]])).loss.backward()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    gradients = [None if p.grad is None else p.grad.clone() for p in model.parameters()]
    torch.manual_seed(5)
    np.random.seed(5)
    random.seed(5)
    expected = random_numbers()
    torch.manual_seed(5)
    np.random.seed(5)
    random.seed(5)

    def run_pass(rows: int) -> None:
        model.train()
        model.get_buffer("counter").add_(1)
        random_numbers()
        ids = torch.randint(0, 100, (rows, 16))
        model(ids, labels=ids).loss.backward()

    choose_batch_size(model, run_pass, [1, 2], budget=2**60, reserve=0, device=CPU)
    assert random_numbers() == expected
    assert not model.training
    assert all(value.equal(before[name]) for name, value in model.state_dict().items())
    for parameter, gradient in zip(model.parameters(), gradients, strict=True):
        assert gradient is not None
        assert parameter.grad is not None
        assert parameter.grad.equal(gradient)


def test_everything_is_put_back_after_a_mistake_as_well() -> None:
    model = Hungry()
    torch.manual_seed(1)
    expected = torch.rand(2)
    torch.manual_seed(1)
    model.run_pass(1)
    before = model.weight.grad
    assert before is not None

    def mistaken() -> None:
        with undisturbed(model):
            torch.rand(7)
            model.run_pass(1)
            raise KeyError("a mistake")

    with pytest.raises(KeyError):
        mistaken()
    assert model.weight.grad is before
    assert torch.rand(2).equal(expected)


def _choose_on_rank(rank: int, folder: Path) -> None:
    model = Hungry()
    held = torch.tensor(held_bytes(CPU))
    dist.all_reduce(held, dist.ReduceOp.MAX)  # the ranks' processes are not equally large
    budget = int(held) + (100 if rank == 0 else 5) * ROW
    choice = choose_batch_size(
        model, model.run_pass, [1, 2, 8], budget=budget, reserve=0, device=CPU, clock=model.clock
    )
    (folder / str(rank)).write_text(str(choice.rows))


@pytest.mark.slow
def test_all_ranks_take_the_size_that_fits_on_the_fullest(tmp_path: Path) -> None:
    spawn_ranks(_choose_on_rank, tmp_path, 2)
    assert [(tmp_path / str(rank)).read_text() for rank in range(2)] == ["2", "2"]
