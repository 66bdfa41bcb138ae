"""The rank of this process, its devices, and the process group.

Ranks are read from the variables that torchrun sets; a process started by plain Python is the only one. Data is
prepared before `init_process_group`, because a process that waited for another's data in a collective could time out.
"""

from __future__ import annotations

import atexit
import logging
import os
import sys
from datetime import timedelta
from typing import NoReturn

from sft.distributed import gpus
from sft.errors import Problem, UserError

logger = logging.getLogger("sft")

TIMEOUT_SECONDS = 1800.0  # of one collective; the others wait in it while rank 0 writes checkpoints and cards


def is_launched() -> bool:
    """Returns whether torchrun (or `launch_training.sh`) started this process, as one of a group."""
    return "RANK" in os.environ and "WORLD_SIZE" in os.environ


def rank() -> int:
    """Returns the number of this process among all, from 0."""
    return int(os.environ.get("RANK", "0"))


def world_size() -> int:
    """Returns how many processes train together, on all nodes."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def local_rank() -> int:
    """Returns the number of this process on its node, from 0, which is also that of its GPU."""
    return int(os.environ.get("LOCAL_RANK", "0"))


def local_world_size() -> int:
    """Returns how many processes train together on this node."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", "1"))


def is_main_process() -> bool:
    """Returns whether this process writes files and prints."""
    return rank() == 0


def claim_devices(num_gpus: int | None = None, *, use_cpu: bool = False) -> int:
    """Selects this process's GPU and returns how many GPUs the node's processes use together (0: the CPU).

    Call it before anything asks CUDA for its devices, even importing transformers: CUDA reads CUDA_VISIBLE_DEVICES
    once. A single process that sees several GPUs keeps the first, for `Trainer` would wrap the model in
    `nn.DataParallel`, which is slower than one process per GPU and changes the batch size.

    Args:
        num_gpus: as in the config: None uses every GPU, 0 the CPU.
        use_cpu: as in the config: use no GPU.

    Raises:
        UserError: there are fewer GPUs than `num_gpus`, or than processes on this node.
    """
    if num_gpus == 0 or use_cpu:
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
        return 0
    if num_gpus:
        gpus.require_gpus(num_gpus)
    found = gpus.visible_gpus()
    if found == 0:
        return 0
    if is_launched():
        gpus.require_gpus(local_world_size(), key="--nproc_per_node", file="command line")
        if num_gpus and num_gpus != local_world_size():
            logger.warning("num_gpus is %d, but %d processes were started on this node", num_gpus, local_world_size())
        import torch

        torch.cuda.set_device(local_rank())
        return local_world_size()
    if found > 1:
        first = os.environ.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0].strip()
        os.environ["CUDA_VISIBLE_DEVICES"] = first
        wanted = num_gpus or found
        logger.warning(
            "%d GPUs are visible and this is one process: it uses GPU %s; to use %d: ./launch_training.sh --gpus %d",
            *(found, first, wanted, wanted),
        )
    return 1


def choose_backend(ddp_backend: str | None = None, *, use_cpu: bool = False) -> str:
    """Returns the backend of the process group: `ddp_backend`, else nccl where there are GPUs, else gloo.

    Raises:
        UserError: this torch lacks the backend, or it needs GPUs and there are none.
    """
    import torch.distributed as dist

    on_gpu = not use_cpu and gpus.visible_gpus() > 0
    if ddp_backend is None:
        return "nccl" if on_gpu and dist.is_nccl_available() else "gloo"
    if ddp_backend == "nccl" and not on_gpu:
        message = "'nccl' works between GPUs, and this run has none"
        raise UserError(Problem(message, "remove it, or write gloo", "ddp_backend"))
    offered = [name for name in ("nccl", "gloo", "ucc", "mpi", "xccl") if dist.is_backend_available(name)]
    if ddp_backend not in offered:
        message = f"{ddp_backend!r} is not in this build of torch"
        raise UserError(Problem(message, f"it has {', '.join(offered)}", "ddp_backend"))
    return ddp_backend


def init_process_group(backend: str, timeout_seconds: float = TIMEOUT_SECONDS) -> None:
    """Joins the process group and waits for every process; does nothing for a single one, and when called again.

    Work that takes the processes unequal time belongs before it.
    """
    import torch
    import torch.distributed as dist

    if world_size() == 1 or dist.is_initialized():
        return
    device = torch.device("cuda", local_rank()) if backend == "nccl" else None
    dist.init_process_group(backend, timeout=timedelta(seconds=timeout_seconds), device_id=device)
    logger.info("process group: %d processes over %s", world_size(), backend)


def end_process(code: int) -> NoReturn:
    """Exits with `code`; one of several processes does so without finalizing the interpreter.

    Threads of gloo, which nothing ends, may hold the tensors of the last collective a moment longer than the callers
    that waited for it. If they release them while the interpreter finalizes, it aborts (exit code -6) after a good run.
    """
    if world_size() > 1:
        atexit._run_exitfuncs()  # trackers send what they still hold
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    sys.exit(code)


def destroy_process_group() -> None:
    """Leaves the process group, if this process is in one, once every rank is here."""
    import torch.distributed as dist

    if dist.is_available() and dist.is_initialized():
        from sft.distributed.collectives import barrier

        barrier()
        dist.destroy_process_group()


def require_agreement(facts: dict[str, object]) -> None:
    """Checks that the facts are the same on every rank.

    Each finds checkpoints and data by itself, and nodes without a shared disk may find different ones.

    Raises:
        UserError: on every rank, naming what differs and the first two values.
    """
    from sft.distributed.collectives import gather_objects

    by_rank = gather_objects(facts)
    problems = [
        Problem(f"{name}: {by_rank[0][name]!r} on rank 0, {other[name]!r} on rank {number}", "use a shared folder")
        for name in facts
        for number, other in enumerate(by_rank)
        if other[name] != by_rank[0][name]
    ]
    if problems:
        raise UserError(*problems[:5])
