"""Computes the sequences of a micro-batch, a step and an epoch, and the number of steps."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any

from sft.config.schema import TrainingKeys
from sft.errors import UserError

_UNPROBED_STEP = 8  # sequences per step for `per_device_train_batch_size: auto`, before the batch size is probed


@dataclass(frozen=True, slots=True)
class BatchPlan:
    """Sizes of the batches, and the number of steps.

    Attributes:
        world_size: number of processes.
        per_device_train_batch_size: sequences of one micro-batch on one process.
        gradient_accumulation_steps: micro-batches of one optimizer step.
        global_batch_size: sequences of one optimizer step over all processes.
        train_rows: sequences of an epoch, after packing; None for streamed data.
        tokens_per_epoch: tokens of an epoch, without padding; None for streamed data.
        steps_per_epoch: optimizer steps of an epoch; None for streamed data.
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
        """Returns all numbers by name."""
        return asdict(self)

    def __str__(self) -> str:
        epoch = "data is streamed"
        if self.train_rows is not None:
            sizes = f"{self.train_rows:,} sequences ({self.tokens_per_epoch:,} tokens)"
            epoch = f"{sizes} = {self.steps_per_epoch:,} steps per epoch"
        return (
            f"{self.per_device_train_batch_size} sequences per micro-batch × {self.gradient_accumulation_steps} "
            f"accumulation steps × {self.world_size} processes = {self.global_batch_size} sequences per step; {epoch}; "
            f"{self.total_steps:,} steps in total"
        )


def sequences_per_step(keys: TrainingKeys, world_size: int) -> int:
    """Returns the sequences of an optimizer step over all processes."""
    if keys.global_batch_size is not None:
        return keys.global_batch_size
    if keys.per_device_train_batch_size == "auto":
        return _UNPROBED_STEP
    return keys.per_device_train_batch_size * keys.gradient_accumulation_steps * world_size


def plan_batches(
    keys: TrainingKeys, train_rows: int | None, tokens_per_epoch: int | None, world_size: int
) -> BatchPlan:
    """Computes the plan; while `per_device_train_batch_size` is still `auto`, with an assumed number.

    Args:
        train_rows, tokens_per_epoch: of an epoch; None for streamed data, for which `max_steps` is given.

    Raises:
        UserError: `global_batch_size` is not a multiple of the micro-batches of all processes.
    """
    per_device = _micro_batch_size(keys, world_size)
    accumulation = keys.gradient_accumulation_steps
    if keys.global_batch_size is not None:
        accumulation, rest = divmod(keys.global_batch_size, per_device * world_size)
        if rest or not accumulation:
            rows = per_device * world_size
            sizes = f"{per_device} sequences × {world_size} processes"
            message = f"{keys.global_batch_size} is not a multiple of {rows} ({sizes})"
            hint = f"use a multiple of {rows}, or another per_device_train_batch_size"
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


def _micro_batch_size(keys: TrainingKeys, world_size: int) -> int:
    """Returns the size, or an assumed one for `auto`: what matters is the size of a step, and that is known."""
    if keys.per_device_train_batch_size != "auto":
        return keys.per_device_train_batch_size
    return 1 if keys.global_batch_size is not None else max(1, _UNPROBED_STEP // world_size)


def _steps_per_epoch(keys: TrainingKeys, train_rows: int, per_device: int, world_size: int, accumulation: int) -> int:
    batches = math.ceil(train_rows / (per_device * world_size))
    if keys.dataloader_drop_last:
        batches = train_rows // (per_device * world_size)
        if not batches:
            message = f"{train_rows} sequences are fewer than {per_device} sequences × {world_size} processes"
            raise UserError(keys.problem("dataloader_drop_last", message, "set it to false, or use smaller batches"))
    return max(1, math.ceil(batches / accumulation))
