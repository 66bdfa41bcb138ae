"""Diagnoses a step that is not finite: which micro-batches, rows and gradients, and the messages about them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from sft.data.documents import IGNORE_INDEX
from sft.data.loading.document_offsets import DocumentOffsets
from sft.distributed.collectives import current_rank
from sft.distributed.dtensor import to_local
from sft.errors import Problem

MicroBatch = tuple[torch.Tensor, Mapping[str, Any]]  # whether its loss is finite, and its inputs

_SHOWN = 4  # rows or names listed in a message
_TEXT = 160  # characters of a row's text in a message


@dataclass(frozen=True)
class Finding:
    """What one rank found out about a step that is not finite.

    Attributes:
        rank: counted from 0.
        micro_batches: those whose loss is not finite, counted from 1.
        micro_batch_count: of the step.
        rows: numbers of the training rows to look at; those whose own loss is not finite, if there are any.
        texts: how these rows begin.
        alone: whether the loss of each of these rows is not finite by itself.
        gradients: names of the parameters whose gradient norm is not finite.
        parameters: number of parameters with a gradient.
    """

    rank: int
    micro_batches: tuple[int, ...]
    micro_batch_count: int
    rows: tuple[int, ...]
    texts: tuple[str, ...]
    alone: bool
    gradients: tuple[str, ...]
    parameters: int


def diagnose(
    micro_batches: Sequence[MicroBatch],
    norms: Mapping[str, torch.Tensor],
    decode: Callable[[list[int]], str | list[str]],
    measure: Callable[[dict[str, Any]], torch.Tensor],
) -> Finding:
    """Finds the micro-batches, rows and gradients that are not finite; reads from the device as often as it needs to.

    Args:
        micro_batches, norms: of the step.
        decode, measure: see `sft.training.nonfinite.NonfiniteGuard`.
    """
    bad = [number for number, (is_finite, _) in enumerate(micro_batches, 1) if not bool(is_finite)]
    suspects = [micro_batches[number - 1][1] for number in bad] or [inputs for _, inputs in micro_batches]
    documents = [found for inputs in suspects for found in split_into_documents(inputs)]
    guilty = [found for found in documents if bad and not bool(measure(found[1]).isfinite())]
    listed = guilty or documents
    texts = [decode(inputs["input_ids"].flatten().tolist()[:_TEXT]) for _, inputs in listed[:_SHOWN]]
    return Finding(
        rank=current_rank(),
        micro_batches=tuple(bad),
        micro_batch_count=len(micro_batches),
        rows=tuple(dict.fromkeys(row for row, _ in listed if row >= 0)),
        texts=tuple(str(text)[:_TEXT] for text in texts),
        alone=bool(guilty),
        gradients=tuple(name for name, norm in norms.items() if not bool(to_local(norm).isfinite())),
        parameters=len(norms),
    )


def describe(findings: Sequence[Finding], step: int) -> list[Problem]:
    """Describes what happened and where to look: one problem for the step, then one for each rank concerned."""
    guilty = [finding for finding in findings if finding.micro_batches]
    if guilty:
        ranks = ", ".join(str(finding.rank) for finding in guilty)
        problems = [Problem(f"step {step}: the loss is not finite on rank {ranks}")]
    elif names := tuple(dict.fromkeys(name for finding in findings for name in finding.gradients)):
        which = f"{len(names)} of {findings[0].parameters} parameters: {join_names(names)}"
        message = f"step {step}: the loss is finite, but not the gradients (or they exceed 1e19) of {which}"
        problems = [Problem(message)]
    else:
        problems = [Problem(f"step {step}: every gradient is finite, but their norm overflows float32")]
    for finding in guilty or findings:
        where, unit = f"rank {finding.rank}", "step"
        if finding.micro_batches:
            where += f", micro-batch {join_names(finding.micro_batches)} of {finding.micro_batch_count}"
            unit = "micro-batch"
        number = f"row {join_names(finding.rows)} of the prepared training data (from 0)"
        rows = number if finding.rows else "row without a number"
        what = "has such a loss by itself" if finding.alone else f"is in this {unit}"
        begins = "\n    ".join(f"begins {text!r}" for text in finding.texts)
        problems.append(Problem(f"{where}: {rows} {what}", begins))
    return problems


def split_into_documents(inputs: Mapping[str, Any]) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yields each document of a batch as a batch of its own, with the number of its training row (-1 if unknown).

    Args:
        inputs: from the collator: flattened with `documents`, or padded, where a row counts as one document;
            `rows` (rows,) are the row numbers in the training data, -1 for rows without one.
    """
    lengths = inputs["lengths"].tolist()  # tokens of each row; 0 for fillers, which come last
    rows = inputs["rows"].tolist() if "rows" in inputs else [-1] * len(lengths)
    if "documents" not in inputs:
        for at, (row, length) in enumerate(zip(rows, lengths, strict=True)):
            if length:
                yield row, _part(inputs, at, 0, length)
        return
    start = 0
    for length in inputs["documents"].lengths:
        while lengths and lengths[0] <= 0:
            lengths.pop(0), rows.pop(0)
        if not lengths:
            return
        lengths[0] -= length
        yield rows[0], _part(inputs, 0, start, start + length)
        start += length


def _part(inputs: Mapping[str, Any], row: int, start: int, end: int) -> dict[str, Any]:
    names = ("input_ids", "labels", "position_ids", "attention_mask")
    part: dict[str, Any] = {name: inputs[name][row : row + 1, start:end] for name in names if name in inputs}
    part["lengths"] = torch.tensor([end - start], device=part["labels"].device)
    part["trained_positions"] = (part["labels"].flatten() != IGNORE_INDEX).nonzero().squeeze(-1)
    if "documents" in inputs:
        part["documents"] = DocumentOffsets.of([end - start]).to(part["labels"].device)
    return part


def join_names(items: Sequence[object], limit: int = _SHOWN) -> str:
    """Lists the first `limit` items and the number of the others."""
    shown = ", ".join(str(item) for item in items[:limit])
    return shown if len(items) <= limit else f"{shown} and {len(items) - limit} more"
