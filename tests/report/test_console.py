"""The console shows the numbers of the JSON documents, and logs format their metrics in one order."""

from __future__ import annotations

from typing import Any

from sft.report.console import console, show_lengths, show_packed
from sft.report.step_progress import describe


def test_histogram_bars_are_proportional_and_a_count_of_one_is_visible():
    ledger: dict[str, Any] = {"length_histogram": [[1, 10, 4000], [11, 20, 0], [21, 30, 1], [31, 40, 2000]]}
    with console.capture() as captured:
        show_lengths(ledger)
    title, *bars = captured.get().splitlines()
    assert title == "samples by tokens"
    assert [bar.count("#") for bar in bars] == [40, 0, 1, 20]
    assert bars[0].split() == ["1", "-", "10", "#" * 40, "4,000"]


def test_packed_samples_are_shown_by_sequence():
    samples = [{"input_ids": list(range(n))} for n in (4, 9, 1, 6, 5, 5, 11)]  # the last is longer than a sequence
    with console.capture() as captured:
        show_packed(samples, "bfd", 10)
    assert captured.get().splitlines() == [
        "packed (bfd), these samples would fill 3 sequences:",
        "  [9 | 1] 10 of 10 tokens",
        "  [6 | 4] 10 of 10 tokens",
        "  [5 | 5] 10 of 10 tokens",
    ]


def test_the_metrics_of_a_log_are_formatted_in_one_order() -> None:
    logs = {"learning_rate": 3e-3, "sequence_accuracy": 0.022, "loss": 2.0724, "token_accuracy": 0.541, "other": 1.0}
    assert describe(logs) == "loss 2.0724  token acc 54.1%  seq acc 2.2%  lr 3.00e-03"
    assert describe({"eval_a_loss": 0.5, "eval_a_perplexity": 1.6487, "eval_b_loss": 1.0}) == (
        "eval_a: loss 0.5000  ppl 1.649  eval_b: loss 1.0000"
    )
    assert describe({"train_loss": 0.5, "train_runtime": 3.0}) == ""
