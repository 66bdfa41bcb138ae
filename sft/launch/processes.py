"""Runs the processes of a `Plan` (plain Python for one, torchrun's agent for several) and forwards signals to them."""

from __future__ import annotations

import logging
import os
import signal
import sys
import threading
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

import psutil

from sft.launch.exit_codes import combine_exit_codes, describe_exit
from sft.launch.plan import Plan

logger = logging.getLogger("sft.launch")

RENDEZVOUS_SECONDS = 900  # how long the first node waits for the last; queues and slow disks make them start apart
FORWARDED = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2)


def run_plan(plan: Plan) -> int:
    """Runs the plan and returns the exit code of the training; a single process replaces this one instead."""
    os.environ.update(plan.environment)
    if plan.is_single_process:
        sys.stdout.flush()
        sys.stderr.flush()
        os.execv(sys.executable, [sys.executable, *plan.command])
    with forwarded_signals():
        codes = run_agent(plan)
    for rank, code in sorted(codes.items()):
        logger.error("process of rank %d %s", rank, describe_exit(code))
    return combine_exit_codes(codes) if codes else 0


def run_agent(plan: Plan) -> dict[int, int]:
    """Runs the processes under torchrun's agent and returns the return code of each that failed, by rank."""
    # Read when torch is imported: a node that starts first would print a C++ stack for each try to reach node 0.
    quiet = "TORCH_CPP_LOG_LEVEL" not in os.environ
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    from torch.distributed.elastic.agent.server.api import WorkerSpec
    from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs
    from torch.distributed.elastic.rendezvous import RendezvousParameters, registry

    from sft.launch.elastic_agent import GracefulAgent

    if quiet:
        del os.environ["TORCH_CPP_LOG_LEVEL"]  # the training's own warnings are shown
    # Its warnings and tables describe how it closes processes; what went wrong is in the output of the process itself.
    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)
    # The agent insists on handling a signal; those that matter are forwarded here.
    os.environ["TORCHELASTIC_SIGNALS_TO_HANDLE"] = "SIGQUIT"
    rendezvous = registry.get_rendezvous_handler(RendezvousParameters(**_rendezvous(plan)))
    one_node = plan.nodes == 1
    spec = WorkerSpec(
        role="train",
        local_world_size=plan.processes,
        entrypoint=sys.executable,
        args=("-u", *plan.command),
        rdzv_handler=rendezvous,
        max_restarts=0,
        monitor_interval=0.1,
        master_addr=None if one_node else plan.master_addr,
        master_port=None if one_node else plan.master_port,
        local_addr="localhost" if one_node else None,  # the machine's own name need not resolve
    )
    try:
        result = GracefulAgent(spec, DefaultLogsSpecs()).run()
    finally:
        rendezvous.shutdown()
    return {rank: failure.exitcode for rank, failure in result.failures.items()}


def _rendezvous(plan: Plan) -> dict[str, Any]:
    """Returns where the nodes meet: one node on a free port that the kernel chooses, several at node 0, in order."""
    number = {"min_nodes": plan.nodes, "max_nodes": plan.nodes}
    if plan.nodes == 1:
        local = {"endpoint": "localhost:0", "local_addr": "localhost"}
        return {"backend": "c10d", "run_id": uuid.uuid4().hex, **local, **number}
    endpoint = f"{plan.master_addr}:{plan.master_port}"
    more = {"rank": plan.node_rank, "timeout": RENDEZVOUS_SECONDS}
    return {"backend": "static", "endpoint": endpoint, "run_id": "sft", **number, **more}


@contextmanager
def forwarded_signals() -> Iterator[None]:
    """Forwards signals to the training processes while the agent keeps watching them.

    A handler in Python would wait until the main thread is back from C++, where it may be waiting for another node for
    minutes. So a thread reads the numbers of the signals from a pipe that Python's C handler writes to at once.
    """
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    # nohup ignores SIGHUP, and so does this.
    handled = [number for number in FORWARDED if signal.getsignal(number) is not signal.SIG_IGN]
    handlers = {number: signal.signal(number, lambda *_: None) for number in handled}
    old_writer = signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
    thread = threading.Thread(target=_forward_from, args=(reader,), daemon=True)
    thread.start()
    try:
        yield
    finally:
        signal.set_wakeup_fd(old_writer)
        for number, handler in handlers.items():
            signal.signal(number, handler)
        os.close(writer)
        thread.join()
        os.close(reader)


def _forward_from(reader: int) -> None:
    while numbers := os.read(reader, 64):
        for number in numbers:
            if number in FORWARDED:
                forward_signal(number)


def forward_signal(number: int) -> None:
    """Sends the signal to each training process, and to none of their helpers.

    torchrun signals whole process groups: a data loader's worker dies of it, and with it the save in its parent.
    """
    processes = psutil.Process().children()
    if not processes:  # still waiting for other nodes
        os._exit(128 + number)
    logger.info("forwarding %s to %d processes", signal.Signals(number).name, len(processes))
    for process in processes:
        with suppress(psutil.NoSuchProcess):
            process.send_signal(number)
