"""Recognizes a failed allocation on any device and says which config key to lower."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from sft.errors import Problem, RankStopped, first_line

_MESSAGES = (
    "can't allocate memory",  # torch's on the CPU
    "out of memory",  # CUDA, cuBLAS, NCCL and oneDNN
    "std::bad_alloc",
    "cannot allocate memory",  # the operating system's (errno 12)
    "not enough memory",
    "cublas_status_alloc_failed",
    "could not create a memory",  # oneDNN's scratch space
)


def is_out_of_memory(error: BaseException) -> bool:
    """Returns whether an allocation failed, on whatever device."""
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return True
    return isinstance(error, RuntimeError) and any(message in str(error).lower() for message in _MESSAGES)


def allocator_message(error: BaseException) -> str:
    """Returns the first line of an allocator's message: CUDA's go on for hundreds of characters."""
    return first_line(error)[:200]


def out_of_memory(message: str, batch_size: int = 1) -> RankStopped:
    """Returns the error that ends a run which ran out of memory, with a hint.

    Args:
        message: what ran out of memory.
        batch_size: `per_device_train_batch_size`, where the config sets it to a number that could be smaller.
    """
    hint = "shorten max_seq_length, set gradient_checkpointing: true, or train an adapter (lora_config)"
    if batch_size == 1:
        return RankStopped(Problem(message, hint, "max_seq_length"))
    lower = f"lower it from {batch_size} (global_batch_size keeps the samples of a step) or set it to auto"
    return RankStopped(Problem(message, f"{lower}; else {hint}", "per_device_train_batch_size"))


@contextmanager
def oom_during_evaluation(what: str, batch_size: int) -> Iterator[None]:
    """Turns an out-of-memory error during an evaluation on batches of `batch_size` samples into one with a hint.

    Raises:
        RankStopped: memory ran out.
    """
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        hint, key = "shorten max_seq_length", "max_seq_length"
        if batch_size > 1:
            hint, key = f"lower it from {batch_size}, which changes no metric", "per_device_eval_batch_size"
        raise RankStopped(Problem(f"{what} ran out of memory: {allocator_message(error)}", hint, key)) from error
