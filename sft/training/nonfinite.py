"""Losses and gradients that are not finite (NaN, infinity): noticed before the optimizer uses them, on all ranks alike.

A rank whose loss is not finite makes its gradients NaN, so that the reduction over the ranks tells all of them by the
norm of the gradients, which clipping needs anyway. An optimizer that can leave a step out on the device is told there,
and the host learns of it one step later, while the device is busy with that one's passes.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch

from sft.distributed.collectives import gather_objects, sum_over_ranks
from sft.distributed.dtensor import to_local
from sft.errors import Problem, TrainingStopped
from sft.training.nonfinite_report import Pass, describe, look, some

logger = logging.getLogger("sft")

Named = Iterable[tuple[str, torch.nn.Parameter]]

_OVERFLOWS = 32  # steps in a row that a loss scale may halve: from 65,536 to 2e-5, below which it is not the scale


@dataclass(frozen=True, slots=True)
class _Asked:
    """A step that was asked for: what its diagnosis takes, and the answer on its way to the host."""

    step: int
    passes: list[Pass]
    norms: Mapping[str, torch.Tensor]
    is_bad: Callable[[], bool]


class NonfiniteGuard:
    """Judges each optimizer step: `ask` on the device, `answer` on the host, at once or after the next step's passes.

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
        self._asked: _Asked | None = None
        self._overflows = 0
        self.skipped = 0

    @property
    def passes(self) -> int:
        """Passes of the step so far."""
        return len(self._passes)

    def forget(self, kept: int) -> None:
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

    def ask(self, norm: torch.Tensor, norms: Mapping[str, torch.Tensor], step: int) -> torch.Tensor:
        """Whether the optimizer step must be left out whose passes were watched, as 1 or 0: a float32 scalar.

        Nothing is read from the device. `answer` must be called before the next step is asked for.

        Args:
            norm: of all gradients, before they are clipped, the same on all ranks.
            norms: of each gradient, or of this rank's part of it, by its parameter's name.
            step: the step that is about to be made, counted from 1.
        """
        passes, self._passes = self._passes, []
        is_bad = norm.isfinite().logical_not().float()
        self._asked = _Asked(step, passes, norms, _arriving(is_bad))
        return is_bad

    def answer(self, *, scaled: bool = False) -> bool:
        """The same on the host, once for each step asked for; says what is wrong with one that is left out.

        The weights must still be those before the step, which a step that is left out has not moved.

        Args:
            scaled: whether a loss scale (fp16) is in use, which leaves steps out itself when gradients overflow.

        Raises:
            TrainingStopped: the step is not finite and `action` is to stop, or `limit` steps were left out before it.
        """
        asked, self._asked = self._asked, None
        if asked is None or not asked.is_bad():
            self._overflows = 0
            return False
        findings = gather_objects(look(asked.passes, asked.norms, self._decode, self._measure))
        if scaled and not any(finding.passes for finding in findings) and self._overflows < _OVERFLOWS:
            self._overflows += 1
            return False
        problems = describe(findings, asked.step)
        if self._action == "stop" or self.skipped >= self._limit:
            raise TrainingStopped(*problems, self._advice())
        self.skipped += 1
        logger.warning("%s", "\n".join(str(p) for p in problems))
        logger.warning("step %d is left out (%d of at most %d)", asked.step, self.skipped, self._limit)
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


def _arriving(flag: torch.Tensor) -> Callable[[], bool]:
    """`flag` on its way to the host: a call waits for what was queued before it, and for nothing behind it."""
    if flag.device.type != "cuda":
        return lambda: bool(flag)
    on_host = flag.to("cpu", non_blocking=True)  # in pinned memory
    arrived = torch.cuda.Event()
    arrived.record(torch.cuda.current_stream(flag.device))

    def read() -> bool:
        arrived.synchronize()
        return bool(on_host)

    return read


def nonfinite_parameters(parameters: Named) -> list[str]:
    """Names of the trained parameters that hold a number that is not finite, on this rank.

    One number is read from the device where all is well.
    """
    trained = [
        (name, to_local(p.detach())) for name, p in parameters if p.requires_grad and to_local(p.detach()).numel()
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
    """Gathers the names of all ranks; where all are finite they exchange a single number."""
    return gather_objects(names) if int(sum_over_ranks(torch.tensor(len(names)))) else [names]
