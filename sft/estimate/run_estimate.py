"""The estimate of a run before it starts: peak memory of each rank, micro-batches, tokens, steps, and a minimum time.

The time is a lower bound and no forecast: the operations of all tokens (`sft.training.mfu`) at the speed of one large
matrix multiplication, which is measured on a CPU and read from the data sheet of a known GPU. Attention, the loss, the
optimizer, padding, recomputation, evaluation and the start of the process are not in it.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import TrainingArguments

from sft.data.loading.batch_plan import BatchPlan
from sft.data.loading.collator import Collator, row_lengths
from sft.data.loading.sampler import EpochSampler
from sft.data.streaming.stream import TrainingStream
from sft.distributed.cpu import measure_flops_per_second
from sft.distributed.memory import held_bytes, memory_limit
from sft.estimate.memory import MemoryEstimate, estimate_memory, optimizer_memory
from sft.estimate.memory_trace import as_fake, fake_batch
from sft.loss.forward import TokenForward
from sft.loss.output_head import assume_output_head
from sft.loss.token_loss import LossSettings
from sft.model.lora import without_adapter
from sft.training.mfu import flops_per_token, peak_flops
from sft.training.optim.factory import splits_masters
from sft.training.optim.split_master_weights import find_summed_weights

logger = logging.getLogger("sft")

_EPOCHS = 20  # in which the longest micro-batch is searched; later ones hardly have a longer one


@dataclass(frozen=True, slots=True)
class RunEstimate:
    """The result of `estimate`.

    Attributes:
        memory: of one rank, in bytes.
        plan: samples, micro-batches and steps.
        device: where a rank computes, e.g. `cpu` or `cuda`.
        limit: bytes that a rank may hold there now.
        rows, tokens, trained_tokens: of the run's longest micro-batch; of a stream, of the longest possible one.
        total_tokens: of the run, padding not counted; None when they are streamed.
        seconds_at_least: of all steps; None where the tokens or the device's speed are not known.
        assumes_batch_size: the batch size is a number in the place of `auto`, which is chosen when the run starts.
    """

    memory: MemoryEstimate
    plan: BatchPlan
    device: str
    limit: int
    rows: int
    tokens: int
    trained_tokens: int
    total_tokens: int | None
    seconds_at_least: float | None
    assumes_batch_size: bool

    def as_json(self) -> dict[str, Any]:
        """Returns all numbers by name; memory in bytes."""
        return {
            "memory": asdict(self.memory),
            "device": self.device,
            "device_limit": self.limit,
            "fits": self.memory.peak <= self.limit,
            "longest_pass": {"rows": self.rows, "tokens": self.tokens, "trained_tokens": self.trained_tokens},
            **self.plan.as_json(),
            "total_tokens": self.total_tokens,
            "seconds_at_least": self.seconds_at_least,
            "assumes_batch_size": self.assumes_batch_size,
        }


def estimate_run(
    model: Any,
    rows: Any,
    arguments: TrainingArguments,
    plan: BatchPlan,
    collator: Collator,
    loss: LossSettings,
    *,
    master_weights: bool,
    max_seq_length: int,
    assumes_batch_size: bool,
) -> RunEstimate:
    """Estimates each rank of a run in which every rank holds a whole model.

    The micro-batch is the longest that the run will really have, collated as in training, and runs through the
    trainer's own forward pass.

    Args:
        model: on the meta device, with its adapter.
        rows: the training samples, or a stream of them.
        master_weights: whether the optimizer keeps float32 values of bfloat16 weights.
        max_seq_length: the assumed length of the samples of a stream.
        assumes_batch_size: as in `RunEstimate`.
    """
    device = arguments.device
    process = 0 if device.type == "cuda" else held_bytes(device)  # a GPU's memory holds no libraries
    batch = collator(_longest_micro_batch(rows, arguments, plan, collator, max_seq_length))
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    run_forward = _fake_forward(model, batch, mode, arguments, loss)
    trainable = [p for p in model.parameters() if p.requires_grad]
    name = str(getattr(arguments.optim, "value", arguments.optim))
    is_single = plan.gradient_accumulation_steps == plan.world_size == 1 and not assumes_batch_size
    memory = estimate_memory(
        model,
        run_forward,
        mode,
        optimizer_memory(name, trainable, device=device, master_weights=master_weights),
        process=process,
        accumulation_steps=plan.gradient_accumulation_steps,
        world_size=plan.world_size,
        master_weights=master_weights,
        summed=find_summed_weights(model) if is_single and splits_masters(name) else None,
    )
    total_tokens = None
    if plan.tokens_per_epoch is not None and plan.steps_per_epoch is not None:
        total_tokens = round(plan.tokens_per_epoch * plan.total_steps / plan.steps_per_epoch)
    estimate = RunEstimate(
        memory=memory,
        plan=plan,
        device=device.type,
        limit=memory_limit(device, plan.world_size),
        rows=len(batch["lengths"]),
        tokens=int(batch["lengths"].sum()),
        trained_tokens=len(batch["trained_positions"]),
        total_tokens=total_tokens,
        seconds_at_least=_least_seconds(without_adapter(model), total_tokens, plan, arguments),
        assumes_batch_size=assumes_batch_size,
    )
    _log_notes(estimate)
    return estimate


def _fake_forward(
    model: Any, batch: dict[str, Any], mode: FakeTensorMode, arguments: TrainingArguments, loss: LossSettings
) -> Callable[[], torch.Tensor]:
    """Makes model and batch fake; returns a function that runs the trainer's forward pass and returns the loss."""
    device, half = arguments.device, _autocast(arguments)
    as_fake(model, mode, device).train()
    forward = TokenForward(model, loss, assume_output_head(without_adapter(model)))
    inputs = fake_batch(batch, mode, device)

    def run_forward() -> torch.Tensor:
        scale = torch.ones((), device=device)
        with torch.autocast(device.type, half, enabled=half is not None):
            return forward(model, inputs, scale).objective * scale

    return run_forward


