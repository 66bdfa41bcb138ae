"""How a CPU's speed in bfloat16 is measured. No test here depends on how fast this one is."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator

import pytest
import torch
import torch.nn.functional as F

from sft.distributed import cpu
from sft.distributed.cpu import FEWEST_ROUNDS, ROUNDS, TOKENS, measure_flops_per_second, measure_speedup


class Machine:
    """A CPU whose matrix multiplications take the given seconds; it records them and has a clock of its own."""

    def __init__(self, seconds: dict[torch.dtype, Iterator[float]]) -> None:
        self.seconds = seconds
        self.now = 0.0
        self.calls: list[tuple[torch.dtype, int]] = []

    def linear(self, tokens: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        self.calls.append((tokens.dtype, len(tokens)))
        self.now += next(self.seconds[tokens.dtype])
        return tokens

    def clock(self) -> float:
        return self.now


def machine(monkeypatch: pytest.MonkeyPatch, float32: list[float], bfloat16: list[float]) -> Machine:
    made = Machine({torch.float32: iter(float32), torch.bfloat16: iter(bfloat16)})
    monkeypatch.setattr(F, "linear", made.linear)
    return made


def test_the_fastest_large_multiplications_are_compared(monkeypatch: pytest.MonkeyPatch) -> None:
    """In milliseconds. The first four of each are small multiplications; the fifth is the warm-up of the large ones."""
    float32, bfloat16 = [9, 1, 1, 1, 2, 5, 8, 4, 9, 4], [9, 1, 1, 1, 1, 4, 2, 3, 6, 2]
    made = machine(monkeypatch, [ms / 1000 for ms in float32], [ms / 1000 for ms in bfloat16])
    assert measure_speedup(made.clock) == pytest.approx(4 / 2)
    assert made.calls[2 * (FEWEST_ROUNDS + 1) :] == [(torch.float32, TOKENS), (torch.bfloat16, TOKENS)] * (ROUNDS + 1)


def test_a_slow_machine_runs_the_fewest_rounds(monkeypatch: pytest.MonkeyPatch) -> None:
    """Three rounds after the warm-up, although they exceed the budget."""
    made = machine(monkeypatch, [0.001] * 4 + [0.1, 0.1, 0.2, 0.2], [0.001] * 4 + [0.1, 0.05, 0.2, 0.2])
    assert measure_speedup(made.clock) == pytest.approx(2)
    assert len(made.calls) == 16


@pytest.mark.parametrize("size", ["small", "large"])
@pytest.mark.parametrize("calm", [1, 2, 3])
def test_a_busy_machine_flips_no_answer(monkeypatch: pytest.MonkeyPatch, size: str, calm: int) -> None:
    """In milliseconds; another program takes 100 of all but one of bfloat16's three rounds."""
    quiet, busy = [1, 1, 1, 1], [1, *(1 if number == calm else 101 for number in (1, 2, 3))]
    small, large = (busy, quiet) if size == "small" else (quiet, busy)
    fast, slow = [ms / 1000 for ms in small + large], [4 * ms / 1000 for ms in [*quiet, 30, 30, 30, 30]]
    made = machine(monkeypatch, slow, fast)
    assert measure_speedup(made.clock) == pytest.approx(120)


def test_a_cpu_without_a_kernel_runs_no_large_multiplication(monkeypatch: pytest.MonkeyPatch) -> None:
    made = machine(monkeypatch, [1, 1, 1, 1], [1, 20, 20, 20])
    assert measure_speedup(made.clock) == 1 / 20
    assert max(rows for _, rows in made.calls) < TOKENS


def test_a_measurement_draws_no_random_numbers() -> None:
    torch.manual_seed(0)
    expected = torch.rand(1)
    torch.manual_seed(0)
    ticks = itertools.count()
    assert measure_speedup(lambda: float(next(ticks))) == 1
    assert torch.rand(1) == expected


@pytest.fixture
def _unmeasured() -> Iterator[None]:
    """Neither an earlier test's measurement nor one of this test for a later one."""
    cpu.local_bf16_speedup.cache_clear()
    yield
    cpu.local_bf16_speedup.cache_clear()


@pytest.mark.usefixtures("_unmeasured")
def test_a_process_measures_once_and_on_one_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    threads: list[int] = []

    def measure(_clock: Callable[[], float]) -> float:
        threads.append(torch.get_num_threads())
        return 2.5

    monkeypatch.setattr(cpu, "measure_speedup", measure)
    before = torch.get_num_threads()
    assert [cpu.bf16_speedup(), cpu.bf16_speedup()] == [2.5, 2.5]
    assert threads == [1]
    assert torch.get_num_threads() == before


def test_the_speed_is_the_fastest_rounds() -> None:
    """2 · 512 · 1024 · 4096 operations; each reading of the clock is the next of these."""
    readings = iter([0.0, 4.0, 4.0, 6.0, 6.0, 9.0, 9.0, 12.0, 12.0, 20.0])
    assert measure_flops_per_second(torch.float32, lambda: next(readings)) == 2 * 512 * 1024 * 4096 / 2
