"""Builds the Trainer of a run and its estimate: the model, precision, loss and arguments that a config describes."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

from transformers import TrainingArguments, set_seed

import distributed_utils as distributed
import model_manager
from data_handler import PreparedData
from sft.checkpoint.compatibility import dtype_of_checkpoint
from sft.checkpoint.stream_state import StreamProgress
from sft.config.schema import Config, ModelKeys, TrainingKeys
from sft.data.loading.batch_plan import BatchPlan, plan_batches
from sft.data.loading.collator import Collator
from sft.estimate import run_estimate
from sft.estimate.batch_size_probe import probe_batch_size, rows_of_checkpoint, with_rows
from sft.loss.token_loss import LossSettings, Objective
from sft.model.attention.document_attention import takes_documents
from sft.model.compile import CompileSettings, compile_settings
from sft.model.precision import Precision
from sft.report.console import console
from sft.report.metrics_file import MetricsFile
from sft.report.step_progress import ConsoleProgress
from sft.training.arguments import StepSettings, training_arguments
from sft.training.optim.factory import require_optimizer
from trainer_utils import SFTTrainer

logger = logging.getLogger("sft")


def build_trainer(config: Config, tokenizer: Any, data: PreparedData, checkpoint: Path | None) -> SFTTrainer:
    """Builds the model that the config describes and the Trainer that holds it.

    Args:
        checkpoint: the one that the run resumes from; None starts at step 0.

    Raises:
        UserError: a setting does not fit the model, the machine, the data or the checkpoint.
    """
    keys = config.section(TrainingKeys)
    plan = plan_batches(keys, data.train_rows, data.train_tokens, distributed.world_size())
    compiling = compile_settings(config.torch_compile, config.torch_compile_backend, config.torch_compile_mode)
    precision = _precision(config, checkpoint)
    set_seed(config.seed)
    model = _model(config, tokenizer, precision)
    if keys.per_device_train_batch_size == "auto":
        keys = _choose_batch_size(config, model, tokenizer, data, precision, checkpoint)
        plan = plan_batches(keys, data.train_rows, data.train_tokens, distributed.world_size())
    logger.info("Batches: %s", plan)
    arguments = _arguments(config, keys, plan, precision, model, data)
    require_optimizer(arguments)
    logs = Path(config.output_dir) / "logs"
    trainer = SFTTrainer(
        model,
        arguments,
        tokenizer,
        data.train,
        data.evals,
        data.end_token_ids,
        [MetricsFile(logs), ConsoleProgress(console, bars=not config.disable_tqdm)],
        total_steps=plan.total_steps,
        progress=StreamProgress(data.train, data.end_token_ids, data.eval_ledgers) if config.streaming else None,
        settings=_step_settings(config, model, precision, compiling),
    )
    if checkpoint:
        trainer.resume(checkpoint)
    return trainer


def _step_settings(config: Config, model: Any, precision: Precision, compiling: CompileSettings | None) -> StepSettings:
    return StepSettings(
        loss=_loss_settings(config, model),
        dtype=precision.dtype,
        master_weights=precision.master_weights,
        on_nonfinite=config.on_nonfinite,
        nonfinite_limit=config.nonfinite_limit,
        from_scratch=config.from_scratch is not None,
        compiling=compiling,
        retries_oom=config.per_device_train_batch_size == "auto",
    )


def _choose_batch_size(
    config: Config, model: Any, tokenizer: Any, data: PreparedData, precision: Precision, checkpoint: Path | None
) -> TrainingKeys:
    """Replaces `per_device_train_batch_size: auto` by that of the checkpoint, or by what real micro-batches show."""
    keys = config.section(TrainingKeys)
    kept = rows_of_checkpoint(checkpoint) if checkpoint else None
    if kept is not None:
        logger.info("per_device_train_batch_size: auto is %d, as in %s", kept, checkpoint)
        return with_rows(keys, kept)
    rows = probe_batch_size(
        model,
        data.train,
        keys,
        Collator(tokenizer.pad_token_id, flatten=takes_documents(model.config)),
        _loss_settings(config, model),
        precision,
        world_size=distributed.world_size(),
        local_world_size=distributed.local_world_size(),
    )
    return with_rows(keys, rows)


def _precision(config: Config, checkpoint: Path | None = None) -> Precision:
    return model_manager.plan_precision(
        config.section(ModelKeys),
        config.lora_config,
        config.quantization_config,
        bf16=config.bf16 if config.is_set("bf16") else None,
        fp16=config.fp16 if config.is_set("fp16") else None,
        kept=dtype_of_checkpoint(checkpoint) if checkpoint else None,
    )


def _model(config: Config, tokenizer: Any, precision: Precision, *, meta: bool = False) -> Any:
    """Loads the model that the config describes; a meta model has no weights and takes no memory."""
    return model_manager.load_model(
        config.section(ModelKeys),
        tokenizer,
        precision=precision,
        lora=config.lora_config,
        quantization=config.quantization_config,
        gradient_checkpointing=bool(config.gradient_checkpointing or config.activation_checkpointing),
        activation_checkpoint=config.activation_checkpoint,
        meta=meta,
    )


def _loss_settings(config: Config, model: Any) -> LossSettings:
    objective = Objective(
        loss_type=config.loss_type,
        label_smoothing=config.label_smoothing_factor,
        z_loss=config.z_loss_coef,
        router_aux=model_manager.router_aux_loss_coef(model, config.router_aux_loss_coef),
        entropy=config.log_entropy,
    )
    return LossSettings(objective, config.loss_chunk_size)


def _arguments(
    config: Config, keys: TrainingKeys, plan: BatchPlan, precision: Precision, model: Any, data: PreparedData
) -> TrainingArguments:
    """The Trainer's arguments from `keys`, whose batch size may have been chosen since the config was read."""
    return training_arguments(
        keys.training_arguments(),
        bf16=precision.bf16,
        fp16=precision.fp16,
        plan=plan,
        order_seed=config.order_seed,
        pads=not (takes_documents(model.config) or data.is_packed),
        logging_dir=config.logging_dir,
        wandb_project=config.wandb_project,
    )


def estimate_run(config: Config, tokenizer: Any, data: PreparedData, processes: int) -> run_estimate.RunEstimate:
    """Estimates memory, tokens and time of the run, from a meta model and the longest micro-batch of the data."""
    keys = config.section(TrainingKeys)
    plan = plan_batches(keys, data.train_rows, data.train_tokens, processes)
    precision = _precision(config)
    model = _model(config, tokenizer, precision, meta=True)
    arguments = _arguments(config, keys, plan, precision, model, data)
    return run_estimate.estimate_run(
        model,
        data.train,
        arguments,
        plan,
        Collator(tokenizer.pad_token_id, flatten=takes_documents(model.config)),
        _loss_settings(config, model),
        master_weights=precision.master_weights,
        max_seq_length=config.max_seq_length,
        assumes_batch_size=keys.per_device_train_batch_size == "auto",
    )
