"""What malloc makes a process hold; tests/test_run_estimate.py and test_estimate.py compare it with real training."""

from __future__ import annotations

import platform

import pytest

from sft.allocation_trace import NODE, Event, peak_of
from sft.heap_model import held_at_most

MIB = 2**20

pytestmark = pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="another malloc is not asked")


def test_blocks_that_live_together_add_up() -> None:
    held = held_at_most([Event(i, 3 * MIB) for i in range(20)])
    assert held == pytest.approx(60 * MIB, rel=0.02)


def test_a_large_block_goes_back_when_it_is_freed() -> None:
    """Above 32 MiB every block is mapped for itself."""
    events = [event for i in range(5) for event in (Event(i, 40 * MIB), Event(i, 0))]
    assert held_at_most(events) == pytest.approx(40 * MIB, rel=0.02)


def waves(count: int = 24, size: int = 4 * MIB) -> list[Event]:
    """Pairs of blocks of which the first is freed: 4 MiB more in use with each, and a hole of 4 MiB beside it."""
    events = [Event("first", 32 * MIB - 2**14), Event("first", 0)]  # from here on these sizes lie in the heap
    for i in range(count):
        events += [Event((i, 0), size), Event((i, 1), size), Event((i, 2), NODE), Event((i, 0), 0)]
    return events


def test_more_is_held_than_in_use() -> None:
    """An aligned request asks for some bytes more than the hole has that a block of its size left."""
    events = waves()
    in_use = peak_of(events)
    assert in_use == 25 * 4 * MIB
    held = held_at_most(events)
    assert held is not None
    assert held > 1.1 * in_use


def test_what_the_system_does_not_give_is_not_told() -> None:
    assert held_at_most([Event(0, 2**60)]) is None


def test_another_c_library_is_not_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(platform, "libc_ver", lambda: ("", ""))
    assert held_at_most([Event(0, MIB)]) is None
