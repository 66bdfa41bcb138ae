"""Splits a collated micro-batch in two: between samples, or between documents where it is flattened."""

from __future__ import annotations

from itertools import accumulate
from typing import Any

import torch

from sft.data.loading.document_offsets import DocumentOffsets
from sft.loss.token_loss import trained_positions

Batch = dict[str, Any]


def split_batch(batch: Batch) -> tuple[Batch, Batch] | None:
    """Splits a micro-batch in two; returns None for a single sample or document, which cannot be split.

    A padded micro-batch is split between two samples. A flattened one is split between the two documents where the
    halves come closest to the same length:

        documents  a a a | b b | c c c c | d        (1, 10)
        halves     a a a | b b      c c c c | d     (1, 5) and (1, 5)

    Args:
        batch: from `collator.Collator`. The halves together have the same tokens, supervised tokens and sum of
            `lengths`.
    """
    documents = batch.get("documents")
    if isinstance(documents, DocumentOffsets):
        return _split_flattened(batch, documents)
    samples = len(batch["input_ids"])
    if samples < 2:
        return None
    return _take_samples(batch, slice(None, samples // 2)), _take_samples(batch, slice(samples // 2, None))


def _take_samples(batch: Batch, samples: slice) -> Batch:
    part = {name: value[samples] for name, value in batch.items() if name != "trained_positions"}
    return {**part, "trained_positions": trained_positions(part["labels"])}


def _split_flattened(batch: Batch, documents: DocumentOffsets) -> tuple[Batch, Batch] | None:
    if len(documents.lengths) < 2:
        return None
    ends = list(accumulate(documents.lengths))
    cut = min(range(1, len(ends)), key=lambda n: abs(2 * ends[n - 1] - ends[-1]))
    middle = ends[cut - 1]
    row_ends = batch["lengths"].cumsum(0)  # (rows,) in real tokens; fillers have none and come last
    row_starts = row_ends - batch["lengths"]
    # A row that is split belongs to both halves.
    first, second = row_starts < middle, (row_ends > middle) | (row_starts >= middle)
    first_lengths = (row_ends.clamp(max=middle) - row_starts)[first]
    second_lengths = (row_ends - row_starts.clamp(min=middle))[second]
    return (
        _take_documents(batch, slice(None, middle), documents.lengths[:cut], first_lengths, first),
        _take_documents(batch, slice(middle, None), documents.lengths[cut:], second_lengths, second),
    )


def _take_documents(
    batch: Batch, tokens: slice, documents: tuple[int, ...], lengths: torch.Tensor, rows: torch.Tensor
) -> Batch:
    part = {name: batch[name][:, tokens] for name in ("input_ids", "labels", "position_ids")}
    return {
        **part,
        "documents": DocumentOffsets.of(documents).to(lengths.device),
        "lengths": lengths.clamp(min=0),
        "rows": batch["rows"][rows],
        "trained_positions": trained_positions(part["labels"]),
    }
