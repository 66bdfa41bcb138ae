"""Which process this is, what devices it may use, and the process group: what stands under every stage.

Everything is read from the variables that torchrun sets; a process that was started by plain Python is the only one.
Data is prepared before `init_process_group`, so that no process meanwhile waits for another inside a collective with a
time limit.
"""

from __future__ import annotations

import atexit
import logging
import os
import sys
from datetime import timedelta
from typing import TYPE_CHECKING, NoReturn

from sft.distributed.gpus import require_gpus, visible_gpus
from sft.errors import Problem, UserError

if TYPE_CHECKING:
    pass

logger = logging.getLogger("sft")

TIMEOUT_SECONDS = 1800.0  # for one collective; rank 0 alone writes checkpoints and cards while the others wait


def launched() -> bool:
    """Whether torchrun (or `launch_training.sh`) started this process, as one of a group."""
    return "RANK" in os.environ and "WORLD_SIZE" in os.environ


def rank() -> int:
    """The number of this process among all, from 0."""
    return int(os.environ.get("RANK", "0"))


def world_size() -> int:
    """How many processes train together, on all nodes."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def local_rank() -> int:
    """The number of this process on its node, from 0: its GPU."""
    return int(os.environ.get("LOCAL_RANK", "0"))


def local_world_size() -> int:
    """How many processes train together on this node."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", "1"))


def is_main_process() -> bool:
    """Whether this process writes and prints."""
    return rank() == 0


def claim_devices(num_gpus: int | None = None, *, use_cpu: bool = False) -> int:
    """Gives this process the GPU that is its own and returns how many GPUs the node's processes share (0: the CPU).

    Call it before anything asks CUDA for its devices, importing transformers included: CUDA reads CUDA_VISIBLE_DEVICES
    once. A process that stands alone and sees several GPUs keeps the first, for `Trainer` would wrap the model in
    `nn.DataParallel`, which is slower than one process per GPU and changes the batch size.

    Args:
        num_gpus: as in the config: None takes what is there, 0 the CPU.
        use_cpu: as in the config: keep off the GPUs.

    Raises:
        UserError: there are fewer GPUs than `num_gpus`, or than processes on this node.
    """
    if num_gpus == 0 or use_cpu:
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
        return 0
    if num_gpus:
        require_gpus(num_gpus)
    found = visible_gpus()
    if found == 0:
        return 0
    if launched():
        require_gpus(local_world_size(), key="--nproc_per_node", file="command line")
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
    """The backend of the process group: the one that is asked for, else nccl where there are GPUs, else gloo.

    Raises:
        UserError: it is not part of this torch, or needs GPUs where there are none.
    """
    import torch.distributed as dist

    on_gpu = not use_cpu and visible_gpus() > 0
    if ddp_backend is None:
        return "nccl" if on_gpu and dist.is_nccl_available() else "gloo"
    if ddp_backend == "nccl" and not on_gpu:
        raise UserError(
            Problem("'nccl' works between GPUs, and this run has none", "leave it out, or write gloo", "ddp_backend")
        )
    offered = [name for name in ("nccl", "gloo", "ucc", "mpi", "xccl") if dist.is_backend_available(name)]
    if ddp_backend not in offered:
        message = f"{ddp_backend!r} is not in this build of torch"
        raise UserError(Problem(message, f"it has {', '.join(offered)}", "ddp_backend"))
    return ddp_backend


def init_process_group(backend: str, timeout_seconds: float = TIMEOUT_SECONDS) -> None:
    """Joins the process group; once is enough, again does nothing, and a single process needs none.

    It waits here for every process, so whatever takes each of them a different time belongs before it.
    """
    import torch
    import torch.distributed as dist

    if world_size() == 1 or dist.is_initialized():
        return
    device = torch.device("cuda", local_rank()) if backend == "nccl" else None
    dist.init_process_group(backend, timeout=timedelta(seconds=timeout_seconds), device_id=device)
    logger.info("process group: %d processes over %s", world_size(), backend)


def end_process(code: int) -> NoReturn:
    """Ends the process with `code`; one of several without the interpreter's own end.

    Threads of gloo, which nothing ends, may hold the tensors of the last exchange a moment longer than those who waited
    for it. When they let go of them while the interpreter ends, it aborts (exit code -6) after a run that went well.
    """
    if world_size() > 1:
        atexit._run_exitfuncs()  # trackers send what they still hold
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    sys.exit(code)


def destroy_process_group() -> None:
    """Leaves the process group, if this process is in one."""
    import torch.distributed as dist

    if dist.is_available() and dist.is_initialized():
        dist.destroy_process_group()


def barrier() -> None:
    """Waits until every process is here."""
    from sft.distributed import collectives

    collectives.barrier()


def require_agreement(facts: dict[str, object]) -> None:
    """Makes sure that every process is about to do the same.

    Each finds checkpoints and data for itself, and on nodes without a shared disk may find others.

    Raises:
        UserError: on every process, naming what differs and the first two values.
    """
    from sft.distributed.collectives import gather_objects

    everybodys = gather_objects(facts)
    problems = [
        Problem(f"{name}: {everybodys[0][name]!r} on rank 0, {other[name]!r} on rank {number}", "use a shared folder")
        for name in facts
        for number, other in enumerate(everybodys)
        if other[name] != everybodys[0][name]
    ]
    if problems:
        raise UserError(*problems[:5])
