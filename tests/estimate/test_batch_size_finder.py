"""The batch size finder, with counted memory and time."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from sft.errors import UserError
from sft.estimate.batch_size_finder import BatchChoice, candidate_sizes, choose_batch_size, longest_rows, undisturbed
from tests.builders import tiny_llama
from tests.ranks import spawn_ranks

CPU = torch.device("cpu")
ROW = 2**25  # bytes per row that `Counted` says to hold
PROCESS = 2**30  # bytes that it says to hold besides


class Counted(nn.Module):
    """One weight, whose passes count the memory and the time that they would take."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(1))
        self.now, self.held = 0.0, PROCESS

    def run_pass(self, rows: int, seconds: float = 0.1) -> None:
        self.weight.sum().backward()
        self.now += seconds
        self.held = PROCESS + rows * ROW

    def choose(self, candidates: list[int], room: int, **options: Any) -> BatchChoice:
        """Chooses where `room` bytes are free."""
        options = {"run_pass": self.run_pass, "reserve": 0, **options}
        run_pass = options.pop("run_pass")
        counted: dict[str, Any] = {"clock": lambda: self.now, "peak": lambda _: self.held}
        return choose_batch_size(self, run_pass, candidates, budget=PROCESS + room, device=CPU, **counted, **options)


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
    """Room for 5 rows and a half: 4 of 1, 2, 4, 8, which is never run because 2 and 4 predict its memory."""
    choice = Counted().choose([1, 2, 4, 8], room=11 * ROW // 2)
    assert choice.rows == 4
    assert [(probe.rows, probe.peak) for probe in choice.probes] == [(n, PROCESS + n * ROW) for n in (1, 2, 4)]
    assert "8 samples would take more" in choice.reason


def test_a_size_that_does_not_fit_against_the_prediction_is_not_taken() -> None:
    model = Counted()

    def run_pass(rows: int) -> None:
        model.run_pass(rows)
        model.held += (rows == 4) * 2 * ROW

    choice = model.choose([1, 2, 4], room=5 * ROW, run_pass=run_pass)
    assert choice.rows == 2
    assert [probe.rows for probe in choice.probes] == [1, 2, 4]
    assert "4 samples take more" in choice.reason


def test_a_size_that_runs_out_of_memory_is_not_taken() -> None:
    model = Counted()

    def run_pass(rows: int) -> None:
        model.run_pass(rows)
        if rows == 2:
            raise torch.OutOfMemoryError

    choice = model.choose([1, 2, 4], room=99 * ROW, run_pass=run_pass)
    assert choice.rows == 1
    assert [(probe.rows, probe.fits) for probe in choice.probes] == [(1, True), (2, False)]


def test_a_larger_size_that_is_no_faster_is_not_taken() -> None:
    """Rows per second: 10, 20, 10, 10; the two without a gain end the search before 16."""
    model, candidates = Counted(), [1, 2, 4, 8, 16]
    seconds = dict(zip(candidates, [0.1, 0.1, 0.4, 0.8, 1.6], strict=True))
    choice = model.choose(candidates, room=2**40, run_pass=lambda rows: model.run_pass(rows, seconds[rows]))
    assert choice.rows == 2
    assert [probe.rows for probe in choice.probes] == [1, 2, 4, 8]
    assert choice.reason == "larger micro-batches are not faster"


def test_the_optimizers_memory_is_left_free() -> None:
    assert Counted().choose([1, 2, 4], room=11 * ROW // 2, reserve=2 * ROW).rows == 2


def test_a_single_row_that_does_not_fit_is_an_error_of_the_user() -> None:
    with pytest.raises(UserError, match=r"1 of the longest samples brings the process to .* GiB") as raised:
        Counted().choose([1, 2], room=ROW // 2)
    assert raised.value.problems[0].key == "per_device_train_batch_size"


def test_the_search_ends_when_its_time_is_over() -> None:
    choice = Counted().choose([1, 2, 4], room=2**40, seconds=0.01)
    assert [probe.rows for probe in choice.probes] == [1]
    assert choice.reason == "the time for probing is over"


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


def test_everything_is_restored_after_an_error_as_well() -> None:
    model = Counted()
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
    choice = Counted().choose([1, 2, 8], room=(100 if rank == 0 else 5) * ROW)
    (folder / str(rank)).write_text(str(choice.rows))


@pytest.mark.slow
def test_all_ranks_take_the_size_that_fits_on_the_fullest(tmp_path: Path) -> None:
    spawn_ranks(_choose_on_rank, tmp_path, 2)
    assert [(tmp_path / str(rank)).read_text() for rank in range(2)] == ["2", "2"]
