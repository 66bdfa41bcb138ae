"""Ranks of a test: processes in one gloo group, without a launcher."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from distributed_utils import end_process


def spawn_ranks(run: Callable[[int, Path], None], folder: Path, world_size: int) -> None:
    """Calls `run(rank, folder)` in each of `world_size` processes and waits for them; its errors are raised here."""
    mp.spawn(_rank, (run, folder, world_size), nprocs=world_size)


def _rank(rank: int, run: Callable[[int, Path], None], folder: Path, world_size: int) -> None:
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world_size)}
    torch.set_num_threads(1)
    store = f"file://{folder}/store"
    dist.init_process_group("gloo", init_method=store, rank=rank, world_size=world_size)
    run(rank, folder)
    dist.destroy_process_group()
    end_process(0)
