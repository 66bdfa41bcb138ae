"""torchrun's agent with a grace period, in which the other processes save their state when one has ended.

Imports torch. The agent of torch 2.13 ends all processes as soon as one of them ends with anything but 0: SIGTERM to
their process groups, SIGKILL 30 s later. After a preemption that would cut off the slower ones in the middle of a save.
"""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable, Set
from typing import Any

from torch.distributed.elastic.agent.server.api import RunResult, WorkerGroup, WorkerState
from torch.distributed.elastic.agent.server.local_elastic_agent import LocalElasticAgent

from sft.launch.exit_codes import INTERRUPTED, PREEMPTED

INTERRUPT_SECONDS = 15.0  # after Ctrl-C: a slower process may wait on its GPU for a peer that is gone
_INTERRUPTS = {INTERRUPTED, -signal.SIGINT}


class GracePeriod:
    """Decides whether the agent waits for the processes that are still running.

    After a preemption it waits for as long as the scheduler lets it, after Ctrl-C for `INTERRUPT_SECONDS`, since no
    scheduler ends a process that hangs. After any other failure it does not wait.

    Args:
        clock: seconds that pass, as `time.monotonic`.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._interrupted_at: float | None = None  # when a process was first seen to have ended by Ctrl-C

    def should_wait(self, exits: Set[int | None]) -> bool:
        """Whether to wait, from the return codes of all processes; None for one that is running."""
        if self._interrupted_at is None and exits & _INTERRUPTS:
            self._interrupted_at = self._clock()
        if self._interrupted_at is not None and self._clock() - self._interrupted_at > INTERRUPT_SECONDS:
            return False
        return None in exits and exits <= {None, PREEMPTED, *_INTERRUPTS}


class GracefulAgent(LocalElasticAgent):
    """torchrun's agent, which leaves preempted and interrupted processes a `GracePeriod`."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._grace = GracePeriod()

    def _monitor_workers(self, worker_group: WorkerGroup) -> RunResult:
        try:
            exits = {return_code(worker.id) for worker in worker_group.workers}
        except ChildProcessError:  # the base class has reaped one: it had ended with 0
            exits = {0}
        if self._grace.should_wait(exits):
            return RunResult(state=WorkerState.HEALTHY)
        return super()._monitor_workers(worker_group)


def return_code(pid: int) -> int | None:
    """Returns a child's return code (negative: the signal that killed it) without reaping it; None while it runs."""
    state = os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT)
    if state is None:
        return None
    return state.si_status if state.si_code == os.CLD_EXITED else -state.si_status
