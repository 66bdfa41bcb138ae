"""Recognizes an allocation that failed, on any device, and tells the user what to lower."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from sft.errors import Problem, RankStopped, first_line

_SAID_BY_ALLOCATORS = (
    "can't allocate memory",  # torch's on the CPU
    "out of memory",  # CUDA, cuBLAS, NCCL and oneDNN
    "std::bad_alloc",
    "cannot allocate memory",  # the system's own words (errno 12)
    "not enough memory",
    "cublas_status_alloc_failed",
    "could not create a memory",  # oneDNN's scratch space
)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an allocation failed, on whatever device."""
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return True
    return isinstance(error, RuntimeError) and any(words in str(error).lower() for words in _SAID_BY_ALLOCATORS)


def allocator_message(error: BaseException) -> str:
    """Returns the first line of an allocator's message: CUDA's go on for hundreds of characters."""
    return first_line(error)[:200]


def out_of_memory(message: str, rows: int = 1) -> RankStopped:
    """The end of a run whose memory is gone, with what to do.

    Args:
        message: what ran out of it.
        rows: of a pass, where the run's config has them as a number that could be smaller.
    """
    hint = "shorten max_seq_length, set gradient_checkpointing: true, or train an adapter (lora_config)"
    if rows == 1:
        return RankStopped(Problem(message, hint, "max_seq_length"))
    lower = f"lower it from {rows} (global_batch_size keeps the rows of a step) or set it to auto"
    return RankStopped(Problem(message, f"{lower}; else {hint}", "per_device_train_batch_size"))


@contextmanager
def measuring(what: str, rows: int) -> Iterator[None]:
    """Around what measures the model on passes of `rows` rows: says so, and what to do, where memory runs out.

    Raises:
        RankStopped: it did.
    """
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        hint, key = "shorten max_seq_length", "max_seq_length"
        if rows > 1:
            hint, key = f"lower it from {rows}, which changes no metric", "per_device_eval_batch_size"
        raise RankStopped(Problem(f"{what} ran out of memory: {allocator_message(error)}", hint, key)) from error
