"""What the exit code of a process means, and which code a run of several processes ends with."""

from __future__ import annotations

import signal
from collections.abc import Mapping

PREEMPTED, INTERRUPTED = 128 + signal.SIGTERM, 128 + signal.SIGINT


def describe_exit(code: int) -> str:
    """Says how a process ended, from its return code (negative: the signal that killed it)."""
    if code >= 0:
        return f"ended with exit code {code}"
    name = signal.Signals(-code).name
    reason = "; most likely the machine ran out of memory" if -code == signal.SIGKILL else ""
    return f"was killed by {name}{reason}"


def combine_exit_codes(codes: Mapping[int, int]) -> int:
    """Returns the exit code of the run from those of the processes that failed, by rank: the most informative one.

    A process that loses its peer fails with 1, so 2 and 3 name the cause. 143 (SIGTERM) counts only if nothing else
    went wrong, for then nothing is saved beyond the last checkpoint. 130 is Ctrl-C, which comes from the user alone;
    the other codes beside it are those of processes that lost their peer.
    """
    by_signal = {-signal.SIGTERM: PREEMPTED, -signal.SIGINT: INTERRUPTED}
    outcomes = {by_signal.get(code, code) for code in codes.values()}
    if outcomes == {PREEMPTED}:
        return PREEMPTED
    return next((code for code in (2, 3, INTERRUPTED) if code in outcomes), 1)
