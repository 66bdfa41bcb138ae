"""Bins are those of best-fit decreasing, sequences hold every token once, and `packing: auto` packs where it pays."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import data_handler
import model_manager
from sft.config.schema import DataKeys, ModelKeys
from sft.data.preparation.packing import AutoPacking, best_fit_decreasing, pack
from tests.builders import byte_level_tokenizer
from tests.runs import write_rows


def naive_free_sizes(lengths: list[int], capacity: int) -> list[int]:
    """Best-fit decreasing as it is defined, one item at a time: the free tokens of each bin."""
    free_sizes: list[int] = []
    for length in sorted(lengths, reverse=True):
        fitting = [free for free in free_sizes if free >= length]
        if fitting:
            free_sizes[free_sizes.index(min(fitting))] -= length
        else:
            free_sizes.append(capacity - length)
    return sorted(free_sizes)


@given(st.data(), st.integers(1, 60))
@settings(max_examples=400, deadline=None)
def test_bins_are_those_of_best_fit_decreasing(data, capacity):
    lengths = data.draw(st.lists(st.integers(1, capacity), max_size=60))
    bins = best_fit_decreasing(np.array(lengths, dtype=np.int64), capacity)
    assert sorted(i for b in bins for i in b.tolist()) == list(range(len(lengths)))
    assert all(len(b) for b in bins)
    assert sorted(capacity - sum(lengths[i] for i in b) for b in bins) == naive_free_sizes(lengths, capacity)


def test_bins_written_out():
    bins = best_fit_decreasing(np.array([4, 9, 1, 6, 5, 5]), 10)
    assert [b.tolist() for b in bins] == [[1, 2], [3, 0], [4, 5]]
    again = best_fit_decreasing(np.array([4, 9, 1, 6, 5, 5]), 10)
    assert [b.tolist() for b in again] == [b.tolist() for b in bins]


def test_no_items_need_no_bins_and_items_that_fit_no_bin_are_refused():
    assert best_fit_decreasing(np.array([], dtype=np.int64), 8) == []
    for bad in (0, 9):
        with pytest.raises(ValueError, match=rf"lengths must lie in 1\.\.8, got .*{bad}"):
            best_fit_decreasing(np.array([3, bad]), 8)


def test_a_hundred_thousand_documents_fill_nearly_all_of_each_sequence():
    """The mix that trainers are compared by: log-normal lengths with a mean of 196 in sequences of 2,048."""
    rng = np.random.default_rng(0)
    lengths = rng.lognormal(np.log(196) - 0.5 * 0.8**2, 0.8, 100_000).astype(np.int64).clip(8, 2048)
    bins = best_fit_decreasing(lengths, 2048)
    assert lengths.sum() / (len(bins) * 2048) > 0.998


def test_bins_become_a_layout_of_documents_in_sequences():
    layout = pack(np.array([4, 9, 1, 6, 5, 5]), "bfd", 10)
    assert layout.order is not None
    assert layout.order.tolist() == [1, 2, 3, 0, 4, 5]
    assert layout.lengths.tolist() == [9, 1, 6, 4, 5, 5]
    assert layout.counts.tolist() == [2, 2, 2]
    assert layout.sequence_lengths.tolist() == [10, 10, 10]


def test_a_document_that_is_named_twice_is_packed_twice():
    layout = pack(np.array([4, 9, 1]), "bfd", 10, order=np.array([0, 2, 0]))
    assert layout.order is not None
    assert layout.order.tolist() == [0, 0, 2]
    assert layout.sequence_lengths.tolist() == [9]
    alone = pack(np.array([4, 9, 1]), None, 10, order=np.array([2, 2]))
    assert (alone.lengths.tolist(), alone.counts.tolist()) == ([1, 1], [1, 1])


@given(st.lists(st.integers(1, 12), min_size=1, max_size=30))
@settings(max_examples=200, deadline=None)
def test_each_document_is_packed_once(lengths):
    layout = pack(np.array(lengths), "bfd", 12)
    assert layout.order is not None
    assert sorted(layout.order.tolist()) == list(range(len(lengths)))
    assert layout.lengths.tolist() == [lengths[i] for i in layout.order]
    assert layout.counts.sum() == len(lengths)
    assert layout.counts.min() >= 1
    assert layout.sequence_lengths.max() <= 12
    assert layout.sequence_lengths.sum() == sum(lengths)


def test_wrapping_cuts_where_a_sequence_is_full():
    layout = pack(np.array([3, 4, 1]), "wrapped", 5)
    # The rest of the second document is a document of its own.
    assert (layout.lengths.tolist(), layout.counts.tolist(), layout.order) == ([3, 2, 2, 1], [2, 2], None)
    assert layout.sequence_lengths.tolist() == [5, 3]
    long = pack(np.array([11, 1]), "wrapped", 5)
    assert (long.lengths.tolist(), long.counts.tolist()) == ([5, 5, 1, 1], [1, 1, 2])


@given(st.lists(st.integers(1, 30), min_size=1, max_size=20), st.integers(2, 12))
@settings(max_examples=200, deadline=None)
def test_wrapping_keeps_all_tokens_and_every_end_of_a_document(lengths, capacity):
    layout = pack(np.array(lengths), "wrapped", capacity)
    full, last = divmod(sum(lengths), capacity)
    assert layout.sequence_lengths.tolist() == [capacity] * full + [last] * (last > 0)
    ends = set(np.cumsum(layout.lengths).tolist())
    assert ends == set(np.cumsum(lengths).tolist()) | set(range(capacity, sum(lengths), capacity))
    assert layout.counts.sum() == len(layout.lengths)


# `packing: auto`

SHORT = np.full(10_000, 100)  # a million tokens: 1,000 sequences of 1,000


@pytest.mark.parametrize(
    ("auto", "lengths", "packing", "words"),
    [
        (AutoPacking(None, 20), SHORT, "bfd", "bfd: 10,000 samples, about 10 in each sequence of 1,000 tokens"),
        (
            AutoPacking(None, 21),
            SHORT,
            None,
            "off: 10 samples per sequence and 21 sequences per step would leave 47 steps",
        ),
        (AutoPacking(None, 1), SHORT * 6, None, "off: fewer than two samples would share a sequence of 1,000 tokens"),
        (AutoPacking("it cannot", 1), SHORT, None, "off: it cannot"),
        (AutoPacking(None, 1), SHORT[:0], None, "off: "),
    ],
)
def test_auto_packs_where_it_saves_sequences_and_leaves_steps(
    auto: AutoPacking, lengths: np.ndarray, packing: str | None, words: str
) -> None:
    chosen, reason = auto.choose(lengths, 1000)
    assert chosen == packing
    assert reason.startswith(words)


def test_the_size_of_a_step_decides_and_is_part_of_the_cache_key(tmp_path: Path) -> None:
    rows = write_rows(tmp_path / "rows.jsonl", [{"text": "a b c"}] * 400)
    keys = DataKeys(train_file=str(rows), max_seq_length=32, cache_dir=str(tmp_path / "cache"))
    found = [
        data_handler.prepare_data(keys, byte_level_tokenizer(), seed=0, auto=AutoPacking(None, size))
        for size in (1, 2, 1)
    ]
    assert ["seq_lengths" in data.train.column_names for data in found] == [True, False, True]
    assert [data.from_cache for data in found] == [False, False, True]
    assert found[0].packing == found[2].packing
    assert found[0].packing.startswith("bfd: 400 samples")
    assert found[0].train_tokens == found[1].train_tokens


def test_evaluation_data_is_packed_however_small(tmp_path: Path) -> None:
    rows = write_rows(tmp_path / "rows.jsonl", [{"text": "a b c"}] * 8)
    keys = DataKeys(validation_file=str(rows), max_seq_length=64, cache_dir=str(tmp_path / "cache"))
    for auto, is_packed in ((AutoPacking(None, 100), True), (AutoPacking("it cannot"), False)):
        data = data_handler.prepare_data(keys, byte_level_tokenizer(), seed=0, training=False, auto=auto)
        assert ("seq_lengths" in data.evals["validation"].column_names) is is_packed


def test_the_model_decides_whether_samples_may_share_a_sequence(model_dir: Path) -> None:
    def obstacle(**keys: object) -> str | None:
        return model_manager.obstacle_to_packing(ModelKeys.model_validate(keys), byte_level_tokenizer())

    assert obstacle(model_name_or_path=str(model_dir)) is None
    assert obstacle(from_scratch={"model_type": "qwen2"}) is None
    assert "all pairs" in str(obstacle(model_name_or_path=str(model_dir), attn_implementation="sdpa"))
    assert "recurrent" in str(obstacle(from_scratch={"model_type": "mamba"}))
