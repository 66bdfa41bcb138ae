"""`per_device_train_batch_size: auto`: the size of a micro-batch, found by running the longest real samples.

The memory of a micro-batch has a constant part and a part that grows with its size. So the peaks of two sizes predict
that of the next, and no size is run that is predicted not to fit: a GPU's allocator raises an error that can be caught,
but on a CPU the kernel kills a process that runs out of memory.
"""

from __future__ import annotations

import gc
import random
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch
from torch import nn

from sft.distributed.collectives import max_over_ranks
from sft.distributed.memory import peak_bytes, reset_peak
from sft.distributed.oom import is_out_of_memory
from sft.errors import Problem, UserError

_KEY = "per_device_train_batch_size"
_MIN_GAIN = 1.03  # a larger size must be faster by this; less is noise, and its memory is better left free
_MAX_WITHOUT_GAIN = 2  # sizes in a row without that gain, after which larger ones are not tried


@dataclass(frozen=True, slots=True)
class Probe:
    """Measurements of a micro-batch of `rows` samples, the largest of all ranks.

    Attributes:
        seconds: of forward and backward pass, once all memory had been allocated before.
        peak: bytes; of what the allocator held on a CUDA device, of resident memory elsewhere.
        fits: no rank ran out of memory.
    """

    rows: int
    seconds: float
    peak: int
    fits: bool = True

    @property
    def speed(self) -> float:
        """Samples per second of one rank."""
        return self.rows / self.seconds


@dataclass(frozen=True, slots=True)
class BatchChoice:
    """The chosen size, all probes, and why no larger size was chosen."""

    rows: int
    probes: tuple[Probe, ...]
    reason: str


def candidate_sizes(rows_per_step: int | None, longest: int) -> list[int]:
    """Lists the possible sizes of a micro-batch, ascending.

    Args:
        rows_per_step: samples of an optimizer step on one rank (`global_batch_size` / ranks), which every size divides,
            so that gradient accumulation gives exactly the same step; None for powers of two.
        longest: the largest size, e.g. the number of samples.
    """
    if rows_per_step is None:
        return [2**power for power in range(max(1, longest).bit_length())]
    return [rows for rows in range(1, min(rows_per_step, max(1, longest)) + 1) if rows_per_step % rows == 0]


def longest_rows(lengths: np.ndarray, count: int) -> np.ndarray:
    """Returns the indices of the `count` longest samples, longest first: (count,). No other batch takes more memory."""
    return np.argsort(-np.asarray(lengths), kind="stable")[:count]


def choose_batch_size(
    model: nn.Module,
    run_pass: Callable[[int], None],
    candidates: Sequence[int],
    *,
    budget: int,
    reserve: int,
    device: torch.device,
    seconds: float = 20.0,
    clock: Callable[[], float] = time.perf_counter,
    peak: Callable[[torch.device], int] = peak_bytes,
) -> BatchChoice:
    """Chooses the fastest size that fits in memory; of sizes equally fast (within 3 %) the smallest.

    On CPUs larger sizes soon are no faster: a few samples keep all cores busy and stay in their caches. All ranks must
    call it with the same candidates: they make the same probes together and take the worst measurement of each.
    Afterwards parameters, gradients, buffers and random number generators are as before.

    Args:
        model: whose gradients `run_pass` fills.
        run_pass: the trainer's forward and backward pass over that many of its longest samples.
        candidates: ascending, from `candidate_sizes`.
        budget: bytes that the process may hold at its peak: a share of `memory_limit`. All ranks take the smallest.
        reserve: bytes that training will hold and a probe does not: optimizer states not yet made, DDP's buckets.
        seconds: no further size is tried once the probes have taken that long.

    Raises:
        UserError: the smallest size does not fit.
    """
    started = clock()
    available = -round(max_over_ranks([float(reserve - budget)])[0])
    limit = f"than the {available / 2**30:.2f} GiB that are available"
    probes: list[Probe] = []
    reason = "no larger size divides the samples of a step, or there are no more samples"
    with undisturbed(model):
        for rows in candidates:
            if probes and _predict_peak(probes, rows) > available:
                reason = f"{rows} samples would take more {limit}"
                break
            probes.append(_probe(model, run_pass, rows, device, clock, peak))
            if not _fits(probes[-1], available):
                reason = f"{rows} samples take more {limit}"
                break
            if _fastest(probes)[1] == _MAX_WITHOUT_GAIN:
                reason = "larger micro-batches are not faster"
                break
            if max_over_ranks([clock() - started])[0] > seconds:
                reason = "the time for probing is over"
                break
    fitting = [probe for probe in probes if _fits(probe, available)]
    if not fitting:
        raise _nothing_fits(probes[-1], available)
    return BatchChoice(_fastest(fitting)[0].rows, tuple(probes), reason)


