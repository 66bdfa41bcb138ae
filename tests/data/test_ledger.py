"""The account of every row, in SPEC's shape."""

from __future__ import annotations

import json

import numpy as np
import pytest

from sft.data.documents import Documents
from sft.data.ledger import MAX_EXAMPLES, Ledger, as_document, total


def documents(*sizes: tuple[int, int]) -> Documents:
    """Documents of so many tokens and trained tokens."""
    ids = [np.arange(tokens, dtype=np.int32) for tokens, _ in sizes]
    labels = [np.where(i < n - t, -100, i).astype(np.int32) for i, (n, t) in zip(ids, sizes, strict=True)]
    lengths = np.array([n for n, _ in sizes])
    return Documents(np.concatenate(ids), np.concatenate(labels), lengths, np.arange(len(sizes)))


def test_an_empty_ledger_has_every_field():
    assert Ledger().as_json() == {
        "rows_read": 0,
        "rows_trained": 0,
        "rows_lost": {},
        "lost_examples": [],
        "formats": {},
        "tokens": {"total": 0, "trained": 0, "masked": 0, "truncated": 0},
        "answers_cut": 0,
        "control_tokens": 0,
        "unrolled": 0,
        "thoughts_left_out": 0,
        "texts_left_out": 0,
        "duplicates": 0,
        "in_validation": 0,
        "length_percentiles": {},
        "length_histogram": [],
        "passes": None,
        "packing": {"rows": 0, "fill": None},
    }


def test_rows_tokens_and_losses_are_counted():
    ledger = Ledger(rows_read=5)
    ledger.keep(1, documents((10, 4)))
    ledger.keep(1, documents((6, 1), (4, 2)))  # one row that was split
    ledger.lose("too_long", "9 tokens", "a.jsonl", 3)
    ledger.lose("bad_json", "broken", "a.jsonl", 4)
    ledger.lose("too_long", "8 tokens", "b.jsonl", 1)
    ledger.formats.update(["qa", "chat", "qa"])
    ledger.tokens_truncated = 3
    ledger.pack(2, 32, 20)
    found = json.loads(json.dumps(ledger.as_json()))
    assert (found["rows_read"], found["rows_trained"]) == (5, 2)
    assert list(found["rows_lost"].items()) == [("too_long", 2), ("bad_json", 1)]
    assert list(found["formats"].items()) == [("qa", 2), ("chat", 1)]
    assert found["lost_examples"] == [
        {"reason": "too_long", "file": "a.jsonl", "line": 3, "message": "9 tokens"},
        {"reason": "bad_json", "file": "a.jsonl", "line": 4, "message": "broken"},
        {"reason": "too_long", "file": "b.jsonl", "line": 1, "message": "8 tokens"},
    ]
    assert found["tokens"] == {"total": 20, "trained": 7, "masked": 13, "truncated": 3}
    assert found["length_percentiles"] == dict.fromkeys(["p0", "p5", "p25"], 4) | {"p50": 6} | dict.fromkeys(
        ["p75", "p95", "p99", "p100"], 10
    )
    assert found["packing"] == {"rows": 2, "fill": 0.625}


def test_a_row_that_is_neither_trained_nor_lost_is_noticed():
    ledger = Ledger(rows_read=2)
    ledger.keep(1, documents((2, 1)))
    with pytest.raises(AssertionError, match="unaccounted"):
        ledger.as_json()


def test_examples_are_limited_for_each_reason_and_counts_are_not():
    ledger = Ledger(rows_read=MAX_EXAMPLES + 6)
    for line in range(MAX_EXAMPLES + 5):
        ledger.lose("bad_json", "broken", "a.jsonl", line)
    ledger.lose("too_long", "9 tokens", "a.jsonl", 99)
    found = ledger.as_json()
    assert found["rows_lost"] == {"bad_json": MAX_EXAMPLES + 5, "too_long": 1}
    assert [e["line"] for e in found["lost_examples"]] == [*range(MAX_EXAMPLES), 99]


