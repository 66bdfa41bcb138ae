"""From a config to prepared data, a model in its trainer, an estimate: what several verbs of `sft_main` share.

Each function hands the stages the sections of the config that they use, in the order in which they need each other.
"""

from __future__ import annotations

import dataclasses
import logging
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import data_handler
import distributed_utils as distributed
import model_manager
from sft.config.schema import DataKeys, ModelKeys, TrainingKeys
from sft.data.loading.batch_plan import BatchPlan, plan_batches, sequences_per_step
from sft.distributed.gpus import visible_gpus
from sft.errors import UserError
from sft.report import run_files
from sft.report.console import console, counting, show_ledger, show_sample

# torch and the Trainer take seconds to import: what needs them imports them where they are used, so that `check` and a
# mistake in the data do without.
if TYPE_CHECKING:
    from transformers import TrainingArguments

    from data_handler import PreparedData
    from sft.config.schema import Config
    from sft.data.formats.conversation import Conversation
    from sft.data.preparation.packing import AutoPacking
    from sft.estimate.run import RunEstimate
    from sft.loss.token_loss import Objective
    from sft.model.precision import Precision
    from trainer_utils import SFTTrainer

logger = logging.getLogger("sft")


def prepare(config: Config, tokenizer: Any, training: bool = True, **options: Any) -> PreparedData:
    """The prepared data; the first rank shows its ledger and its first sample."""
    keys = config.section(DataKeys)
    with counting("rows prepared:") as on_rows:
        data = read_data(config, tokenizer, training=training, on_rows=on_rows, **options)
    if distributed.is_main_process():
        show_ledger(data.ledger)
        if data.sample:
            show_sample(data.sample, tokenizer)
    if data.packing:
        logger.info("Packing: %s", data.packing)
    if training:
        data_handler.require_enough_rows(keys, data.ledger)
        if str(config.eval_strategy) != "no" and not data.evals:
            hint = "give validation_file, validation_split or eval_datasets, or remove eval_strategy"
            raise UserError(config.problem("eval_strategy", "there is no validation data", hint))
    return data


def read_data(config: Config, tokenizer: Any, training: bool = True, **options: Any) -> PreparedData:
    """The data of all sets; where training rows are streamed, what is known of their beginning."""
    keys = config.section(DataKeys)
    if "auto" in (keys.packing, keys.eval_packing):
        options.setdefault("auto", _auto_packing(config, tokenizer))
    if not (training and keys.streaming):
        options.pop("whole_window", None)
        return data_handler.prepare_data(keys, tokenizer, seed=config.seed, training=training, **options)
    return data_handler.stream_data(
        keys,
        tokenizer,
        seed=config.seed,
        order_seed=config.order_seed,
        rank=distributed.rank(),
        world_size=distributed.world_size(),
        workers=max(1, config.dataloader_num_workers),
        shuffle=config.train_sampling_strategy == "random",
        **options,
    )


def _auto_packing(config: Config, tokenizer: Any) -> AutoPacking:
    """What `packing: auto` goes by: the model that the config names, and the rows of a step."""
    from sft.data.preparation.packing import AutoPacking

    obstacle = model_manager.obstacle_to_packing(config.section(ModelKeys), tokenizer)
    return AutoPacking(obstacle, sequences_per_step(config.section(TrainingKeys), processes(config)))


def processes(config: Config) -> int:
    """How many train together, or will."""
    return int(os.environ.get("WORLD_SIZE", "0")) or config.num_gpus or max(1, visible_gpus())


def require_served(config: Config, tokenizer: Any) -> None:
    """Stops the run where the model would be asked behind other tokens than it was trained behind."""
    contract = data_handler.serving_contract(config.section(DataKeys), tokenizer)
    if not contract.ok:
        raise UserError(*contract.problems)
    logger.info("Serving: %s", contract.message)