def _fits(probe: Probe, available: int) -> bool:
    return probe.fits and probe.peak <= available


def _fastest(probes: Sequence[Probe]) -> tuple[Probe, int]:
    """Returns the fastest probe, and how many were made since."""
    best, since = probes[0], 0
    for probe in probes[1:]:
        best, since = (probe, 0) if probe.speed > best.speed * _MIN_GAIN else (best, since + 1)
    return best, since


def _nothing_fits(probe: Probe, available: int) -> UserError:
    needed = f"brings the process to {probe.peak / 2**30:.2f} GiB" if probe.fits else "runs out of memory"
    message = (
        f"auto: a micro-batch of {probe.rows} of the longest samples {needed}, "
        f"and {available / 2**30:.2f} GiB are available for it"
    )
    hint = "shorten max_seq_length, set gradient_checkpointing: true, or train an adapter (lora_config)"
    return UserError(Problem(message, hint, _KEY))


def _predict_peak(probes: Sequence[Probe], rows: int) -> int:
    """Predicts the peak of `rows` samples from the line through the last two probes; 0 before there are two."""
    if len(probes) < 2:
        return 0
    one, two = probes[-2:]
    slope = max(0, two.peak - one.peak) / (two.rows - one.rows)
    return round(two.peak + slope * (rows - two.rows))


def _probe(
    model: nn.Module,
    run_pass: Callable[[int], None],
    rows: int,
    device: torch.device,
    clock: Callable[[], float],
    peak: Callable[[torch.device], int],
) -> Probe:
    """Runs the micro-batch twice, the second time with the gradients of the first, as in accumulation, and timed."""
    model.zero_grad(set_to_none=True)
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
    reset_peak(device)
    fits, seconds = True, 0.0
    try:
        for _ in range(2):
            _wait(device)
            started = clock()
            run_pass(rows)
            _wait(device)
            seconds = clock() - started
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        fits = False
    seconds, most, failed = max_over_ranks([seconds, peak(device), float(not fits)])
    return Probe(rows, max(seconds, 1e-9), int(most), not failed)


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


@contextmanager
def undisturbed(model: nn.Module) -> Iterator[None]:
    """Restores gradients, buffers, training mode and all random number generators at its end."""
    gradients = [(parameter, parameter.grad) for parameter in model.parameters()]
    buffers = [(buffer, buffer.detach().clone()) for buffer in model.buffers()]
    modes = [(module, module.training) for module in model.modules()]
    python, numpy, cpu = random.getstate(), np.random.get_state(), torch.get_rng_state()
    cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else []
    for parameter, _ in gradients:
        parameter.grad = None
    try:
        yield
    finally:
        for parameter, gradient in gradients:
            parameter.grad = gradient
        with torch.no_grad():
            for buffer, value in buffers:
                buffer.copy_(value)
        for module, mode in modes:
            module.training = mode
        random.setstate(python)
        np.random.set_state(numpy)
        torch.set_rng_state(cpu)
        if cuda:
            torch.cuda.set_rng_state_all(cuda)
