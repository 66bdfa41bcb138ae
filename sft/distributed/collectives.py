"""Collectives over all ranks. Without a process group each returns its own argument, so callers need no test."""

from __future__ import annotations

import os
from typing import TypeVar

import torch
import torch.distributed as dist

T = TypeVar("T")


def is_distributed() -> bool:
    """Returns whether several ranks train together."""
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def current_rank() -> int:
    """Returns this process's rank in the group; 0 without one."""
    return dist.get_rank() if is_distributed() else 0


def group_size() -> int:
    """The number of ranks in the group; 1 without one."""
    return dist.get_world_size() if is_distributed() else 1


def sum_over_ranks(tensor: torch.Tensor) -> torch.Tensor:
    """Sums `tensor` over all ranks; returns a new tensor of the same shape and on the same device.

    Counts are summed exactly in int64 and float64; float32 has no odd numbers above 2**24.
    """
    total = tensor.detach().clone()
    if is_distributed():
        total = _for_backend(total)
        dist.all_reduce(total)
    return total.to(tensor.device)


def max_over_ranks(values: list[float]) -> list[float]:
    """Returns the largest of each value over all ranks, as float64."""
    if not is_distributed():
        return values
    numbers = _for_backend(torch.tensor(values, dtype=torch.float64))
    dist.all_reduce(numbers, dist.ReduceOp.MAX)
    return numbers.tolist()


def from_first_rank(value: float) -> float:
    """Returns the first rank's `value` on every rank, as float64."""
    if not is_distributed():
        return value
    number = _for_backend(torch.tensor(value, dtype=torch.float64))
    dist.broadcast(number, src=0)
    return float(number)


def gather_objects(value: T) -> list[T]:
    """Returns every rank's `value`, in the order of the ranks; it is pickled on the way."""
    if not is_distributed():
        return [value]
    gathered: list[T] = [value] * dist.get_world_size()
    dist.all_gather_object(gathered, value)
    return gathered


def barrier() -> None:
    """Waits for every rank."""
    if is_distributed():
        dist.barrier(device_ids=[_local_device().index] if dist.get_backend() == "nccl" else None)


def _for_backend(tensor: torch.Tensor) -> torch.Tensor:
    """Returns `tensor` where the backend can read it: NCCL reads GPU memory alone."""
    return tensor.to(_local_device()) if dist.get_backend() == "nccl" and not tensor.is_cuda else tensor


def _local_device() -> torch.device:
    return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
