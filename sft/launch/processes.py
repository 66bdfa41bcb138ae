"""Runs the processes of a `Plan`: plain Python for one, torchrun's agent for several."""

from __future__ import annotations

import logging
import os
import signal
import sys
import threading
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from sft.launch.plan import INTERRUPTED, PREEMPTED

if TYPE_CHECKING:
    from sft.launch.plan import Plan

logger = logging.getLogger("sft.launch")

RENDEZVOUS_SECONDS = 900  # how long the first node waits for the last; queues and slow disks make them start apart
PASSED_ON = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2)


def run(plan: Plan) -> int:
    """Starts the plan and returns the exit code of the training; a single process takes this one's place instead."""
    os.environ.update(plan.environment)
    if plan.alone:
        sys.stdout.flush()
        sys.stderr.flush()
        os.execv(sys.executable, [sys.executable, *plan.command])
    with signals_passed_on():
        codes = run_agent(plan)
    for rank, code in sorted(codes.items()):
        logger.error("process of rank %d %s", rank, describe(code))
    return exit_code(codes) if codes else 0


def run_agent(plan: Plan) -> dict[int, int]:
    """Starts the processes under torchrun's agent and returns the return code of each that failed, by rank."""
    # Read when torch is imported: a node that is there first would show a C++ stack for each try to reach node 0.
    quiet = "TORCH_CPP_LOG_LEVEL" not in os.environ
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    from torch.distributed.elastic.agent.server.api import WorkerSpec
    from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs
    from torch.distributed.elastic.rendezvous import RendezvousParameters, registry

    from sft.launch.elastic_agent import PatientAgent

    if quiet:
        del os.environ["TORCH_CPP_LOG_LEVEL"]  # the training's own warnings are shown
    # Its warnings and tables describe how it closes processes; what went wrong is in the output of the process itself.
    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)
    # The signals are ours; it insists on having one.
    os.environ["TORCHELASTIC_SIGNALS_TO_HANDLE"] = "SIGQUIT"
    rendezvous = registry.get_rendezvous_handler(RendezvousParameters(**_rendezvous(plan)))
    local = plan.nodes == 1
    spec = WorkerSpec(
        role="train",
        local_world_size=plan.processes,
        entrypoint=sys.executable,
        args=("-u", *plan.command),
        rdzv_handler=rendezvous,
        max_restarts=0,
        monitor_interval=0.1,
        master_addr=None if local else plan.master_addr,
        master_port=None if local else plan.master_port,
        local_addr="localhost" if local else None,  # the machine's own name need not resolve
    )
    try:
        result = PatientAgent(spec, DefaultLogsSpecs()).run()
    finally:
        rendezvous.shutdown()
    return {rank: failure.exitcode for rank, failure in result.failures.items()}


def _rendezvous(plan: Plan) -> dict[str, Any]:
    """One node meets on a free port that the kernel chooses; several meet at node 0, ranks in the nodes' order."""
    number = {"min_nodes": plan.nodes, "max_nodes": plan.nodes}
    if plan.nodes == 1:
        return {
            "backend": "c10d",
            "endpoint": "localhost:0",
            "run_id": uuid.uuid4().hex,
            "local_addr": "localhost",
            **number,
        }
    endpoint = f"{plan.master_addr}:{plan.master_port}"
    more = {"rank": plan.node_rank, "timeout": RENDEZVOUS_SECONDS}
    return {"backend": "static", "endpoint": endpoint, "run_id": "sft", **number, **more}


@contextmanager
def signals_passed_on() -> Iterator[None]:
    """Sends signals on to the training processes while the agent goes on watching them.

    A handler in Python would wait until the main thread is back from C++, where it may be waiting for another node for
    minutes. So a thread reads the numbers of the signals from a pipe that Python's C handler writes to at once.
    """
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    before = {}
    for number in PASSED_ON:
        if signal.getsignal(number) is not signal.SIG_IGN:  # nohup ignores SIGHUP, and so do we then
            before[number] = signal.signal(number, lambda *_: None)
    old_writer = signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
    thread = threading.Thread(target=_pass_on_from, args=(reader,), daemon=True)
    thread.start()
    try:
        yield
    finally:
        signal.set_wakeup_fd(old_writer)
        for number, handler in before.items():
            signal.signal(number, handler)
        os.close(writer)
        thread.join()
        os.close(reader)


def _pass_on_from(reader: int) -> None:
    while numbers := os.read(reader, 64):
        for number in numbers:
            if number in PASSED_ON:
                pass_on(number)


def pass_on(number: int) -> None:
    """Sends the signal to each training process, and to none of their helpers.

    torchrun signals whole process groups: a data loader's worker dies of it, and with it the save in its parent.
    """
    import psutil

    processes = psutil.Process().children()
    if not processes:  # still waiting for other nodes
        os._exit(128 + number)
    logger.info("passing %s on to %d processes", signal.Signals(number).name, len(processes))
    for process in processes:
        try:
            process.send_signal(number)
        except psutil.NoSuchProcess:
            continue


def describe(code: int) -> str:
    """How a process ended, from its return code."""
    if code >= 0:
        return f"ended with exit code {code}"
    name = signal.Signals(-code).name
    reason = "; the machine ran out of memory, most often" if -code == signal.SIGKILL else ""
    return f"was killed by {name}{reason}"


def exit_code(codes: Mapping[int, int]) -> int:
    """The code of the run from those of the processes that failed: the one that says most.

    A process that loses its partner fails with 1, so 2 and 3 name the cause. 143 says that the run was told to end
    (SIGTERM): it counts only if nothing else went wrong. Nothing is saved then beyond the last checkpoint. 130 is
    Ctrl-C, which a process only has from the user: what others end with then is their partner's loss.
    """
    by_signal = {-signal.SIGTERM: PREEMPTED, -signal.SIGINT: INTERRUPTED}
    endings = {by_signal.get(code, code) for code in codes.values()}
    if endings == {PREEMPTED}:
        return PREEMPTED
    return next((code for code in (2, 3, INTERRUPTED) if code in endings), 1)
