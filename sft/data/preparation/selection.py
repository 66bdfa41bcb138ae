"""Selects what is trained: the rows that a split holds out for validation, the documents that a mixture draws.

Both are drawn with the seed alone, so every rank and every restart selects the same.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from sft.data.sources.dataset_source import DataSource


def held_out_rows(source: DataSource, fraction: float, seed: int) -> frozenset[int]:
    """Draws the rows of a source that are held out for validation, if any; those that cannot be read count too."""
    return draw_validation_rows(sum(1 for _ in source.rows()), fraction, seed) if fraction else frozenset()


def draw_validation_rows(count: int, fraction: float, seed: int) -> frozenset[int]:
    """Draws the indices of `fraction` of `count` rows: at least one, never all."""
    if count < 2:
        return frozenset()
    size = min(max(1, round(count * fraction)), count - 1)
    return frozenset(np.random.default_rng(seed).permutation(count)[:size].tolist())


def draw_mixture(lengths: Sequence[np.ndarray], weights: Sequence[float], by: str, seed: int) -> list[np.ndarray]:
    """Draws the documents that an epoch of a weighted mixture takes from each data set.

    The epoch is as large as all data sets together; the share of each is its weight over the sum of the weights. A data
    set smaller than its share is repeated, the last time in part; of a larger one some documents are not drawn.

    Args:
        lengths: for each data set (N,) tokens of its documents.
        weights: of each data set, above 0.
        by: whether weights are shares of the documents (`rows`) or of their tokens (`tokens`).

    Returns:
        For each data set indices of its documents, in their order; full repetitions come before the partial one.
    """
    sizes = [np.ones_like(each) if by == "rows" else each for each in lengths]
    whole = sum(int(each.sum()) for each in sizes)
    mixture = []
    for number, (each, weight) in enumerate(zip(sizes, weights, strict=True)):
        total = int(each.sum())
        share = round(whole * weight / sum(weights)) if total else 0
        repetitions, rest = divmod(share, max(total, 1))
        shuffled = np.random.default_rng([seed, number]).permutation(len(each))
        # The number of shuffled documents that comes nearest to the rest: at most half a document more or less.
        part = int(np.searchsorted(np.cumsum(each[shuffled]) - each[shuffled] / 2, rest, side="left"))
        chosen = np.sort(shuffled[:part])
        mixture.append(np.concatenate([*[np.arange(len(each))] * repetitions, chosen]).astype(np.int64))
    return mixture
