"""What malloc makes a process hold; tests/estimate/test_run.py and test_estimate.py compare it with real training."""

from __future__ import annotations

import platform

import pytest

from sft.estimate.heap_model import held_at_most
from sft.estimate.memory_trace import NODE, Event, peak_of

MIB = 2**20

pytestmark = pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="another malloc is not asked")


def test_blocks_that_live_together_add_up() -> None:
    held = held_at_most([Event(i, 3 * MIB) for i in range(20)])
    assert held == pytest.approx(60 * MIB, rel=0.02)


def test_every_request_reaches_the_process_that_makes_them() -> None:
    """320 kB of them, more than a pipe holds at once."""
    held = held_at_most([Event(i, 4096) for i in range(20_000)])
    assert held is not None
    assert held > 20_000 * 4096


def test_a_large_block_goes_back_when_it_is_freed() -> None:
    """Above 32 MiB every block is mapped for itself."""
    events = [event for i in range(5) for event in (Event(i, 40 * MIB), Event(i, 0))]
    assert held_at_most(events) == pytest.approx(40 * MIB, rel=0.02)


def test_holes_stay_with_the_process() -> None:
    """24 holes of 4 MiB between blocks that live serve no request of 5 MiB: 192 + 120 MiB, of which 216 are in use."""
    events = [Event("first", 32 * MIB - 2**14), Event("first", 0)]  # from here on these sizes lie in the heap
    events += [Event((i, side), 4 * MIB) for i in range(24) for side in "ab"]
    events += [Event((i, "a"), 0) for i in range(24)]
    events += [Event((i, "c"), 5 * MIB) for i in range(24)]
    assert peak_of(events) == 216 * MIB
    assert held_at_most(events) == pytest.approx(312 * MIB, rel=0.05)


def test_the_nodes_of_the_graph_settle_in_holes() -> None:
    """One hole of 24 takes them, and is then too small for a block of its size."""
    events = [Event("first", 32 * MIB - 2**14), Event("first", 0)]
    events += [Event((i, side), 4 * MIB) for i in range(24) for side in "ab"]
    events += [Event((i, "a"), 0) for i in range(24)]
    again = [Event((i, "c"), 4 * MIB - 2**13) for i in range(24)]
    without = held_at_most(events + again)
    nodes = [Event(i, NODE) for i in range(24 * 16)]
    assert without is not None
    assert held_at_most(events + nodes + again) == pytest.approx(without + 4 * MIB, abs=MIB)


def test_what_the_system_does_not_give_is_not_told() -> None:
    assert held_at_most([Event(0, 2**60)]) is None


def test_another_c_library_is_not_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(platform, "libc_ver", lambda: ("", ""))
    assert held_at_most([Event(0, MIB)]) is None
