"""Whether this CPU multiplies matrices faster in bfloat16 than in float32: measured, in a few hundredths of a second.

The flags of a CPU do not tell it: a library without a kernel for AVX512_BF16 or AMX converts each number there and
back, and is many times slower than in float32.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import cache

import torch
import torch.nn.functional as F

from sft.distributed.collectives import from_first_rank

TOKENS, WIDTH, WIDER = 128, 512, 2048
"""A feed-forward product of a small model: 0.27 GFLOP, 3 ms in float32 on one core with AVX-512."""
ROUNDS, FEWEST_ROUNDS = 5, 3
"""On a busy machine a product may wait for another program's turn, 4 ms and more, and one round decides nothing."""
BUDGET = 0.06  # seconds, after which no further round begins but the fewest
LARGE = (512, 1024, 4096)
"""Of a product that keeps all threads busy: 4.3 GFLOP, 35 ms in float32 on one core with AVX-512."""
_SMALL = 16  # rows of a first product, for CPUs on which a large one in bfloat16 would take a second
_HOPELESS = 0.5


def bf16_speedup() -> float:
    """How many times faster than in float32 a linear layer runs in bfloat16, measured once in a process.

    On the first rank's word: all ranks must call it, and all get the same number.
    """
    return from_first_rank(_measured())


@cache
def _measured() -> float:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # the same ratio (4.2), and no thread that waits for one which another program holds up
    try:
        return measure_speedup(time.perf_counter)
    finally:
        torch.set_num_threads(threads)


def measure_speedup(clock: Callable[[], float]) -> float:
    """float32's time over bfloat16's, each the shortest of some rounds in turns; below 1 where bfloat16 is slower.

    The shortest, because whatever else runs on the machine only ever adds to a time: with more programs than cores the
    ratio of medians was once 20. The caller's random numbers are left as they were.

    Args:
        clock: seconds that pass, as `time.perf_counter`.
    """
    weight = torch.linspace(-1, 1, WIDTH * WIDER).view(WIDER, WIDTH)
    tokens = torch.linspace(-1, 1, TOKENS * WIDTH).view(TOKENS, WIDTH)
    few, many = _pairs(tokens[:_SMALL], weight), _pairs(tokens, weight)
    speedup = _race(few, FEWEST_ROUNDS, clock)
    return speedup if speedup < _HOPELESS else _race(many, ROUNDS, clock)


@torch.no_grad()
def operations_a_second(dtype: torch.dtype, clock: Callable[[], float]) -> float:
    """Floating point operations a second of a large product on all threads: the fastest of some rounds.

    No step of training comes so far: it is a bound, not a forecast.

    Args:
        clock: seconds that pass, as `time.perf_counter`.
    """
    tokens, width, wider = LARGE
    inputs, weight = torch.ones(tokens, width, dtype=dtype), torch.ones(wider, width, dtype=dtype)
    best = float("inf")
    for _ in range(ROUNDS):
        started = clock()
        F.linear(inputs, weight)
        best = min(best, clock() - started)
    return 2 * tokens * width * wider / best


def _pairs(tokens: torch.Tensor, weight: torch.Tensor) -> list[tuple[torch.Tensor, torch.Tensor]]:
    return [(tokens.to(dtype), weight.to(dtype)) for dtype in (torch.float32, torch.bfloat16)]


@torch.no_grad()
def _race(pairs: list[tuple[torch.Tensor, torch.Tensor]], rounds: int, clock: Callable[[], float]) -> float:
    """Seconds of the first pair's fastest product over those of the second's; the first of each warms it up."""
    best = [float("inf")] * len(pairs)
    began = clock()
    for round_number in range(rounds + 1):
        for index, (tokens, weight) in enumerate(pairs):
            started = clock()
            F.linear(tokens, weight)  # (tokens, WIDTH) x (WIDTH, WIDER)
            if round_number:
                best[index] = min(best[index], clock() - started)
        if round_number >= FEWEST_ROUNDS and clock() - began > BUDGET:
            break
    return best[0] / best[1]
