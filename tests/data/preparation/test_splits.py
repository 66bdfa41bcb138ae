"""Rows held out for validation are drawn by their number and the seed alone."""

from __future__ import annotations

import pytest

from sft.data.preparation.selection import held_out


@pytest.mark.parametrize(
    ("number", "fraction", "held"), [(10, 0.25, 2), (10, 0.01, 1), (2, 0.01, 1), (3, 0.99, 2), (1, 0.5, 0), (0, 0.5, 0)]
)
def test_at_least_one_row_is_held_out_and_never_all(number, fraction, held):
    chosen = held_out(number, fraction, 7)
    assert len(chosen) == held
    assert chosen <= set(range(number))


def test_the_draw_hangs_on_the_seed():
    assert held_out(1000, 0.1, 1) == held_out(1000, 0.1, 1) != held_out(1000, 0.1, 2)
