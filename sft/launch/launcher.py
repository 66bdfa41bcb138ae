"""What `launch_training.sh` does once its environment stands: how many processes train, here and on other nodes.

A mistake ends here, before a process is started and before torch is imported. The decision is a `Plan`, which
`sft.launch.processes` runs. This is a program above the stages, as `sft_main` is: it reads the config with
`config_manager`.
"""

from __future__ import annotations

import logging
import os
import re
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from sft.config.overrides import COMMAND_LINE
from sft.distributed.gpus import require_gpus, visible_gpus
from sft.errors import Problem, UserError
from sft.launch.options import Arguments, environment_overrides, override_keys, parse_arguments
from sft.launch.plan import Plan
from sft.launch.slurm import Job, read_job

if TYPE_CHECKING:
    from sft.config.schema import Config

logger = logging.getLogger("sft.launch")

ENTRY = Path(__file__).resolve().parents[2] / "sft_main.py"


def count_processes(config: Config, gpus: int | None, env: Mapping[str, str], job: Job | None) -> int:
    """How many processes this node runs.

    The first of these that is there decides: `--gpus`, NPROC_PER_NODE, `num_gpus`, the visible GPUs; else one.

    Raises:
        UserError: more GPUs are asked for than there are, or SLURM gave GPUs and none is visible.
    """
    asked = config.num_gpus if gpus is None else gpus
    file, line = config.place("num_gpus")
    if asked:
        require_gpus(asked, "--gpus" if gpus else "num_gpus", COMMAND_LINE if gpus else file, None if gpus else line)
    per_node = _processes_per_node(env)
    if gpus and per_node not in (None, gpus):
        logger.info(
            "NPROC_PER_NODE=%s from the environment is not used: the command line sets --gpus %s", per_node, gpus
        )
        per_node = None
    if per_node is None and asked:
        return asked
    found = 0 if asked == 0 or config.use_cpu else visible_gpus()
    if per_node is not None:
        logger.info("NPROC_PER_NODE=%s from the environment sets the number of processes", per_node)
        if found and per_node > found:
            require_gpus(per_node, "NPROC_PER_NODE", "environment")
        return per_node
    if job and job.gpus and asked != 0 and not config.use_cpu:
        if not found:
            raise UserError(
                Problem(
                    f"SLURM gave this job {job.gpus} GPUs on this node, and none is visible",
                    "see `nvidia-smi` there and CUDA_VISIBLE_DEVICES; to train on the CPU give num_gpus=0",
                )
            )
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


def choose_nodes(arguments: Arguments, job: Job | None) -> dict[str, int | str]:
    """The node fields of the `Plan`: from the options, else from SLURM.

    Raises:
        UserError: an option that several nodes need is missing, or one is there without `--nodes`.
    """
    given = {name: getattr(arguments, name) for name in ("node_rank", "master_addr", "master_port")}
    if arguments.nodes is None:
        if any(value is not None for value in given.values()):
            named = ", ".join(f"--{name}" for name, value in given.items() if value is not None)
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


def usable_cores() -> int:
    """The cores that this process may run on; a SLURM job or a container may have fewer than the machine."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def make_plan(arguments: Arguments, env: Mapping[str, str], entry: Path = ENTRY) -> Plan:
    """Everything that is decided before the first process starts; the config is read and checked on the way.

    Raises:
        UserError: from the options, the environment, SLURM, the config, or the GPUs that are there.
    """
    from sft.config.loading import load_config
    from sft.config.validation import require_trainable

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
        # Each process would start a thread for every core, and they would fight over them.
        settings["OMP_NUM_THREADS"] = str(max(1, usable_cores() // processes))
    command = (str(entry), "train", "--config_file", arguments.config, *overrides)
    return Plan(command, processes, environment=settings, **nodes)  # type: ignore[arg-type]


def _speak() -> None:
    """The launcher's own lines go to stderr. What is said while the config is read, the run itself says again."""
    logging.getLogger("sft").addHandler(logging.NullHandler())
    if logger.handlers:
        return
    handler = logging.StreamHandler()
    handler.setFormatter(logging.Formatter("[launch] %(message)s"))
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)


def main(argv: Sequence[str] | None = None, entry: Path = ENTRY) -> int:
    """Runs the training that the command line asks for and returns its exit code."""
    _speak()
    try:
        arguments = parse_arguments(sys.argv[1:] if argv is None else argv)
        plan = make_plan(arguments, os.environ, entry)
    except UserError as error:
        for problem in error.problems:
            print(f"error: {problem}", file=sys.stderr)
        return error.exit_code
    if arguments.dry_run:
        print(plan.shell())
        return 0
    nodes = f" on node {plan.node_rank} of {plan.nodes}, first {plan.master_addr}" if plan.nodes > 1 else ""
    logger.info("starting %d process%s%s", plan.processes, "es" * (plan.processes > 1), nodes)
    from sft.launch.processes import run

    return run(plan)


if __name__ == "__main__":
    sys.exit(main())
