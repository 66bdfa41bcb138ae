"""Measures whether this CPU multiplies matrices faster in bfloat16 than in float32, in a few hundredths of a second.

The flags of a CPU do not answer that: a library without a kernel for AVX512_BF16 or AMX converts each number there and
back, and is many times slower than in float32. `torch.utils.benchmark` would run two warm-ups before each timed
multiplication, and its import takes longer than all that is measured here.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import cache

import torch
import torch.nn.functional as F

from sft.distributed.collectives import from_first_rank

TOKENS, WIDTH, WIDER = 128, 512, 2048
"""A feed-forward layer of a small model: 0.27 GFLOP, 3 ms in float32 on one core with AVX-512."""
ROUNDS, FEWEST_ROUNDS = 5, 3
"""On a busy machine one multiplication may wait 4 ms and more for another program, so one round decides nothing."""
BUDGET = 0.06  # seconds, after which no further round begins except the fewest
LARGE = (512, 1024, 4096)
"""Tokens and widths of a multiplication that keeps all threads busy: 4.3 GFLOP, 35 ms on one core with AVX-512."""
_SMALL = 16  # tokens of a first multiplication, for CPUs on which a large one in bfloat16 would take a second
_HOPELESS = 0.5


def bf16_speedup() -> float:
    """Returns how many times faster a linear layer runs in bfloat16 than in float32, as the first rank measured it.

    All ranks must call it, and all get the same number.
    """
    return from_first_rank(local_bf16_speedup())


@cache
def local_bf16_speedup() -> float:
    """Measures the speedup in this process, on one thread and once."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # the same ratio (4.2), and no thread waits for one that another program holds up
    try:
        return measure_speedup(time.perf_counter)
    finally:
        torch.set_num_threads(threads)


def measure_speedup(clock: Callable[[], float]) -> float:
    """Returns float32's time over bfloat16's, each the shortest of some rounds in turns; below 1: bfloat16 is slower.

    The shortest, because other programs on the machine only ever add to a time: with more programs than cores the
    ratio of medians was once 20. Draws no random numbers.

    Args:
        clock: seconds that pass, as `time.perf_counter`.
    """
    weight = torch.linspace(-1, 1, WIDTH * WIDER).view(WIDER, WIDTH)
    tokens = torch.linspace(-1, 1, TOKENS * WIDTH).view(TOKENS, WIDTH)
    few, many = _in_both_dtypes(tokens[:_SMALL], weight), _in_both_dtypes(tokens, weight)
    speedup = _time_ratio(few, FEWEST_ROUNDS, clock)
    return speedup if speedup < _HOPELESS else _time_ratio(many, ROUNDS, clock)


@torch.no_grad()
def measure_flops_per_second(dtype: torch.dtype, clock: Callable[[], float]) -> float:
    """Returns the FLOP/s of a large matrix multiplication on all threads, in the fastest of some rounds.

    No training step comes near it: it is a bound, not a forecast.

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


def _in_both_dtypes(tokens: torch.Tensor, weight: torch.Tensor) -> list[tuple[torch.Tensor, torch.Tensor]]:
    return [(tokens.to(dtype), weight.to(dtype)) for dtype in (torch.float32, torch.bfloat16)]


@torch.no_grad()
def _time_ratio(pairs: list[tuple[torch.Tensor, torch.Tensor]], rounds: int, clock: Callable[[], float]) -> float:
    """Returns the first pair's shortest time over the second's; the first multiplication of each is a warm-up."""
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
