"""Which training rows are held out for validation: a function of their number and the seed, on every rank the same."""

from __future__ import annotations

import numpy as np

from sft.data.sources.dataset_source import DataSource


def count_rows(source: DataSource) -> int:
    """The rows of a source, those that cannot be read among them."""
    return sum(1 for _ in source.rows())


def held_out(count: int, fraction: float, seed: int) -> frozenset[int]:
    """The indices of `fraction` of `count` rows: at least one, never all."""
    if count < 2:
        return frozenset()
    held = min(max(1, round(count * fraction)), count - 1)
    return frozenset(np.random.default_rng(seed).permutation(count)[:held].tolist())
