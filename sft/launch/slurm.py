"""Reads the nodes, rank, address and GPUs of a SLURM job step from its environment variables.

The variables: https://slurm.schedmd.com/srun.html, output environment variables.
"""

from __future__ import annotations

import re
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass

from sft.errors import Problem, UserError

# Below the range that kernels hand out for outgoing connections (32768 and up), above the well-known services.
FIRST_PORT, PORTS = 10_000, 20_000


@dataclass(frozen=True)
class Job:
    """One job step with one task per node.

    Attributes:
        nodes: how many nodes take part.
        node_rank: this node's number, from 0.
        master_addr: the host name of node 0.
        master_port: derived from the job's number: all nodes agree on it, and jobs on one node differ.
        gpus: the GPUs the job holds on this node; None where SLURM does not say.
    """

    nodes: int
    node_rank: int
    master_addr: str
    master_port: int
    gpus: int | None


def read_job(env: Mapping[str, str]) -> Job | None:
    """Returns the job of this process, or None outside SLURM.

    Raises:
        UserError: the job has several nodes and this command runs on one of them alone, or several tasks on a node.
    """
    if "SLURM_JOB_ID" not in env:
        return None
    step = "SLURM_STEP_ID" in env
    nodes = int(env.get("SLURM_STEP_NUM_NODES") or env.get("SLURM_JOB_NUM_NODES") or env.get("SLURM_NNODES") or 1)
    if nodes > 1 and not step:
        message = f"the SLURM job has {nodes} nodes and only the first runs this command"
        hint = "start it on each: srun --ntasks-per-node=1 ./launch_training.sh ..."
        raise UserError(Problem(message, hint))
    tasks = int(env.get("SLURM_STEP_NUM_TASKS", nodes)) if step else 1
    if tasks > nodes:
        message = f"srun started {tasks} tasks on {nodes} node{'s' * (nodes != 1)}, each would train on its own"
        hint = "use --ntasks-per-node=1: the launcher starts a process for each GPU, or NPROC_PER_NODE of them"
        raise UserError(Problem(message, hint))
    hosts = env.get("SLURM_STEP_NODELIST") or env.get("SLURM_JOB_NODELIST") or env.get("SLURM_NODELIST") or ""
    gpus = env.get("SLURM_GPUS_ON_NODE", "")
    return Job(
        nodes=nodes,
        node_rank=int(env.get("SLURM_NODEID") or env.get("SLURM_PROCID") or 0) if step else 0,
        master_addr=first_host(hosts) if nodes > 1 else "127.0.0.1",
        master_port=FIRST_PORT + int(env["SLURM_JOB_ID"]) % PORTS,
        gpus=int(gpus) if gpus.isdigit() else None,
    )


def first_host(nodelist: str) -> str:
    """Returns the first host of a SLURM node list such as `gpu[03-05,9],login1`."""
    try:
        command = ["scontrol", "show", "hostnames", nodelist]
        shown = subprocess.run(command, capture_output=True, text=True, timeout=30, check=True).stdout.split()
        if shown:
            return shown[0]
    except (OSError, subprocess.SubprocessError):
        pass  # scontrol is often missing inside containers
    return expand_first_host(nodelist)


def expand_first_host(nodelist: str) -> str:
    """Returns the first host of a node list without `scontrol`.

    It ends at the first comma outside brackets; in each bracket the first choice counts.
    """
    head = re.match(r"(?:[^,\[]|\[[^\]]*\])*", nodelist)
    host = re.sub(r"\[([^\],-]*)[^\]]*\]", r"\1", head.group() if head else "")
    if not host:
        hint = "give --nodes, --node_rank and --master_addr"
        raise UserError(Problem(f"SLURM's list of nodes is {nodelist!r}", hint))
    return host
