"""Losses and gradients that are not finite (NaN, infinity): noticed before the optimizer uses them, on all ranks alike.

A rank whose loss is not finite makes its gradients NaN, so that the reduction over the ranks tells all of them, and the
norm of the gradients, which clipping needs anyway, is the one number that is read from the device in a step.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.distributed as dist

from sft.boundaries import Boundaries
from sft.documents import IGNORE_INDEX
from sft.errors import Problem, TrainingStopped
from sft.sharded_head import local_part

logger = logging.getLogger("sft")

Named = Iterable[tuple[str, torch.nn.Parameter]]

_SHOWN = 4  # rows and names that a message lists
_TEXT = 160  # characters of a row's text in a message
_OVERFLOWS = 32  # steps in a row that a loss scale may halve: from 65,536 to 2e-5, below which it is not the scale


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
        gradients: names of the parameters with such a gradient.
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


class NonfiniteGuard:
    """Judges each optimizer step before it is made.

    Args:
        action: `stop` ends the run; `skip` leaves the step out.
        limit: steps that may be left out before the run ends all the same.
        decode: token ids as text.
        measure: the loss of a batch, in evaluation mode; None where one rank cannot run the model alone.

    Attributes:
        skipped: steps left out so far.
    """

    def __init__(
        self,
        action: Literal["stop", "skip"],
        limit: int,
        decode: Callable[[list[int]], str | list[str]],
        measure: Callable[[dict[str, Any]], torch.Tensor] | None,
    ) -> None:
        self._action, self._limit = action, limit
        self._decode, self._measure = decode, measure
        self._passes: list[tuple[torch.Tensor, Mapping[str, Any]]] = []  # whether its loss is finite, and its batch
        self._overflows = 0
        self.skipped = 0

    @property
    def passes(self) -> int:
        """Passes of the step so far."""
        return len(self._passes)

    def forget(self, kept: int = 0) -> None:
        """The step begins anew behind its first `kept` passes, after an attempt that ran out of memory."""
        del self._passes[kept:]

    def watch(self, loss: torch.Tensor, inputs: Mapping[str, Any]) -> torch.Tensor:
        """The loss of one pass, with NaN gradients where it is not finite, and the same to the last bit where it is.

        0 · loss is 0 for every finite number and NaN for all others. Nothing is read from the device.
        """
        with torch.no_grad():
            self._passes.append((loss.isfinite(), inputs))
            factor = 1 + 0 * loss
        return loss * factor

    def judge(self, norm: torch.Tensor, parameters: Named, step: int, *, scaled: bool = False) -> bool:
        """Whether the optimizer step is left out; its gradients are gone then, so that the optimizer moves nothing.

        Args:
            norm: of all gradients, before they are clipped, the same on all ranks.
            step: the step that is about to be made, counted from 1.
            scaled: whether a loss scale (fp16) is in use, which leaves steps out itself when gradients overflow.

        Raises:
            TrainingStopped: the step is not finite and `action` is to stop, or `limit` steps were left out before it.
        """
        passes, self._passes = self._passes, []
        if bool(norm.isfinite()):
            self._overflows = 0
            return False
        named = [(name, p) for name, p in parameters if p.grad is not None]
        findings = _gather(self._look(passes, named))
        if scaled and not any(finding.passes for finding in findings) and self._overflows < _OVERFLOWS:
            self._overflows += 1
            return False
        problems = describe(findings, step)
        if self._action == "stop" or self.skipped >= self._limit:
            raise TrainingStopped(*problems, self._advice())
        self.skipped += 1
        for _, parameter in named:
            parameter.grad = None
        logger.warning("%s", "\n".join(str(p) for p in problems))
        logger.warning("step %d is left out (%d of at most %d)", step, self.skipped, self._limit)
        return True

    def _advice(self) -> Problem:
        done = "training was stopped before the step: the weights and the last checkpoint are as they were"
        if self._action == "skip":
            done = f"{self._limit} steps were left out before this one (nonfinite_limit), and {done}"
        hint = (
            "look at the rows above; if they are sound, at the model's weights, then lower learning_rate or set "
            "max_grad_norm; on_nonfinite: skip leaves such steps out"
        )
        return Problem(done, hint)

    def _look(self, passes: list[tuple[torch.Tensor, Mapping[str, Any]]], named: list[Any]) -> Finding:
        """Reads as much from the device as it takes: the run is about to end, or to lose a step."""
        bad = [number for number, (is_finite, _) in enumerate(passes, 1) if not bool(is_finite)]
        suspects = [passes[number - 1][1] for number in bad] or [inputs for _, inputs in passes]
        documents = [found for inputs in suspects for found in documents_alone(inputs)]
        guilty = []
        if bad and self._measure is not None:
            guilty = [found for found in documents if not bool(self._measure(found[1]).isfinite())]
        listed = guilty or documents
        texts = [self._decode(inputs["input_ids"].flatten().tolist()[:_TEXT]) for _, inputs in listed[:_SHOWN]]
        return Finding(
            rank=dist.get_rank() if dist.is_initialized() else 0,
            passes=tuple(bad),
            passes_made=len(passes),
            rows=tuple(dict.fromkeys(row for row, _ in listed if row >= 0)),
            texts=tuple(str(text)[:_TEXT] for text in texts),
            alone=bool(guilty),
            gradients=tuple(name for name, p in named if not bool(local_part(p.grad.detach()).isfinite().all())),
            parameters=len(named),
        )


def describe(findings: Sequence[Finding], step: int) -> list[Problem]:
    """What happened, and where to look: one problem for the step and one for each rank that knows more."""
    guilty = [finding for finding in findings if finding.passes]
    if guilty:
        ranks = ", ".join(str(finding.rank) for finding in guilty)
        problems = [Problem(f"step {step}: the loss is not finite on rank {ranks}")]
    elif names := tuple(dict.fromkeys(name for finding in findings for name in finding.gradients)):
        some = f"{len(names)} of {findings[0].parameters} parameters: {_some(names)}"
        problems = [Problem(f"step {step}: the loss is finite, the gradients are not, of {some}")]
    else:
        problems = [
            Problem(f"step {step}: every gradient is finite, and their norm is too large for its number format")
        ]
    for finding in guilty or findings:
        where = f"rank {finding.rank}"
        if finding.passes:
            where += f", pass {_some(finding.passes)} of {finding.passes_made}"
        rows = f"row {_some(finding.rows)} of the prepared training data (from 0)" if finding.rows else "rows"
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
        part["documents"] = Boundaries.of([end - start]).to(part["labels"].device)
    return part


def gradient_norm(parameters: Iterable[torch.nn.Parameter]) -> torch.Tensor:
    """The 2-norm of all gradients together, a float32 scalar on the device, the same on all ranks."""
    norms = [_norm([p.grad for p in group if p.grad is not None]) for group in _by_mesh(parameters)]
    whole = [norm.full_tensor() if hasattr(norm, "full_tensor") else norm for norm in norms]
    if len(whole) == 1:
        return whole[0]
    return torch.linalg.vector_norm(torch.stack(whole)) if whole else torch.tensor(0.0)


def _norm(gradients: list[torch.Tensor]) -> torch.Tensor:
    """Of gradients on one mesh: `torch.nn.utils.get_total_norm`, which would round norms of bfloat16 to bfloat16."""
    norms: list[torch.Tensor] = [gradients[0]] * len(gradients)
    places: dict[Any, list[int]] = {}
    for place, gradient in enumerate(gradients):
        places.setdefault((gradient.device, gradient.dtype), []).append(place)
    for of_kind in places.values():
        found = torch._foreach_norm([gradients[place] for place in of_kind], 2, torch.float32)
        for place, norm in zip(of_kind, found, strict=True):
            norms[place] = norm.to(gradients[0].device)
    return torch.linalg.vector_norm(torch.stack(norms))


def clip_factor(max_norm: float, norm: torch.Tensor) -> torch.Tensor:
    """What clipping multiplies gradients of this norm with, on the device."""
    return (max_norm / (norm + 1e-6)).clamp(max=1.0)


def clip_gradients(parameters: Iterable[torch.nn.Parameter], max_norm: float, norm: torch.Tensor) -> None:
    """Scales all gradients by max_norm / norm where that is below 1, as `torch.nn.utils.clip_grad_norm_` does."""
    for group in _by_mesh(parameters):
        torch.nn.utils.clip_grads_with_norm_(group, max_norm, norm)


def nonfinite_parameters(parameters: Named) -> list[str]:
    """Names of the trained parameters that hold a number that is not finite, on this rank.

    One number is read from the device where all is well.
    """
    trained = [
        (name, local_part(p.detach())) for name, p in parameters if p.requires_grad and local_part(p.detach()).numel()
    ]
    if not trained:
        return []
    with torch.no_grad():
        largest = torch._foreach_norm([p for _, p in trained], float("inf"))
        device = largest[0].device
        finite = torch.stack([norm.to(device, torch.float32) for norm in largest]).isfinite()
    if bool(finite.all()):
        return []
    return [name for (name, _), is_finite in zip(trained, finite.tolist(), strict=True) if not is_finite]


def require_finite(parameters: Named, what: str) -> None:
    """Stops before parameters that are not finite are saved; all ranks must call it.

    Args:
        what: is about to be saved, e.g. `checkpoint-100`.

    Raises:
        TrainingStopped: on all ranks, where those of any rank are not finite.
    """
    names = tuple(dict.fromkeys(name for names in _gather_if_any(nonfinite_parameters(parameters)) for name in names))
    if names:
        hint = (
            "go on from an earlier checkpoint with a lower learning_rate, if the last steps moved them too far; before "
            "the first step the model came with them"
        )
        raise TrainingStopped(
            Problem(f"{what} is not saved: {_some(names)} would hold numbers that are not finite", hint)
        )


def _gather_if_any(names: list[str]) -> list[list[str]]:
    """The names of all ranks; where all are well they exchange a single number."""
    if not (dist.is_initialized() and dist.get_world_size() > 1):
        return [names]
    device = "cpu" if dist.get_backend() == "gloo" else torch.cuda.current_device()
    bad = torch.tensor(len(names), device=device)
    dist.all_reduce(bad)
    return _gather(names) if bad else [names]


def _gather(found: Any) -> list[Any]:
    """What each rank found, by rank."""
    if not (dist.is_initialized() and dist.get_world_size() > 1):
        return [found]
    everywhere: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everywhere, found)
    return everywhere


def _by_mesh(parameters: Iterable[torch.nn.Parameter]) -> list[list[torch.nn.Parameter]]:
    """Parameters with a gradient, those on one device mesh together: one operation cannot span several."""
    groups: dict[Any, list[torch.nn.Parameter]] = {}
    for parameter in parameters:
        if parameter.grad is not None:
            groups.setdefault(getattr(parameter.grad, "device_mesh", None), []).append(parameter)
    return list(groups.values())


def _some(items: Sequence[object]) -> str:
    shown = ", ".join(str(item) for item in items[:_SHOWN])
    return shown if len(items) <= _SHOWN else f"{shown} and {len(items) - _SHOWN} more"
