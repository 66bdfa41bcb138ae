"""Splits and mixtures: as large as they were asked for, no row favoured, the same on every rank."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sft.data.preparation.selection import draw_mixture, draw_validation_rows


def test_weights_are_shares_of_the_rows():
    large, small = draw_mixture([np.full(90, 7), np.full(10, 7)], [1, 1], "rows", seed=0)
    assert len(large) == len(small) == 50
    assert len(set(large.tolist())) == 50  # no row twice, as long as there are others
    assert np.bincount(small).tolist() == [5] * 10  # each row five times


def test_weights_are_shares_of_the_tokens():
    few_long, many_short = draw_mixture([np.full(10, 100), np.full(100, 10)], [3, 1], "tokens", seed=0)
    assert (len(few_long) * 100, len(many_short) * 10) == (1500, 500)


def test_equal_weights_of_equal_sets_take_each_row_once():
    first, second = draw_mixture([np.full(4, 3), np.full(4, 9)], [0.5, 0.5], "rows", seed=1)
    assert first.tolist() == second.tolist() == [0, 1, 2, 3]


def test_a_mixture_depends_on_the_seed_alone():
    lengths = [np.arange(1, 200), np.arange(1, 50)]
    again = [draw_mixture(lengths, [1, 2], "tokens", seed=5) for _ in range(2)]
    assert all((a == b).all() for a, b in zip(*again, strict=True))
    other = draw_mixture(lengths, [1, 2], "tokens", seed=6)
    assert any(a.tolist() != b.tolist() for a, b in zip(again[0], other, strict=True))


@pytest.mark.parametrize("by", ["rows", "tokens"])
@given(
    sizes=st.lists(st.lists(st.integers(1, 50), min_size=1, max_size=30), min_size=1, max_size=4),
    seed=st.integers(0, 9),
    data=st.data(),
)
@settings(max_examples=100, deadline=None)
def test_each_share_is_met_to_half_a_document(by, sizes, seed, data):
    weights = data.draw(st.lists(st.floats(0.1, 9), min_size=len(sizes), max_size=len(sizes)))
    lengths = [np.array(each) for each in sizes]
    units = [np.ones_like(each) if by == "rows" else each for each in lengths]
    whole = sum(int(each.sum()) for each in units)
    for each, chosen, weight in zip(units, draw_mixture(lengths, weights, by, seed), weights, strict=True):
        assert abs(each[chosen].sum() - whole * weight / sum(weights)) <= each.max() / 2 + 0.5
        times = np.bincount(chosen, minlength=len(each))
        assert times.max() - times.min() <= 1


# Splits


@pytest.mark.parametrize(
    ("number", "fraction", "held"), [(10, 0.25, 2), (10, 0.01, 1), (2, 0.01, 1), (3, 0.99, 2), (1, 0.5, 0), (0, 0.5, 0)]
)
def test_at_least_one_row_is_held_out_and_never_all(number, fraction, held):
    chosen = draw_validation_rows(number, fraction, 7)
    assert len(chosen) == held
    assert chosen <= set(range(number))


def test_a_split_depends_on_the_seed():
    first, again, other = (draw_validation_rows(1000, 0.1, seed) for seed in (1, 1, 2))
    assert first == again != other