@pytest.mark.parametrize(
    ("lengths", "expected"),
    [
        ([7], [7] * 8),
        (list(range(1, 101)), [1, 5, 25, 50, 75, 95, 99, 100]),
        ([1, 1000], [1, 1, 1, 1, 1000, 1000, 1000, 1000]),
    ],
)
def test_percentiles_are_lengths_that_occur(lengths, expected):
    ledger = Ledger(rows_read=len(lengths))
    for n in lengths:
        ledger.keep(1, documents((n, 1)))
    found = ledger.as_json()["length_percentiles"]
    assert list(found) == ["p0", "p5", "p25", "p50", "p75", "p95", "p99", "p100"]
    assert list(found.values()) == expected


def test_the_total_is_the_sum_of_the_data_sets():
    first, second = Ledger(rows_read=2, duplicates=1), Ledger(rows_read=1, answers_cut=2)
    first.keep(1, documents((10, 4)))
    first.lose("bad_json", "broken", "a.jsonl", 2)
    first.pack(1, 32, 16)
    second.keep(1, documents((6, 2)))
    document = as_document({"a": first, "b": second})
    assert document["datasets"] == {"a": first.as_json(), "b": second.as_json()}
    assert document["total"] == {
        **Ledger().as_json(),
        "rows_read": 3,
        "rows_trained": 2,
        "rows_lost": {"bad_json": 1},
        "lost_examples": first.lost_examples,
        "tokens": {"total": 16, "trained": 6, "masked": 10, "truncated": 0},
        "answers_cut": 2,
        "duplicates": 1,
        "length_percentiles": {f"p{p}": 6 if p <= 50 else 10 for p in (0, 5, 25, 50, 75, 95, 99, 100)},
        "length_histogram": [[n, n, int(n in (6, 10))] for n in range(1, 11)],
        "packing": {"rows": 1, "fill": 0.5},
    }
    assert first.rows_read == 2  # adding up leaves the parts alone
    assert total([]).as_json() == Ledger().as_json()


def test_rows_that_are_not_packed_are_no_part_of_the_fill():
    packed, beside, alone = (Ledger(rows_read=1) for _ in range(3))
    for ledger, tokens in ((packed, 10), (beside, 14), (alone, 100)):
        ledger.keep(1, documents((tokens, 1)))
    packed.pack(2, 32, 24)  # which holds the tokens of both
    found = as_document({"a": packed, "b": beside}, {"c": alone})
    assert [one["packing"] for one in found["datasets"].values()] == [
        {"rows": 2, "fill": 0.75},
        {"rows": 0, "fill": None},
        {"rows": 0, "fill": None},
    ]
    assert found["total"]["packing"] == {"rows": 2, "fill": 0.75}


def test_the_histogram_has_few_bars_of_one_width_that_hold_every_document():
    ledger = Ledger(rows_read=4)
    ledger.keep(4, documents((1, 1), (4, 1), (5, 1), (50, 1)))
    bars = ledger.as_json()["length_histogram"]
    assert bars[:2] == [[1, 4, 2], [5, 8, 1]]
    assert bars[-1] == [49, 52, 1]
    assert len(bars) == 13


def test_a_mixture_counts_each_row_once_and_its_tokens_as_often_as_they_are_trained():
    ledger = Ledger(rows_read=3)
    ledger.keep(3, documents((10, 4), (6, 1), (4, 2)))
    ledger.draw(rows=2, lengths=np.array([10, 6, 10]), tokens_trained=9, passes=1.0)
    found = ledger.as_json()
    assert (found["rows_trained"], found["rows_lost"], found["passes"]) == (2, {"not_drawn": 1}, 1.0)
    assert found["tokens"] == {"total": 26, "trained": 9, "masked": 17, "truncated": 0}
    assert (found["length_percentiles"]["p0"], found["length_percentiles"]["p50"]) == (6, 10)
