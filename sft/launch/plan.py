"""Decides what to start on this node: how many processes, of which nodes, with which command.

The config is read and checked here: a mistake ends the run before a process is started or torch is imported.
"""

from __future__ import annotations

import logging
import os
import re
import shlex
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from sft.config.loading import load_config
from sft.config.overrides import COMMAND_LINE
from sft.config.schema import Config
from sft.config.validation import require_trainable
from sft.distributed import gpus
from sft.errors import Problem, UserError
from sft.launch.options import DEFAULT_PORT, Arguments, environment_overrides, override_keys
from sft.launch.slurm import Job, read_job

logger = logging.getLogger("sft.launch")

ENTRY = Path(__file__).resolve().parents[2] / "sft_main.py"


@dataclass(frozen=True)
class Plan:
    """What to start on this node.

    Attributes:
        command: the entry script and its arguments, the same for every process.
        processes: on this node. Every node runs as many.
        nodes, node_rank, master_addr, master_port: the other nodes. One node needs neither address nor port.
        environment: variables to set for the processes.
    """

    command: tuple[str, ...]
    processes: int = 1
    nodes: int = 1
    node_rank: int = 0
    master_addr: str = "127.0.0.1"
    master_port: int = DEFAULT_PORT
    environment: Mapping[str, str] = field(default_factory=dict)

    @property
    def is_single_process(self) -> bool:
        """One process in all: plain Python, no process group."""
        return self.nodes == 1 and self.processes == 1

    def shell(self) -> str:
        """Returns the plan as a line for the shell."""
        words = [f"{name}={value}" for name, value in self.environment.items()]
        if self.is_single_process:
            words.append(sys.executable)
        elif self.nodes == 1:
            words += ["torchrun", "--standalone", f"--nproc_per_node={self.processes}"]
        else:
            words += ["torchrun", f"--nnodes={self.nodes}", f"--node_rank={self.node_rank}"]
            words += [f"--master_addr={self.master_addr}", f"--master_port={self.master_port}"]
            words += [f"--nproc_per_node={self.processes}"]
        return shlex.join([*words, *self.command])


def make_plan(arguments: Arguments, env: Mapping[str, str], entry: Path = ENTRY) -> Plan:
    """Decides everything that can be decided before the first process starts.

    Raises:
        UserError: from the options, the environment, SLURM, the config, or the GPUs that are there.
    """
    explicit = override_keys(arguments.overrides)
    if arguments.gpus is not None and "num_gpus" in explicit:
        raise UserError(Problem("--gpus and num_gpus are both given", "give one of the two", file=COMMAND_LINE))
    job = read_job(env)
    nodes = choose_nodes(arguments, job)
    overrides = environment_overrides(env, explicit)
    if arguments.gpus is not None:
        overrides.append(f"num_gpus={arguments.gpus}")
    overrides += arguments.overrides
    config = load_config(arguments.config, overrides)
    require_trainable(config)
    processes = count_processes(config, arguments.gpus, env, job)
    settings = {}
    if processes > 1 and "OMP_NUM_THREADS" not in env:
        # By default each process would start as many threads as there are cores.
        settings["OMP_NUM_THREADS"] = str(max(1, usable_cores() // processes))
    command = (str(entry), "train", "--config_file", arguments.config, *overrides)
    return Plan(command, processes, environment=settings, **nodes)  # type: ignore[arg-type]


def choose_nodes(arguments: Arguments, job: Job | None) -> dict[str, int | str]:
    """Returns the node fields of the `Plan`: from the options, else from SLURM.

    Raises:
        UserError: an option that several nodes need is missing, or one is given without `--nodes`.
    """
    given = {name: getattr(arguments, name) for name in ("node_rank", "master_addr", "master_port")}
    if arguments.nodes is None:
        if named := ", ".join(f"--{name}" for name, value in given.items() if value is not None):
            raise UserError(Problem(f"{named} without --nodes", "give --nodes as well", file=COMMAND_LINE))
        if job is None or job.nodes == 1:
            return {}
        fields = {"nodes": job.nodes, "node_rank": job.node_rank}
        return {**fields, "master_addr": job.master_addr, "master_port": job.master_port}
    if arguments.nodes == 1:
        return {}
    missing = [f"--{name}" for name in ("node_rank", "master_addr") if given[name] is None]
    if missing:
        hint = "start the same command on each node, with --node_rank from 0"
        raise UserError(Problem(f"--nodes {arguments.nodes} needs {' and '.join(missing)}", hint, file=COMMAND_LINE))
    if given["node_rank"] >= arguments.nodes:
        message = f"--node_rank {given['node_rank']} is not below --nodes {arguments.nodes}"
        raise UserError(Problem(message, "nodes are numbered from 0", file=COMMAND_LINE))
    return {"nodes": arguments.nodes, **{name: value for name, value in given.items() if value is not None}}


def count_processes(config: Config, gpus_option: int | None, env: Mapping[str, str], job: Job | None) -> int:
    """Returns how many processes this node runs.

    The first of these that is set decides: `--gpus`, NPROC_PER_NODE, `num_gpus`, the visible GPUs; else one.

    Raises:
        UserError: more GPUs are asked for than there are, or SLURM gave GPUs and none is visible.
    """
    wanted = config.num_gpus if gpus_option is None else gpus_option
    if gpus_option:
        gpus.require_gpus(gpus_option, "--gpus", COMMAND_LINE)
    elif wanted:
        gpus.require_gpus(wanted, "num_gpus", *config.place("num_gpus"))
    per_node = _processes_per_node(env)
    if gpus_option and per_node not in (None, gpus_option):
        unused = "NPROC_PER_NODE=%s from the environment is not used: the command line sets --gpus %s"
        logger.info(unused, per_node, gpus_option)
        per_node = None
    if per_node is None and wanted:
        return wanted
    found = 0 if wanted == 0 or config.use_cpu else gpus.visible_gpus()
    if per_node is not None:
        logger.info("NPROC_PER_NODE=%s from the environment sets the number of processes", per_node)
        if found and per_node > found:
            gpus.require_gpus(per_node, "NPROC_PER_NODE", "environment")
        return per_node
    if job and job.gpus and wanted != 0 and not config.use_cpu:
        if not found:
            hint = "see `nvidia-smi` there and CUDA_VISIBLE_DEVICES; to train on the CPU give num_gpus=0"
            raise UserError(Problem(f"SLURM gave this job {job.gpus} GPUs on this node, and none is visible", hint))
        found = min(found, job.gpus)
    return max(found, 1)


def _processes_per_node(env: Mapping[str, str]) -> int | None:
    text = env.get("NPROC_PER_NODE", "")
    if not text:
        return None
    if not re.fullmatch(r"[1-9]\d*", text):
        message = f"is {text!r}, not a number of processes"
        raise UserError(Problem(message, "set a whole number from 1, or unset it", "NPROC_PER_NODE", "environment"))
    return int(text)


def usable_cores() -> int:
    """Returns the number of cores this process may run on: in a SLURM job or a container, perhaps not the machine's."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
