"""What a run takes, told before it starts: the peak of each rank's memory, its passes, tokens, steps, and a least time.

The time is a floor, not a forecast: the operations of all tokens (`sft.training.mfu`) at the speed of one large
product, which is measured on a CPU and read from the data sheet of a GPU that is known. Attention, the loss, the
optimizer, padding, recomputation, evaluation and the start of the process come on top of it.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable
from dataclasses import dataclass
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

_EPOCHS = 20  # whose passes are looked through for the longest one; later ones hardly find a longer


@dataclass(frozen=True, slots=True)
class RunEstimate:
    """What `estimate` tells.

    Attributes:
        memory: of one rank, in bytes.
        plan: rows, passes and steps.
        device: where a rank computes, e.g. `cpu` or `cuda`.
        limit: bytes that a rank may come to hold there now.
        rows, tokens, trained_tokens: of the longest pass that the run will make; of a stream, of one as long as any.
        total_tokens: of the run, padding not counted; None when they are streamed.
        seconds_at_least: of its passes; None where the tokens or the device's speed are not known.
        assumes_batch_size: the rows of a pass stand for `auto`, which real passes decide when the run starts.
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
        """All numbers by name; memory in bytes."""
        return {
            "memory": self.memory.as_json(),
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
    """The estimate for each rank of a run in which every rank holds a whole model.

    The pass is the longest of those that the run will really make, collated as in training, and goes through the
    trainer's own forward.

    Args:
        model: on the meta device, with its adapter.
        rows: the training rows, or a stream of them.
        arguments: of the Trainer.
        loss: how it is computed.
        master_weights: whether the optimizer keeps float32 values of bfloat16 weights.
        max_seq_length: the length that is counted for the rows of a stream.
        assumes_batch_size: `plan` has a number in the place of `per_device_train_batch_size: auto`.
    """
    device = arguments.device
    process = 0 if device.type == "cuda" else held_bytes(device)  # a GPU's memory holds no libraries
    batch = collator(_longest_pass(rows, arguments, plan, collator, max_seq_length))
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    run_forward = _on_fakes(model, batch, mode, arguments, loss)
    trainable = [p for p in model.parameters() if p.requires_grad]
    name = str(getattr(arguments.optim, "value", arguments.optim))
    is_one_pass = plan.gradient_accumulation_steps == plan.world_size == 1 and not assumes_batch_size
    memory = estimate_memory(
        model,
        run_forward,
        mode,
        optimizer_memory(name, trainable, device=device, master_weights=master_weights),
        process=process,
        accumulation_steps=plan.gradient_accumulation_steps,
        world_size=plan.world_size,
        master_weights=master_weights,
        summed=find_summed_weights(model) if is_one_pass and splits_masters(name) else None,
    )
    total_tokens = _total_tokens(plan)
    beneath = without_adapter(model)
    estimate = RunEstimate(
        memory=memory,
        plan=plan,
        device=device.type,
        limit=memory_limit(device, plan.world_size),
        rows=len(batch["lengths"]),
        tokens=int(batch["lengths"].sum()),
        trained_tokens=len(batch["trained_positions"]),
        total_tokens=total_tokens,
        seconds_at_least=_least_seconds(
            flops_per_token(beneath), total_tokens, plan, device, _autocast(arguments) or beneath.dtype
        ),
        assumes_batch_size=assumes_batch_size,
    )
    _log_notes(estimate)
    return estimate


def _on_fakes(
    model: Any,
    batch: dict[str, Any],
    mode: FakeTensorMode,
    arguments: TrainingArguments,
    loss: LossSettings,
) -> Callable[[], torch.Tensor]:
    """The trainer's own forward over the batch, with the model and the batch made of fake tensors; returns the loss."""
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
    """The dtype that matrix products are cast to; None is that of their weights."""
    return torch.bfloat16 if arguments.bf16 else torch.float16 if arguments.fp16 else None


def _log_notes(estimate: RunEstimate) -> None:
    """Logs what the reader of the numbers must know."""
    plan, peak = estimate.plan, estimate.memory.peak
    if estimate.assumes_batch_size:
        logger.info(
            "per_device_train_batch_size: auto is chosen when the run starts; counted here: %d rows a pass, %d a step",
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


def _least_seconds(
    operations: int, total_tokens: int | None, plan: BatchPlan, device: torch.device, dtype: torch.dtype
) -> float | None:
    """Seconds that `operations` for each token take if nothing else takes any.

    On a CPU the clock is that of the process's work: what other programs hold up does not make the bound too high.
    """
    if total_tokens is None:
        return None
    if device.type == "cpu":
        speed: float | None = measure_flops_per_second(dtype, lambda: time.process_time() / torch.get_num_threads())
    else:
        speed = peak_flops(device)
    if speed is None:
        return None
    return operations * total_tokens / (speed * plan.world_size)


def _total_tokens(plan: BatchPlan) -> int | None:
    if plan.tokens_per_epoch is None or plan.steps_per_epoch is None:
        return None
    return round(plan.tokens_per_epoch * plan.total_steps / plan.steps_per_epoch)


def _longest_pass(
    rows: Any, arguments: TrainingArguments, plan: BatchPlan, collator: Collator, max_seq_length: int
) -> list[dict[str, Any]]:
    """The rows of the pass with the most tokens, padding included, in the order that the run's sampler will give."""
    size = plan.per_device_train_batch_size
    if isinstance(rows, TrainingStream):
        tokens = np.zeros(max_seq_length, dtype=np.int64)
        return [{"input_ids": tokens, "labels": tokens} for _ in range(size)]
    lengths = row_lengths(rows)
    seed = arguments.data_seed if arguments.data_seed is not None else arguments.seed
    strategy = str(getattr(arguments.train_sampling_strategy, "value", arguments.train_sampling_strategy))
    sampler = EpochSampler(len(rows), 0, seed, strategy, lengths, plan.global_batch_size)
    longest, most = sampler.order()[:size], 0
    for epoch in range(min(_EPOCHS, math.ceil(plan.total_steps / (plan.steps_per_epoch or 1)))):
        sampler.set_epoch(epoch)
        passes = np.array_split(sampler.order(), range(size, len(rows), size))
        sizes = [lengths[p].sum() if collator.flatten else len(p) * lengths[p].max() for p in passes]
        at = int(np.argmax(sizes))
        if sizes[at] > most:
            longest, most = passes[at], sizes[at]
    return [rows[int(row)] for row in longest]
