"""`per_device_train_batch_size: auto`: how many rows a pass may have, found by running the longest real ones.

A pass costs a part that is there for any number of rows and a part that grows with them. So a pass of one row and one
of the next size foretell the others, and none is run that is foretold not to fit: a GPU's allocator raises an error
that can be caught, but on a CPU the kernel kills a process whose memory is gone, without asking it.
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
_WORTH = 1.03  # a larger pass must be faster by this; less is noise, and its memory is better left free
_UNFRUITFUL = 2  # sizes in a row that were not worth it, after which larger ones are not tried


@dataclass(frozen=True, slots=True)
class Probe:
    """What a pass of `rows` rows took, on the rank where it took most.

    Attributes:
        seconds: forward and backward, once everything had been allocated before.
        peak: bytes; of what the allocator held on a CUDA device, of resident memory elsewhere.
        fits: it did not run out of memory, on any rank.
    """

    rows: int
    seconds: float
    peak: int
    fits: bool = True

    @property
    def speed(self) -> float:
        """Rows a second on one rank."""
        return self.rows / self.seconds


@dataclass(frozen=True, slots=True)
class BatchChoice:
    """The size that was chosen, what all probes took, and why no larger one was taken."""

    rows: int
    probes: tuple[Probe, ...]
    reason: str


def candidate_sizes(rows_per_step: int | None, longest: int) -> list[int]:
    """The sizes that a pass may have, rising.

    Args:
        rows_per_step: rows of an optimizer step on one rank (`global_batch_size` / ranks), which every size divides,
            so that accumulation makes up for a smaller one exactly; None for powers of two.
        longest: no size is larger, e.g. the rows there are.
    """
    if rows_per_step is None:
        return [2**power for power in range(max(1, longest).bit_length())]
    return [rows for rows in range(1, min(rows_per_step, max(1, longest)) + 1) if rows_per_step % rows == 0]


def longest_rows(lengths: np.ndarray, count: int) -> np.ndarray:
    """Indices of the `count` longest rows, longest first: (count,). No batch of that size takes more memory."""
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
) -> BatchChoice:
    """The size that is fastest among those that fit; of sizes equally fast (within 3 %) the smallest.

    On CPUs larger passes soon stop paying, for a few rows keep all cores busy and fewer stay in their caches. All
    ranks must call it, with the same candidates: they go through the same probes together and take the worst of each.
    Parameters, gradients, buffers and random numbers are afterwards what they were before.

    Args:
        model: whose gradients `run_pass` fills.
        run_pass: the trainer's forward and backward pass over that many of its longest rows.
        candidates: rising, from `candidate_sizes`.
        budget: bytes that the process may hold at its peak: a share of `memory_limit`. The smallest of all ranks' is
            everybody's.
        reserve: bytes that training will hold and a probe does not: optimizer states not yet made, DDP's buckets.
        seconds: no further size is tried once the probes have taken that long.
        clock: tells the seconds since some moment.

    Raises:
        UserError: the smallest size does not fit.
    """
    started = clock()
    room = -round(max_over_ranks([float(reserve - budget)])[0])
    probes: list[Probe] = []
    best: Probe | None = None
    unfruitful, reason = 0, "no larger size divides the rows of a step, or there are no more rows"
    with undisturbed(model):
        for rows in candidates:
            if probes and _foretold(probes, rows) > room:
                reason = f"{rows} rows would take more than the {room / 2**30:.2f} GiB that a pass may bring it to"
                break
            probes.append(_probe(model, run_pass, rows, device, clock))
            if not probes[-1].fits or probes[-1].peak > room:
                reason = f"{rows} rows take more than the {room / 2**30:.2f} GiB that a pass may bring it to"
                break
            if best is None or probes[-1].speed > best.speed * _WORTH:
                best, unfruitful = probes[-1], 0
            else:
                unfruitful += 1
            if unfruitful == _UNFRUITFUL:
                reason = "larger passes are not faster"
                break
            if max_over_ranks([clock() - started])[0] > seconds:
                reason = "the time for probing was over"
                break
    if best is None:
        raise _nothing_fits(probes[-1], room)
    return BatchChoice(best.rows, tuple(probes), reason)


def _nothing_fits(probe: Probe, room: int) -> UserError:
    needed = f"brings the process to {probe.peak / 2**30:.2f} GiB" if probe.fits else "runs out of memory"
    message = f"auto: a pass of {probe.rows} of the longest rows {needed}, and {room / 2**30:.2f} GiB are left for it"
    hint = "shorten max_seq_length, set gradient_checkpointing: true, or train an adapter (lora_config)"
    return UserError(Problem(message, hint, _KEY))


def _foretold(probes: Sequence[Probe], rows: int) -> int:
    """The peak of a pass of `rows` rows on the line through the last two probes; 0 before there are two."""
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
) -> Probe:
    """Two passes, the second with the gradients of the first in place, as in accumulation; that one is timed."""
    model.zero_grad(set_to_none=True)
    release(device)
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
    seconds, peak, failed = max_over_ranks([seconds, peak_bytes(device), float(not fits)])
    return Probe(rows, max(seconds, 1e-9), int(peak), not failed)


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def release(device: torch.device) -> None:
    """Gives back what nothing refers to any more, so that the next pass finds it free."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


@contextmanager
def undisturbed(model: nn.Module) -> Iterator[None]:
    """Passes run inside leave no trace: gradients, buffers, mode and all random number generators are put back."""
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
