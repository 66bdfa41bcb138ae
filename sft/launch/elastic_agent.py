"""torchrun's agent, with patience for processes that save their state before they end.

Imports torch. The agent of torch 2.13 ends all processes as soon as one of them ends with anything but 0: SIGTERM to
their process groups, SIGKILL 30 s later. After a preemption that cuts off the slower ones in the middle of their save.
"""

from __future__ import annotations

import os
import signal
import time
from typing import Any

from torch.distributed.elastic.agent.server.api import RunResult, WorkerGroup, WorkerState
from torch.distributed.elastic.agent.server.local_elastic_agent import LocalElasticAgent

from sft.launch.plan import INTERRUPTED, PREEMPTED

LEAVING_SECONDS = 15.0  # that Ctrl-C leaves the slower processes, of which one may wait for a lost partner on its GPU


def ending(pid: int) -> int | None:
    """The return code of a child (negative: the signal that killed it); None while it runs. It is not collected."""
    state = os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT)
    if state is None:
        return None
    return state.si_status if state.si_code == os.CLD_EXITED else -state.si_status


class PatientAgent(LocalElasticAgent):
    """Waits for the others when a process ends as preempted, for as long as the scheduler lets it; else as its base.

    After Ctrl-C it waits for them, too, but not for ever: no scheduler ends those that hang.
    """

    _left_at: float | None = None  # when a process was first seen to have ended by Ctrl-C

    def _monitor_workers(self, worker_group: WorkerGroup) -> Any:
        try:
            endings = {ending(worker.id) for worker in worker_group.workers}
        except ChildProcessError:  # the base class has collected one: it had ended with 0
            endings = {0}
        if endings & {INTERRUPTED, -signal.SIGINT}:
            self._left_at = self._left_at or time.monotonic()
        is_late = self._left_at is not None and time.monotonic() - self._left_at > LEAVING_SECONDS
        if None in endings and endings <= {None, PREEMPTED, INTERRUPTED, -signal.SIGINT} and not is_late:
            return RunResult(state=WorkerState.HEALTHY)
        return super()._monitor_workers(worker_group)