def streamed_account(config: Config, trainer: SFTTrainer, data: PreparedData) -> PreparedData:
    """The data with the account of all rows that were streamed, which the first rank shows and saves."""
    ledger, end_token_ids = trainer.stream_account()
    if distributed.is_main_process():
        show_ledger(ledger)
        run_files.write_ledger(Path(config.output_dir), ledger)
    return dataclasses.replace(data, ledger=ledger, end_token_ids=end_token_ids)


def join(config: Config) -> None:
    """Joins the process group, once everything is done that takes each process a different time."""
    backend = distributed.choose_backend(config.ddp_backend, use_cpu=config.use_cpu)
    distributed.init_process_group(backend, config.ddp_timeout)


def build_trainer(config: Config, tokenizer: Any, data: PreparedData, checkpoint: Path | None) -> SFTTrainer:
    """The model as the config describes it, and the Trainer that holds it."""
    import trainer_utils
    from sft.checkpoint.stream_state import StreamProgress
    from sft.model.compile import compile_settings
    from sft.report.metrics_file import MetricsFile
    from sft.report.progress import ConsoleProgress
    from sft.training.optim.factory import require_optimizer

    keys = config.section(TrainingKeys)
    plan = plan_batches(keys, data.train_rows, data.train_tokens, distributed.world_size())
    compiling = compile_settings(config.torch_compile, config.torch_compile_backend, config.torch_compile_mode)
    precision = _precision(config, checkpoint)
    trainer_utils.set_seed(config.seed)
    model = _model(config, tokenizer, precision)
    searches = keys.per_device_train_batch_size == "auto"
    if searches:
        keys = _choose_batch_size(config, model, tokenizer, data, precision, checkpoint)
        plan = plan_batches(keys, data.train_rows, data.train_tokens, distributed.world_size())
    logger.info("Batches: %s", plan)
    arguments = _arguments(config, keys, plan, precision, model, data)
    require_optimizer(arguments)
    callbacks = [
        MetricsFile(Path(config.output_dir) / "logs"),
        ConsoleProgress(console, bars=not config.disable_tqdm),
    ]
    settings = trainer_utils.StepSettings(
        objective=_objective(config, model),
        loss_chunk_size=config.loss_chunk_size,
        dtype=precision.dtype,
        master_weights=precision.master_weights,
        on_nonfinite=config.on_nonfinite,
        nonfinite_limit=config.nonfinite_limit,
        from_scratch=config.from_scratch is not None,
        compiling=compiling,
        shrinks=searches,
    )
    return trainer_utils.SFTTrainer(
        model,
        arguments,
        tokenizer,
        data.train,
        data.evals,
        data.end_token_ids,
        callbacks,
        total_steps=plan.total_steps,
        progress=StreamProgress(data.train, data.end_token_ids, data.eval_ledgers) if config.streaming else None,
        settings=settings,
    )


def _choose_batch_size(
    config: Config, model: Any, tokenizer: Any, data: PreparedData, precision: Precision, checkpoint: Path | None
) -> TrainingKeys:
    """The keys with the rows of a pass that `auto` stands for: those of the checkpoint, or what real passes say."""
    from sft.data.loading.collator import Collator
    from sft.estimate.batch_size_probe import probe_batch_size, rows_of_checkpoint, with_rows
    from sft.model.attention.document_attention import takes_documents

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
        _objective(config, model),
        precision,
        loss_chunk_size=config.loss_chunk_size,
        world_size=distributed.world_size(),
        local_world_size=distributed.local_world_size(),
    )
    return with_rows(keys, rows)


def _precision(config: Config, checkpoint: Path | None = None) -> Precision:
    from sft.checkpoint.compatibility import dtype_of_checkpoint

    return model_manager.plan_precision(
        config.section(ModelKeys),
        config.lora_config,
        config.quantization_config,
        bf16=config.bf16 if config.is_set("bf16") else None,
        fp16=config.fp16 if config.is_set("fp16") else None,
        kept=dtype_of_checkpoint(checkpoint) if checkpoint else None,
    )


