"""`per_device_train_batch_size: auto` for a model and its data, decided by running its longest samples."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import torch

from sft.checkpoint.discovery import RUN_SHAPE
from sft.config.schema import TrainingKeys
from sft.data.loading.collator import Collator, row_lengths
from sft.distributed.device import training_device
from sft.distributed.memory import memory_limit
from sft.errors import UserError
from sft.estimate.batch_size_finder import BatchChoice, candidate_sizes, choose_batch_size, longest_rows
from sft.estimate.memory import optimizer_memory
from sft.loss.forward import TokenForward
from sft.loss.token_loss import LossSettings
from sft.model.precision import Precision

logger = logging.getLogger("sft")

_KEY = "per_device_train_batch_size"


def with_rows(keys: TrainingKeys, rows: int) -> TrainingKeys:
    """Returns the keys with a number in the place of `auto`."""
    return keys.model_copy(update={_KEY: rows})


def rows_of_checkpoint(checkpoint: Path) -> int | None:
    """Returns the batch size that the run of this checkpoint had chosen: a resumed run keeps it."""
    file = checkpoint / RUN_SHAPE
    return int(json.loads(file.read_text())["shape"][_KEY]) if file.is_file() else None


def probe_batch_size(
    model: Any,
    rows: Any,
    keys: TrainingKeys,
    collator: Collator,
    loss: LossSettings,
    precision: Precision,
    *,
    world_size: int,
    local_world_size: int,
) -> int:
    """Chooses the fastest batch size that fits, and logs all sizes that were tried; every rank must call it.

    The model is moved to the device where it will be trained, and otherwise unchanged.

    Args:
        model: as it is trained, with its adapter.
        rows: the training samples.
        world_size, local_world_size: processes that train together, and those of them on this machine.

    Raises:
        UserError: the samples of a step cannot be divided among the ranks, or a single sample does not fit.
    """
    device = training_device()
    per_rank, rest = divmod(keys.global_batch_size or world_size, world_size)
    if rest:
        message = f"{keys.global_batch_size} samples per step cannot be divided among {world_size} processes"
        raise UserError(keys.problem("global_batch_size", message, f"take a multiple of {world_size}"))
    candidates = candidate_sizes(per_rank if keys.global_batch_size else None, max(1, len(rows) // world_size))
    longest = longest_rows(row_lengths(rows), candidates[-1]).tolist()
    if not getattr(model, "is_quantized", False):  # such a model is there already
        model.to(device)
    # After the move: flash attention does not run in main memory, and finding the head would fail there.
    forward = TokenForward(model, loss)
    trainable = [p for p in model.parameters() if p.requires_grad]
    if precision.master_weights:
        for parameter in trainable:  # as the optimizer will set it
            parameter.grad_dtype = torch.float32 if parameter.dtype == torch.bfloat16 else parameter.dtype
    optimizer = optimizer_memory(str(keys.optim), trainable, device=device, master_weights=precision.master_weights)
    buckets = sum(p.numel() * p.element_size() for p in trainable) if world_size > 1 else 0
    choice = choose_batch_size(
        model,
        lambda count: _run_pass(model, collator([rows[i] for i in longest[:count]]), forward, precision, device),
        candidates,
        budget=round(keys.auto_batch_memory_fraction * memory_limit(device, local_world_size)),
        reserve=optimizer.states + buckets,
        device=device,
    )
    for line in _table(choice):
        logger.info("%s", line)
    return choice.rows


def _run_pass(
    model: Any, batch: dict[str, Any], forward: TokenForward, precision: Precision, device: torch.device
) -> None:
    """Runs forward and backward pass over a micro-batch from the collator."""
    inputs = {name: value.to(device) for name, value in batch.items()}
    model.train()
    scale = 1 / torch.tensor(float(len(inputs["trained_positions"])), device=device).clamp(min=1)
    half = torch.float16 if precision.fp16 else torch.bfloat16
    with torch.autocast(device.type, half, enabled=precision.fp16 or precision.bf16):
        loss = forward(model, inputs, scale).objective * scale
    loss.backward()


def _table(choice: BatchChoice) -> list[str]:
    lines = [f"{_KEY}: auto is {choice.rows}: {choice.reason}"]
    for probe in choice.probes:
        took = f"{probe.seconds:.3g} s, {probe.speed:.3g} sequences/s" if probe.fits else "out of memory"
        lines.append(f"  {probe.rows:>5} sequences per micro-batch: {took}, peak {probe.peak / 2**30:.2f} GiB")
    return lines
