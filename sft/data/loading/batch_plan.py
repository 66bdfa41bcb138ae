"""The arithmetic of a run: rows of a pass, of an optimizer step, of an epoch, and the number of steps."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any

from sft.config.schema import TrainingKeys
from sft.errors import UserError

_BEFORE_PROBES = 8  # rows of a step with `per_device_train_batch_size: auto` alone, while nothing was tried yet


@dataclass(frozen=True, slots=True)
class BatchPlan:
    """How rows become steps.

    Attributes:
        world_size: processes that train together.
        per_device_train_batch_size: rows of one pass on one process.
        gradient_accumulation_steps: passes of one optimizer step.
        global_batch_size: rows of one optimizer step over all processes.
        train_rows: rows of an epoch, after packing; None when they are streamed and not known.
        tokens_per_epoch: tokens of an epoch, padding not counted; None when they are streamed.
        steps_per_epoch: optimizer steps of an epoch; None when they are streamed.
        total_steps: optimizer steps of the run.
    """

    world_size: int
    per_device_train_batch_size: int
    gradient_accumulation_steps: int
    global_batch_size: int
    train_rows: int | None
    tokens_per_epoch: int | None
    steps_per_epoch: int | None
    total_steps: int

    def as_json(self) -> dict[str, Any]:
        """All numbers by name."""
        return asdict(self)

    def __str__(self) -> str:
        epoch = "rows are streamed"
        if self.train_rows is not None:
            epoch = (
                f"{self.train_rows:,} rows ({self.tokens_per_epoch:,} tokens) = {self.steps_per_epoch:,} steps an epoch"
            )
        return (
            f"{self.per_device_train_batch_size} rows a pass × {self.gradient_accumulation_steps} passes × "
            f"{self.world_size} processes = {self.global_batch_size} rows a step; {epoch}; "
            f"{self.total_steps:,} steps in all"
        )


def rows_a_step(keys: TrainingKeys, world_size: int) -> int:
    """Rows of an optimizer step over all processes."""
    if keys.global_batch_size is not None:
        return keys.global_batch_size
    if keys.per_device_train_batch_size == "auto":
        return _BEFORE_PROBES
    return keys.per_device_train_batch_size * keys.gradient_accumulation_steps * world_size


def plan_batches(
    keys: TrainingKeys, train_rows: int | None, tokens_per_epoch: int | None, world_size: int
) -> BatchPlan:
    """The run's arithmetic; while `per_device_train_batch_size` is still `auto`, with a number that stands for it.

    Args:
        train_rows, tokens_per_epoch: of an epoch; None when they are streamed, and `max_steps` is given.
        world_size: processes that train together.

    Raises:
        UserError: `global_batch_size` is no multiple of the rows of one pass over all processes.
    """
    per_device = _rows_a_pass(keys, world_size)
    accumulation = keys.gradient_accumulation_steps
    if keys.global_batch_size is not None:
        accumulation, rest = divmod(keys.global_batch_size, per_device * world_size)
        if rest or not accumulation:
            rows = per_device * world_size
            message = f"{keys.global_batch_size} is no multiple of {rows} ({per_device} rows × {world_size} processes)"
            hint = f"take a multiple of {rows}, or another per_device_train_batch_size"
            raise UserError(keys.problem("global_batch_size", message, hint))
    steps = None if train_rows is None else _steps_per_epoch(keys, train_rows, per_device, world_size, accumulation)
    total = keys.max_steps if steps is None or keys.max_steps > 0 else math.ceil(keys.num_train_epochs * steps)
    return BatchPlan(
        world_size=world_size,
        per_device_train_batch_size=per_device,
        gradient_accumulation_steps=accumulation,
        global_batch_size=per_device * accumulation * world_size,
        train_rows=train_rows,
        tokens_per_epoch=tokens_per_epoch,
        steps_per_epoch=steps,
        total_steps=total,
    )


def _rows_a_pass(keys: TrainingKeys, world_size: int) -> int:
    """The number, or one that may stand for `auto`: the rows of a step are what matters, and those are known."""
    if keys.per_device_train_batch_size != "auto":
        return keys.per_device_train_batch_size
    return 1 if keys.global_batch_size is not None else max(1, _BEFORE_PROBES // world_size)


def _steps_per_epoch(keys: TrainingKeys, train_rows: int, per_device: int, world_size: int, accumulation: int) -> int:
    batches = math.ceil(train_rows / (per_device * world_size))
    if keys.dataloader_drop_last:
        batches = train_rows // (per_device * world_size)
        if not batches:
            message = f"{train_rows} rows are less than one pass of {per_device} rows × {world_size} processes"
            raise UserError(keys.problem("dataloader_drop_last", message, "set it to false, or take smaller batches"))
    return max(1, math.ceil(batches / accumulation))
