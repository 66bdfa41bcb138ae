"""What upstream's `TrainingArguments` are given: the user's keys, completed by what this pipeline knows better."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from transformers import TrainingArguments

from sft.config.best_metric import METRIC_SCHEDULES, greater_is_better
from sft.data.loading.batch_plan import BatchPlan
from sft.model.compile import KEYS as COMPILING


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
    """The Trainer's arguments.

    Args:
        given: `Config.training_arguments()`.
        bf16, fp16: the autocast that was chosen for the machine.
        plan: the run's arithmetic; None where nothing is trained.
        order_seed: of the order of training rows; None leaves it to `data_seed` and `seed`.
        pads: whether rows are padded to the longest of their pass, so that passes of like lengths compute less.
        logging_dir: of the TensorBoard files; None is `logs/tensorboard` in the output folder.
        wandb_project: None leaves it to the environment.
    """
    arguments = dict(given)
    arguments |= {"bf16": bf16, "fp16": fp16}
    for key in COMPILING:  # upstream would compile the whole model; here `sft.model.compile` compiles its layers
        arguments.pop(key, None)
    if plan is not None:
        arguments["per_device_train_batch_size"] = plan.per_device_train_batch_size
        arguments["gradient_accumulation_steps"] = plan.gradient_accumulation_steps
        if plan.train_rows is None:  # a stream begins behind the rows that were trained
            arguments["ignore_data_skip"] = True
    if order_seed is not None:
        arguments["data_seed"] = order_seed
    _choose_the_best(arguments)
    if pads:
        arguments.setdefault("train_sampling_strategy", "group_by_length")
    # The loss reaches every trainable parameter, so DDP need not search the graph for those it missed on each step.
    arguments.setdefault("ddp_find_unused_parameters", False)
    if arguments.get("activation_checkpointing"):
        arguments.setdefault("activation_checkpointing_kwargs", {"use_reentrant": False})
    if torch.cuda.is_available():
        arguments["accelerator_config"] = _without_waiting(arguments)
    else:
        # Without use_cpu accelerate does not look for a process group: each rank would train alone on the same rows.
        arguments["use_cpu"] = True
        arguments.setdefault("dataloader_pin_memory", False)  # there is no device to copy to
    if not dist.is_initialized():
        arguments.pop("ddp_backend", None)  # for one process upstream would look for a group that nobody made
    # Upstream takes these two from the environment alone.
    if wandb_project:
        os.environ["WANDB_PROJECT"] = wandb_project
    os.environ["TENSORBOARD_LOGGING_DIR"] = logging_dir or str(Path(arguments["output_dir"]) / "logs" / "tensorboard")
    return TrainingArguments(**arguments)


def _choose_the_best(arguments: dict[str, Any]) -> None:
    """Says which metric is watched and which way of it is better, where the user has not.

    Upstream takes the higher value of every metric for the better one whose name does not end in "loss", and a schedule
    that watches a metric takes the lower one whatever the metric is.
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


def _without_waiting(arguments: Mapping[str, Any]) -> Any:
    """`accelerator_config` as given, and batches that are copied to the GPU behind the passes that it still computes.

    Otherwise each tensor of each batch waits until all passes queued before it are done. Torch keeps a page-locked
    block from being used again until its copies have ended, so nothing is overwritten.
    """
    given = arguments.get("accelerator_config")
    is_file = given is not None and not isinstance(given, Mapping)
    if is_file or not arguments.get("dataloader_pin_memory", True):
        return given  # memory that is not page-locked is copied in turn, whatever is asked for
    return {"non_blocking": True, **(given or {})}
