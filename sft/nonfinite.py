"""Losses and gradients that are not finite (NaN, infinity): noticed before the optimizer uses them, on all ranks alike.

A rank whose loss is not finite makes its gradients NaN, so that the reduction over the ranks tells all of them, and the
norm of the gradients, which clipping needs anyway, is the one number that is read from the device in a step.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Literal

import torch
import torch.distributed as dist

from sft.errors import Problem, TrainingStopped
from sft.nonfinite_diagnosis import Pass, describe, look, some
from sft.sharded_head import local_part

logger = logging.getLogger("sft")

Named = Iterable[tuple[str, torch.nn.Parameter]]

_OVERFLOWS = 32  # steps in a row that a loss scale may halve: from 65,536 to 2e-5, below which it is not the scale


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
        self._passes: list[Pass] = []
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
        gradients = {name: local_part(p.grad.detach()) for name, p in named if p.grad is not None}
        findings = _gather(look(passes, gradients, self._decode, self._measure))
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
            Problem(f"{what} is not saved: {some(names)} would hold numbers that are not finite", hint)
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
