"""Makes the Trainer's `TrainingArguments` from the user's keys and our defaults; holds the settings that it lacks."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
import torch.distributed as dist
from transformers import TrainingArguments

from sft.config.best_metric import METRIC_SCHEDULES, greater_is_better
from sft.data.loading.batch_plan import BatchPlan
from sft.loss.token_loss import LossSettings
from sft.model.compile import KEYS as COMPILING
from sft.model.compile import CompileSettings


@dataclass(frozen=True, slots=True)
class StepSettings:
    """Settings of the optimizer steps that `TrainingArguments` does not have.

    Attributes:
        loss: how it is computed.
        dtype: of the weights at rest, noted in checkpoints.
        master_weights: whether the optimizer keeps float32 values of bfloat16 weights.
        on_nonfinite, nonfinite_limit: see `sft.training.nonfinite.NonfiniteGuard`.
        from_scratch: whether the model's weights are randomly initialized on purpose.
        compiling: how the decoder layers are compiled; None for not at all.
        retries_oom: whether a rank that runs out of memory repeats the step in smaller micro-batches; the ranks then
            reduce their gradients after the last backward pass of a step, not during it.
    """

    loss: LossSettings = field(default_factory=LossSettings)
    dtype: str | None = None
    master_weights: bool = False
    on_nonfinite: Literal["stop", "skip"] = "stop"
    nonfinite_limit: int = 10
    from_scratch: bool = False
    compiling: CompileSettings | None = None
    retries_oom: bool = False


def training_arguments(
    given: Mapping[str, Any],
    *,
    bf16: bool,
    fp16: bool,
    plan: BatchPlan | None,
    order_seed: int | None = None,
    pads: bool = False,
    logging_dir: str | None = None,
    wandb_project: str | None = None,
) -> TrainingArguments:
    """Makes the Trainer's arguments; sets TENSORBOARD_LOGGING_DIR and, if given, WANDB_PROJECT in the environment.

    Args:
        given: `Config.training_arguments()`.
        bf16, fp16: the autocast chosen for the machine.
        plan: the run's batch sizes; None if nothing is trained.
        order_seed: of the order of training rows; None means `data_seed` or else `seed`.
        pads: whether samples are padded to the longest of their micro-batch, where similar lengths save computation.
        logging_dir: of the TensorBoard files; None means `logs/tensorboard` in the output folder.
        wandb_project: None means that of the environment.
    """
    arguments = dict(given)
    arguments |= {"bf16": bf16, "fp16": fp16}
    for key in COMPILING:  # the Trainer would compile the whole model; `sft.model.compile` compiles its layers
        arguments.pop(key, None)
    if plan is not None:
        arguments["per_device_train_batch_size"] = plan.per_device_train_batch_size
        arguments["gradient_accumulation_steps"] = plan.gradient_accumulation_steps
        if plan.train_rows is None:  # a stream itself resumes after the trained rows
            arguments["ignore_data_skip"] = True
    if order_seed is not None:
        arguments["data_seed"] = order_seed
    _set_best_metric(arguments)
    if pads:
        arguments.setdefault("train_sampling_strategy", "group_by_length")
    # The loss reaches every trainable parameter, so DDP need not search the graph for unused ones at each step.
    arguments.setdefault("ddp_find_unused_parameters", False)
    if arguments.get("activation_checkpointing"):
        arguments.setdefault("activation_checkpointing_kwargs", {"use_reentrant": False})
    if torch.cuda.is_available():
        arguments["accelerator_config"] = _with_async_copies(arguments)
    else:
        # Without use_cpu accelerate ignores the process group: each rank would train alone, on the same rows.
        arguments["use_cpu"] = True
        arguments.setdefault("dataloader_pin_memory", False)  # there is no device to copy to
    if not dist.is_initialized():
        arguments.pop("ddp_backend", None)  # with one process the Trainer would look for a group that does not exist
    # The Trainer reads these two from the environment only.
    if wandb_project:
        os.environ["WANDB_PROJECT"] = wandb_project
    os.environ["TENSORBOARD_LOGGING_DIR"] = logging_dir or str(Path(arguments["output_dir"]) / "logs" / "tensorboard")
    return TrainingArguments(**arguments)


def _set_best_metric(arguments: dict[str, Any]) -> None:
    """Sets which metric selects the best checkpoint and whether more of it is better, where the user has not.

    The Trainer assumes that higher is better unless the name ends in "loss"; a schedule that watches a metric assumes
    that lower is better, whatever the metric.
    """
    if arguments.get("save_strategy") == "best" and arguments.get("metric_for_best_model") is None:
        arguments["metric_for_best_model"] = "loss"
    metric = arguments.get("metric_for_best_model")
    if metric is None:
        return
    if arguments.get("greater_is_better") is None:
        arguments["greater_is_better"] = greater_is_better(metric)
    if arguments.get("lr_scheduler_type") in METRIC_SCHEDULES:
        settings = arguments.get("lr_scheduler_kwargs") or {}
        settings = json.loads(settings) if isinstance(settings, str) else settings
        mode = "max" if arguments["greater_is_better"] else "min"
        arguments["lr_scheduler_kwargs"] = {"mode": mode, **settings}


def _with_async_copies(arguments: Mapping[str, Any]) -> Any:
    """Returns `accelerator_config` with asynchronous copies of batches to the GPU, unless it says otherwise.

    Else the copy of each tensor makes the host wait for all work queued on the GPU. Torch reuses a pinned block only
    after its copies have ended, so nothing is overwritten.
    """
    given = arguments.get("accelerator_config")
    is_file = given is not None and not isinstance(given, Mapping)
    if is_file or not arguments.get("dataloader_pin_memory", True):
        return given  # copies from memory that is not pinned are synchronous in any case
    return {"non_blocking": True, **(given or {})}
