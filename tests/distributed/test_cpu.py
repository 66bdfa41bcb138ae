"""How fast this CPU multiplies in bfloat16; no test here depends on how fast it is."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
import torch.nn.functional as F

from sft.distributed import cpu as matmul_speed
from sft.distributed.cpu import FEWEST_ROUNDS, ROUNDS, TOKENS, measure_speedup, operations_a_second


class Machine:
    """A CPU whose products take what a test says; it counts them and keeps its own time."""

    def __init__(self, seconds: dict[torch.dtype, Iterator[float]]) -> None:
        self.seconds = seconds
        self.now = 0.0
        self.products: list[tuple[torch.dtype, int]] = []

    def linear(self, tokens: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        self.products.append((tokens.dtype, len(tokens)))
        self.now += next(self.seconds[tokens.dtype])
        return tokens

    def clock(self) -> float:
        return self.now


def machine(monkeypatch: pytest.MonkeyPatch, float32: list[float], bfloat16: list[float]) -> Machine:
    made = Machine({torch.float32: iter(float32), torch.bfloat16: iter(bfloat16)})
    monkeypatch.setattr(F, "linear", made.linear)
    return made


def test_the_fastest_large_products_are_compared(monkeypatch: pytest.MonkeyPatch) -> None:
    """In milliseconds. The first four of each are small products; the fifth is a large one that warms up."""
    float32, bfloat16 = [9, 1, 1, 1, 2, 5, 8, 4, 9, 4], [9, 1, 1, 1, 1, 4, 2, 3, 6, 2]
    made = machine(monkeypatch, [ms / 1000 for ms in float32], [ms / 1000 for ms in bfloat16])
    assert measure_speedup(made.clock) == pytest.approx(4 / 2)
    assert made.products[2 * (FEWEST_ROUNDS + 1) :] == [(torch.float32, TOKENS), (torch.bfloat16, TOKENS)] * (
        ROUNDS + 1
    )


def test_a_slow_machine_is_not_held_up(monkeypatch: pytest.MonkeyPatch) -> None:
    """Three rounds behind the one that warms up, although they take more than the time there is for all."""
    made = machine(monkeypatch, [0.001] * 4 + [0.1, 0.1, 0.2, 0.2], [0.001] * 4 + [0.1, 0.05, 0.2, 0.2])
    assert measure_speedup(made.clock) == pytest.approx(2)
    assert len(made.products) == 16


@pytest.mark.parametrize("size", ["small", "large"])
@pytest.mark.parametrize("calm", [1, 2, 3])
def test_a_busy_machine_flips_no_answer(monkeypatch: pytest.MonkeyPatch, size: str, calm: int) -> None:
    """In milliseconds; another program's turn of 100 falls into all of bfloat16's three rounds but one."""
    quiet, busy = [1, 1, 1, 1], [1, *(1 if number == calm else 101 for number in (1, 2, 3))]
    small, large = (busy, quiet) if size == "small" else (quiet, busy)
    fast, slow = [ms / 1000 for ms in small + large], [4 * ms / 1000 for ms in [*quiet, 30, 30, 30, 30]]
    made = machine(monkeypatch, slow, fast)
    assert measure_speedup(made.clock) == pytest.approx(120)


def test_a_cpu_without_a_kernel_is_not_asked_for_a_large_product(monkeypatch: pytest.MonkeyPatch) -> None:
    made = machine(monkeypatch, [1, 1, 1, 1], [1, 20, 20, 20])
    assert measure_speedup(made.clock) == 1 / 20
    assert max(rows for _, rows in made.products) < TOKENS


def test_this_cpu_is_measured_once_and_random_numbers_go_on(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    expected = torch.rand(1)
    torch.manual_seed(0)
    matmul_speed._measured.cache_clear()
    speedup = matmul_speed.bf16_speedup()
    assert 0 < speedup < 1000
    monkeypatch.setattr(matmul_speed, "measure_speedup", None)
    assert matmul_speed.bf16_speedup() == speedup
    assert torch.rand(1) == expected


def test_the_speed_is_the_fastest_rounds() -> None:
    """2 · 512 · 1024 · 4096 operations; each reading of the clock is the next of these."""
    readings = iter([0.0, 4.0, 4.0, 6.0, 6.0, 9.0, 9.0, 12.0, 12.0, 20.0])
    assert operations_a_second(torch.float32, lambda: next(readings)) == 2 * 512 * 1024 * 4096 / 2
