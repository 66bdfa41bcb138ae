"""Detects losses and gradients that are not finite (NaN, infinity) before the optimizer uses them, alike on all ranks.

A rank whose loss is not finite makes its gradients NaN. The reduction over the ranks spreads them, so every rank finds
them in the gradient norm, which clipping needs anyway. An optimizer that can skip a step on the device gets the flag
there, and the host reads it one step later, while the device is busy with the next step's micro-batches.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch

from sft.distributed.collectives import gather_objects, sum_over_ranks
from sft.distributed.dtensor import to_local
from sft.errors import Problem, TrainingStopped
from sft.training.nonfinite_report import MicroBatch, describe, diagnose, join_names

logger = logging.getLogger("sft")

_OVERFLOWS = 32  # halvings of the loss scale in a row: 65,536 becomes 2e-5, below which the scale is not the cause


@dataclass(frozen=True, slots=True)
class _Pending:
    """A step whose flag has not been read yet, with what a diagnosis needs."""

    step: int
    micro_batches: list[MicroBatch]
    norms: Mapping[str, torch.Tensor]
    is_bad: Callable[[], bool]


class NonfiniteGuard:
    """Checks each optimizer step: `ask` on the device, `answer` on the host, at once or one step later.

    Args:
        action: `stop` ends the run; `skip` skips the step.
        limit: steps that may be skipped; the run ends at the next one.
        decode: token ids to text.
        measure: the loss of a batch in evaluation mode, on this rank alone.

    Attributes:
        skipped: steps skipped so far.
    """

    def __init__(
        self,
        action: Literal["stop", "skip"],
        limit: int,
        decode: Callable[[list[int]], str | list[str]],
        measure: Callable[[dict[str, Any]], torch.Tensor],
    ) -> None:
        self._action, self._limit = action, limit
        self._decode, self._measure = decode, measure
        self._micro_batches: list[MicroBatch] = []
        self._pending: _Pending | None = None
        self._overflows = 0
        self.skipped = 0

    @property
    def passes(self) -> int:
        """Micro-batches of the current step so far."""
        return len(self._micro_batches)

    def forget(self, kept: int) -> None:
        """Drops all micro-batches of the current step but the first `kept`: they are run again after an OOM."""
        del self._micro_batches[kept:]

    def watch(self, loss: torch.Tensor, inputs: Mapping[str, Any]) -> torch.Tensor:
        """Returns the loss of one micro-batch: unchanged to the last bit if finite, else with NaN gradients.

        0 · loss is 0 for every finite number and NaN for all others. Nothing is read from the device.
        """
        with torch.no_grad():
            self._micro_batches.append((loss.isfinite(), inputs))
            factor = 1 + 0 * loss
        return loss * factor

    def ask(self, norm: torch.Tensor, norms: Mapping[str, torch.Tensor], step: int) -> torch.Tensor:
        """Returns whether the watched step must be skipped: 1 or 0, a float32 scalar on the device.

        Nothing is read from the device. `answer` must be called before the next step is asked for.

        Args:
            norm: of all gradients, before clipping, the same on all ranks.
            norms: of each gradient, or of this rank's shard of it, by parameter name.
            step: the step that is about to be made, counted from 1.
        """
        micro_batches, self._micro_batches = self._micro_batches, []
        is_bad = norm.isfinite().logical_not().float()
        self._pending = _Pending(step, micro_batches, norms, copy_to_host(is_bad))
        return is_bad

    def answer(self, *, scaled: bool = False) -> bool:
        """Returns the same on the host, once for each step asked for, and logs what is wrong with a skipped step.

        The weights must still be those before the step; a step that was skipped has not changed them.

        Args:
            scaled: whether a loss scale (fp16) is in use: its scaler skips steps whose gradients overflow.

        Raises:
            TrainingStopped: the step is not finite and `action` is `stop`, or `limit` steps were skipped already.
        """
        pending, self._pending = self._pending, None
        if pending is None or not pending.is_bad():
            self._overflows = 0
            return False
        findings = gather_objects(diagnose(pending.micro_batches, pending.norms, self._decode, self._measure))
        if scaled and not any(finding.micro_batches for finding in findings) and self._overflows < _OVERFLOWS:
            self._overflows += 1
            return False
        problems = describe(findings, pending.step)
        if self._action == "stop" or self.skipped >= self._limit:
            raise TrainingStopped(*problems, self._advice())
        self.skipped += 1
        logger.warning("%s", "\n".join(str(p) for p in problems))
        logger.warning("step %d is skipped (%d of at most %d)", pending.step, self.skipped, self._limit)
        return True

    def _advice(self) -> Problem:
        done = "training stopped before this step: the weights and the last checkpoint are unchanged"
        if self._action == "skip":
            done = f"{self._limit} steps were skipped before this one (nonfinite_limit); {done}"
        hint = (
            "look at the rows above; if they are sound, look at the model's weights, then lower learning_rate or set "
            "max_grad_norm; on_nonfinite: skip skips such steps"
        )
        return Problem(done, hint)


def copy_to_host(flag: torch.Tensor) -> Callable[[], bool]:
    """Starts to copy `flag` to the host and returns a function that waits for it, but not for work queued later."""
    if flag.device.type != "cuda":
        return lambda: bool(flag)
    on_host = flag.to("cpu", non_blocking=True)  # in pinned memory
    arrived = torch.cuda.Event()
    arrived.record(torch.cuda.current_stream(flag.device))

    def read() -> bool:
        arrived.synchronize()
        return bool(on_host)

    return read


def nonfinite_parameters(model: torch.nn.Module) -> list[str]:
    """Returns the names of the trained parameters that hold a number that is not finite, on this rank.

    If there is none, one number is read from the device.
    """
    trained = {name: to_local(p.detach()) for name, p in model.named_parameters() if p.requires_grad}
    trained = {name: part for name, part in trained.items() if part.numel()}
    if not trained:
        return []
    with torch.no_grad():
        largest = torch._foreach_norm(list(trained.values()), float("inf"))
        device = largest[0].device
        finite = torch.stack([norm.to(device, torch.float32) for norm in largest]).isfinite()
    if bool(finite.all()):
        return []
    return [name for name, is_finite in zip(trained, finite.tolist(), strict=True) if not is_finite]


def require_finite(model: Any, what: str) -> None:
    """Refuses to save a model whose parameters are not finite; a collective, so every rank must call it.

    Args:
        what: the thing to save, e.g. `checkpoint-100`.

    Raises:
        TrainingStopped: on all ranks, if a parameter is not finite on any.
    """
    own = nonfinite_parameters(model)
    if not int(sum_over_ranks(torch.tensor(len(own)))):  # a sound model costs the ranks a single number
        return
    names = tuple(dict.fromkeys(name for names in gather_objects(own) for name in names))
    hint = (
        "if training made them so, resume from an earlier checkpoint with a lower learning_rate; at the first step "
        "the model already had them"
    )
    raise TrainingStopped(
        Problem(f"{what} is not saved: {join_names(names)} would hold numbers that are not finite", hint)
    )
