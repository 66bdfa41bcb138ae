"""A mixture of data sets by weight: which of their documents an epoch takes, and how often.

The epoch is as large as all the data sets together; each one's share of it is its weight over the sum of the weights,
counted in rows or in tokens. A data set that is smaller than its share is gone through several times, the last time
in part; of one that is larger some documents are not drawn. Which, is drawn once with the seed: every rank and every
restart finds the same.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import numpy as np

from sft.data.sources.dataset_source import DataSource

By = Literal["rows", "tokens"]


def draw(lengths: Sequence[np.ndarray], weights: Sequence[float], by: By, seed: int) -> list[np.ndarray]:
    """The documents that the mixture takes of each data set.

    Args:
        lengths: for each data set (N,) tokens of its documents.
        weights: of each data set, above 0.
        by: whether weights are shares of the documents or of their tokens.
        seed: of the draw.

    Returns:
        For each data set indices of its documents, in their order; whole passes come before the part of one.
    """
    sizes = [np.ones_like(each) if by == "rows" else each for each in lengths]
    whole = sum(int(each.sum()) for each in sizes)
    mixture = []
    for number, (each, weight) in enumerate(zip(sizes, weights, strict=True)):
        total = int(each.sum())
        share = round(whole * weight / sum(weights)) if total else 0
        passes, rest = divmod(share, max(total, 1))
        shuffled = np.random.default_rng([seed, number]).permutation(len(each))
        # The shuffled start that comes nearest to the rest: half a document more or less.
        part = int(np.searchsorted(np.cumsum(each[shuffled]) - each[shuffled] / 2, rest, side="left"))
        chosen = np.sort(shuffled[:part])
        mixture.append(np.concatenate([*[np.arange(len(each))] * passes, chosen]).astype(np.int64))
    return mixture


def count_rows(source: DataSource) -> int:
    """The rows of a source, those that cannot be read among them."""
    return sum(1 for _ in source.rows())


def held_out(count: int, fraction: float, seed: int) -> frozenset[int]:
    """The indices of `fraction` of `count` rows: at least one, never all."""
    if count < 2:
        return frozenset()
    held = min(max(1, round(count * fraction)), count - 1)
    return frozenset(np.random.default_rng(seed).permutation(count)[:held].tolist())
