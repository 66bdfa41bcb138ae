"""What is shown for eyes says what the machine-readable form says."""

from __future__ import annotations

from typing import Any

from sft.report.console import console, show_lengths, show_packed


def test_the_bars_are_as_long_as_their_counts_and_none_that_counts_is_empty():
    ledger: dict[str, Any] = {"length_histogram": [[1, 10, 4000], [11, 20, 0], [21, 30, 1], [31, 40, 2000]]}
    with console.capture() as captured:
        show_lengths(ledger)
    title, *bars = captured.get().splitlines()
    assert title == "samples by tokens"
    assert [bar.count("#") for bar in bars] == [40, 0, 1, 20]
    assert bars[0].split() == ["1", "-", "10", "#" * 40, "4,000"]


def test_samples_are_shown_as_they_share_sequences():
    samples = [{"input_ids": list(range(n))} for n in (4, 9, 1, 6, 5, 5, 11)]  # the last is too long for any
    with console.capture() as captured:
        show_packed(samples, "bfd", 10)
    assert captured.get().splitlines() == [
        "packed (bfd), these samples would fill 3 sequences:",
        "  [9 | 1] 10 of 10 tokens",
        "  [6 | 4] 10 of 10 tokens",
        "  [5 | 5] 10 of 10 tokens",
    ]
