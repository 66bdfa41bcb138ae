"""Ranks of a test (processes in one gloo group, without a launcher), free ports, and GPUs that it pretends to have."""

from __future__ import annotations

import os
import secrets
import socket
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from distributed_utils import end_process
from sft.distributed import gpus


def spawn_ranks(run: Callable[[int, Path], None], folder: Path, world_size: int) -> None:
    """Calls `run(rank, folder)` in each of `world_size` processes and waits for them; raises their errors here."""
    mp.spawn(_rank, (run, folder, world_size), nprocs=world_size)


def _rank(rank: int, run: Callable[[int, Path], None], folder: Path, world_size: int) -> None:
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world_size)}
    torch.set_num_threads(1)
    store = f"file://{folder}/store"
    dist.init_process_group("gloo", init_method=store, rank=rank, world_size=world_size)
    run(rank, folder)
    dist.destroy_process_group()
    end_process(0)


def pretend_gpus(monkeypatch: pytest.MonkeyPatch, count: int) -> None:
    """Makes the machine one with `count` GPUs, as far as anybody counts them."""
    monkeypatch.setattr(gpus, "visible_gpus", lambda: count)
    monkeypatch.setattr(gpus, "has_gpu_driver", lambda: count > 0)


def free_ports(count: int) -> list[int]:
    """Returns different free ports below those that the kernel gives to clients (32768 and up)."""
    ports: list[int] = []
    while len(ports) < count:
        port = 10_000 + secrets.randbelow(20_000)
        with socket.socket() as one, suppress(OSError):
            one.bind(("127.0.0.1", port))
            ports += [port] * (port not in ports)
    return ports
