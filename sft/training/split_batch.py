"""A collated pass as two of half its rows, or of half its documents."""

from __future__ import annotations

from itertools import accumulate
from typing import Any

import torch

from sft.data.loading.document_offsets import DocumentOffsets
from sft.loss.token_loss import trained_positions


def split_batch(batch: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]] | None:
    """The two halves; None when there is one row or document, which must stay whole.

    A flattened pass is cut between two documents, where both sides come nearest to the same length; a padded one
    between two rows.

        documents  a a a | b b | c c c c | d        (1, 10)
        halves     a a a | b b      c c c c | d     (1, 5) and (1, 5)

    Args:
        batch: from `collation.Collator`. Together the halves have its tokens, its `lengths` in their sum, and its
            trained tokens.
    """
    documents = batch.get("documents")
    if isinstance(documents, DocumentOffsets):
        return _between_documents(batch, documents)
    rows = len(batch["input_ids"])
    if rows < 2:
        return None
    return _rows(batch, slice(None, rows // 2)), _rows(batch, slice(rows // 2, None))


def _rows(batch: dict[str, Any], side: slice) -> dict[str, Any]:
    part = {name: value[side] for name, value in batch.items() if name != "trained_positions"}
    return {**part, "trained_positions": trained_positions(part["labels"])}


def _between_documents(
    batch: dict[str, Any], documents: DocumentOffsets
) -> tuple[dict[str, Any], dict[str, Any]] | None:
    if len(documents.lengths) < 2:
        return None
    ends_of_documents = list(accumulate(documents.lengths))
    cut = min(range(1, len(ends_of_documents)), key=lambda n: abs(2 * ends_of_documents[n - 1] - ends_of_documents[-1]))
    middle = ends_of_documents[cut - 1]
    ends = batch["lengths"].cumsum(0)  # (rows,) of real tokens; fillers, which count nothing, come last
    starts = ends - batch["lengths"]
    first, second = starts < middle, (ends > middle) | (starts >= middle)  # a row that is cut stands in both
    return (
        _documents(
            batch, slice(None, middle), documents.lengths[:cut], (ends.clamp(max=middle) - starts)[first], first
        ),
        _documents(
            batch, slice(middle, None), documents.lengths[cut:], (ends - starts.clamp(min=middle))[second], second
        ),
    )


def _documents(
    batch: dict[str, Any], tokens: slice, documents: tuple[int, ...], lengths: torch.Tensor, rows: torch.Tensor
) -> dict[str, Any]:
    part = {name: batch[name][:, tokens] for name in ("input_ids", "labels", "position_ids")}
    return {
        **part,
        "documents": DocumentOffsets.of(documents).to(lengths.device),
        "lengths": lengths.clamp(min=0),
        "rows": batch["rows"][rows],
        "trained_positions": trained_positions(part["labels"]),
    }