def _autocast(arguments: TrainingArguments) -> torch.dtype | None:
    """Returns the dtype of autocast; None without."""
    return torch.bfloat16 if arguments.bf16 else torch.float16 if arguments.fp16 else None


def _log_notes(estimate: RunEstimate) -> None:
    """Logs what the reader of the numbers must know."""
    plan, peak = estimate.plan, estimate.memory.peak
    if estimate.assumes_batch_size:
        logger.info(
            "per_device_train_batch_size: auto is chosen when the run starts; "
            "assumed here: %d sequences per micro-batch, %d per step",
            plan.per_device_train_batch_size,
            plan.global_batch_size,
        )
    if estimate.device == "cpu":
        logger.info("The peak is a lower bound: malloc keeps more than the tensors that are counted")
    if peak > estimate.limit:
        logger.warning(
            "The run will hold %.2f GiB at its peak, and there are %.2f: a smaller per_device_train_batch_size or "
            "max_seq_length, activation_checkpoint (mode: selective, then full; the recipes already recompute "
            "everything), or an adapter (lora_config) takes less",
            peak / 2**30,
            estimate.limit / 2**30,
        )


def _least_seconds(model: Any, total_tokens: int | None, plan: BatchPlan, arguments: TrainingArguments) -> float | None:
    """Returns the seconds that the floating point operations of all tokens take if nothing else takes any.

    On a CPU the clock counts the processor time of this process, so that other programs do not raise the bound.
    """
    if total_tokens is None:
        return None
    if arguments.device.type == "cpu":
        dtype = _autocast(arguments) or model.dtype
        speed: float | None = measure_flops_per_second(dtype, lambda: time.process_time() / torch.get_num_threads())
    else:
        speed = peak_flops(arguments.device)
    if speed is None:
        return None
    return flops_per_token(model) * total_tokens / (speed * plan.world_size)


def _longest_micro_batch(
    rows: Any, arguments: TrainingArguments, plan: BatchPlan, collator: Collator, max_seq_length: int
) -> list[dict[str, Any]]:
    """Returns the samples of the run's micro-batch with the most tokens, padding included, in the sampler's order."""
    size = plan.per_device_train_batch_size
    if isinstance(rows, TrainingStream):
        ids = np.zeros(max_seq_length, dtype=np.int64)
        return [{"input_ids": ids, "labels": ids} for _ in range(size)]
    lengths = row_lengths(rows)
    seed = arguments.data_seed if arguments.data_seed is not None else arguments.seed
    strategy = str(getattr(arguments.train_sampling_strategy, "value", arguments.train_sampling_strategy))
    sampler = EpochSampler(len(rows), 0, seed, strategy, lengths, plan.global_batch_size)
    longest, most = sampler.order()[:size], 0
    for epoch in range(min(_EPOCHS, math.ceil(plan.total_steps / (plan.steps_per_epoch or 1)))):
        sampler.set_epoch(epoch)
        batches = np.array_split(sampler.order(), range(size, len(rows), size))
        tokens = [lengths[b].sum() if collator.flatten else len(b) * lengths[b].max() for b in batches]
        at = int(np.argmax(tokens))
        if tokens[at] > most:
            longest, most = batches[at], tokens[at]
    return [rows[int(row)] for row in longest]
