"""What is known of a step that is not finite: its passes, the rows that do it alone, the gradients; how it is told."""

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

Pass = tuple[torch.Tensor, Mapping[str, Any]]  # whether its loss is finite, and its batch

_SHOWN = 4  # rows and names that a message lists
_TEXT = 160  # characters of a row's text in a message


@dataclass(frozen=True)
class Finding:
    """What one rank knows of a step that is not finite.

    Attributes:
        rank: counted from 0.
        passes: those whose loss is not finite, counted from 1.
        passes_made: all of the step.
        rows: numbers of the training rows to look at; where a loss is not finite, those that alone give such a loss.
        texts: how these begin.
        alone: whether each of them was found to do it alone.
        gradients: names of the parameters whose gradient has such a norm.
        parameters: with a gradient.
    """

    rank: int
    passes: tuple[int, ...]
    passes_made: int
    rows: tuple[int, ...]
    texts: tuple[str, ...]
    alone: bool
    gradients: tuple[str, ...]
    parameters: int


def look(
    passes: Sequence[Pass],
    norms: Mapping[str, torch.Tensor],
    decode: Callable[[list[int]], str | list[str]],
    measure: Callable[[dict[str, Any]], torch.Tensor] | None,
) -> Finding:
    """Reads as much from the device as it takes: the run is about to end, or to lose a step.

    Args:
        passes: of the step.
        norms: of each gradient, by its parameter's name.
        decode, measure: see `sft.training.nonfinite.NonfiniteGuard`.
    """
    bad = [number for number, (is_finite, _) in enumerate(passes, 1) if not bool(is_finite)]
    suspects = [passes[number - 1][1] for number in bad] or [inputs for _, inputs in passes]
    documents = [found for inputs in suspects for found in documents_alone(inputs)]
    guilty = []
    if bad and measure is not None:
        guilty = [found for found in documents if not bool(measure(found[1]).isfinite())]
    listed = guilty or documents
    texts = [decode(inputs["input_ids"].flatten().tolist()[:_TEXT]) for _, inputs in listed[:_SHOWN]]
    return Finding(
        rank=current_rank(),
        passes=tuple(bad),
        passes_made=len(passes),
        rows=tuple(dict.fromkeys(row for row, _ in listed if row >= 0)),
        texts=tuple(str(text)[:_TEXT] for text in texts),
        alone=bool(guilty),
        gradients=tuple(name for name, norm in norms.items() if not bool(to_local(norm).isfinite())),
        parameters=len(norms),
    )


def describe(findings: Sequence[Finding], step: int) -> list[Problem]:
    """What happened, and where to look: one problem for the step and one for each rank that knows more."""
    guilty = [finding for finding in findings if finding.passes]
    if guilty:
        ranks = ", ".join(str(finding.rank) for finding in guilty)
        problems = [Problem(f"step {step}: the loss is not finite on rank {ranks}")]
    elif names := tuple(dict.fromkeys(name for finding in findings for name in finding.gradients)):
        which = f"{len(names)} of {findings[0].parameters} parameters: {some(names)}"
        problems = [Problem(f"step {step}: the loss is finite, the gradients are not (or exceed 1e19), of {which}")]
    else:
        problems = [
            Problem(f"step {step}: every gradient is finite, and their norm is too large for its number format")
        ]
    for finding in guilty or findings:
        where = f"rank {finding.rank}"
        if finding.passes:
            where += f", pass {some(finding.passes)} of {finding.passes_made}"
        rows = f"row {some(finding.rows)} of the prepared training data (from 0)" if finding.rows else "rows"
        what = "has such a loss alone" if finding.alone else "is in it"
        begins = "\n    ".join(f"begins {text!r}" for text in finding.texts)
        problems.append(Problem(f"{where}: {rows} {what}", begins))
    return problems


def documents_alone(inputs: Mapping[str, Any]) -> Iterator[tuple[int, dict[str, Any]]]:
    """Each document of a batch as a batch of its own, with the number of its training row (-1 where unknown).

    Args:
        inputs: as the collator makes them: flattened with `documents`, or padded, where a row counts as one document;
            `rows` (rows,) are their numbers in the training data, -1 for those that have none.
    """
    lengths = inputs["lengths"].tolist()  # tokens of each row; 0 for fillers, which stand at the end
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


def some(items: Sequence[object]) -> str:
    """The first of them, and how many there are besides."""
    shown = ", ".join(str(item) for item in items[:_SHOWN])
    return shown if len(items) <= _SHOWN else f"{shown} and {len(items) - _SHOWN} more"