def _model(config: Config, tokenizer: Any, precision: Precision, *, outline: bool = False) -> Any:
    """The model as the config describes it; as an outline it has no numbers and takes no memory."""
    return model_manager.load_model(
        config.section(ModelKeys),
        tokenizer,
        precision=precision,
        lora=config.lora_config,
        quantization=config.quantization_config,
        gradient_checkpointing=bool(config.gradient_checkpointing or config.activation_checkpointing),
        activation_checkpoint=config.activation_checkpoint,
        outline=outline,
    )


def _objective(config: Config, model: Any) -> Objective:
    from sft.loss.token_loss import Objective

    return Objective(
        loss_type=config.loss_type,
        label_smoothing=config.label_smoothing_factor,
        z_loss=config.z_loss_coef,
        router_aux=model_manager.router_aux_loss_coef(model, config.router_aux_loss_coef),
        entropy=config.log_entropy,
    )


def _arguments(
    config: Config, keys: TrainingKeys, plan: BatchPlan, precision: Precision, model: Any, data: PreparedData
) -> TrainingArguments:
    """The Trainer's arguments, of `keys` whose batch size may have been chosen since the config was read."""
    import trainer_utils
    from sft.model.attention.document_attention import takes_documents

    return trainer_utils.training_arguments(
        keys.training_arguments(),
        bf16=precision.bf16,
        fp16=precision.fp16,
        plan=plan,
        order_seed=config.order_seed,
        pads=not (takes_documents(model.config) or data.is_packed),
        logging_dir=config.logging_dir,
        wandb_project=config.wandb_project,
    )


def estimate_run(config: Config, tokenizer: Any, data: PreparedData) -> RunEstimate:
    """What the run takes, from an outline of its model and its longest real pass."""
    from sft.data.loading.collator import Collator
    from sft.estimate.run import estimate_run
    from sft.model.attention.document_attention import takes_documents

    keys = config.section(TrainingKeys)
    plan = plan_batches(keys, data.train_rows, data.train_tokens, processes(config))
    precision = _precision(config)
    model = _model(config, tokenizer, precision, outline=True)
    arguments = _arguments(config, keys, plan, precision, model, data)
    return estimate_run(
        model,
        data.train,
        arguments,
        plan,
        Collator(tokenizer.pad_token_id, flatten=takes_documents(model.config)),
        _objective(config, model),
        loss_chunk_size=config.loss_chunk_size,
        master_weights=precision.master_weights,
        max_seq_length=config.max_seq_length,
        assumes_batch_size=keys.per_device_train_batch_size == "auto",
    )


def questions(config: Config, tokenizer: Any, data: PreparedData) -> list[Conversation]:
    """The validation rows that `exact_match_samples` asks for; each ends with its right answer."""
    if not config.exact_match_samples or not data.evals:
        return []
    rows = data_handler.validation_conversations(
        config.section(DataKeys), tokenizer, seed=config.seed, limit=config.exact_match_samples
    )
    if not rows:
        logger.warning("exact_match_samples: no validation row is a conversation that ends with an answer")
    return rows


def measure_exact_match(
    config: Config, model: Any, tokenizer: Any, data: PreparedData, rows: list[Conversation], when: str
) -> dict[str, float]:
    """The share of `rows` that the model answers exactly, said aloud; nothing when there is none to ask."""
    import torch

    from sft.distributed.collectives import sum_over_ranks
    from sft.inference.exact_match import exact_match
    from sft.model.saving import stop_tokens

    if not rows:
        return {}
    mine = rows[distributed.rank() :: distributed.world_size()]
    with counting("questions answered:") as on_progress:
        result = exact_match(
            model,
            tokenizer,
            mine,
            batch_size=config.per_device_eval_batch_size,
            stop_token_ids=stop_tokens(tokenizer, data.end_token_ids),
            on_progress=on_progress,
        )
    for example in result.examples[:3]:
        logger.info("  %s", example)
    total = int(sum_over_ranks(torch.tensor(result.right)))
    words = f"Exact match{when.replace('_', ' ')}"
    logger.info("%s: %d of %d (%.1f %%)", words, total, len(rows), 100 * total / len(rows))
    return {f"exact_match{when}": total / len(rows)}
