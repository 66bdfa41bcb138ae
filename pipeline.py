"""Joins the stages: from a config to prepared data, a model in its Trainer, a trained model, or an estimate.

Each function hands the stages the sections of the config that they use.
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
from sft.checkpoint import output_dir
from sft.config.schema import DataKeys, ModelKeys, TrainingKeys
from sft.data.loading.batch_plan import sequences_per_step
from sft.distributed.gpus import visible_gpus
from sft.errors import RankStopped, TrainingStopped, UserError
from sft.report import run_files
from sft.report.console import counting, show_ledger, show_sample

# torch and the Trainer take seconds to import, so functions that need them import them: `check` and a mistake in the
# data do without.
if TYPE_CHECKING:
    from data_handler import PreparedData
    from sft.config.schema import Config
    from sft.data.formats.conversation import Conversation
    from sft.data.preparation.packing import AutoPacking
    from sft.estimate.run_estimate import RunEstimate
    from trainer_utils import SFTTrainer

logger = logging.getLogger("sft")


def prepare_data(config: Config, tokenizer: Any, training: bool = True, **options: Any) -> PreparedData:
    """Prepares the data of all sets; the first rank shows the ledger and the first sample.

    Raises:
        UserError: data is missing, cannot be read, or has too few usable rows.
    """
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
    """Prepares the data of all sets; of a stream, its first rows."""
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
    """What decides `packing: auto`: the model that the config names, and the rows of a step."""
    from sft.data.preparation.packing import AutoPacking

    obstacle = model_manager.obstacle_to_packing(config.section(ModelKeys), tokenizer)
    return AutoPacking(obstacle, sequences_per_step(config.section(TrainingKeys), process_count(config)))


def process_count(config: Config) -> int:
    """Returns how many processes train together, or will."""
    return int(os.environ.get("WORLD_SIZE", "0")) or config.num_gpus or max(1, visible_gpus())


def require_served(config: Config, tokenizer: Any) -> None:
    """Compares the prompts that are trained with those that a server would send; raises `UserError` if they differ."""
    contract = data_handler.serving_contract(config.section(DataKeys), tokenizer)
    if not contract.ok:
        raise UserError(*contract.problems)
    logger.info("Serving: %s", contract.message)


def forbid_overlap(config: Config) -> None:
    """Raises `UserError` for an `output_dir` that holds what the run starts from: the run would overwrite it."""
    keys = ("model_name_or_path", "tokenizer_name_or_path", "from_scratch", "chat_template")
    output_dir.forbid_overlap(Path(config.output_dir), {key: getattr(config, key) for key in keys})


def join_process_group(config: Config) -> None:
    """Joins the process group, after everything that takes each process a different time."""
    backend = distributed.choose_backend(config.ddp_backend, use_cpu=config.use_cpu)
    distributed.init_process_group(backend, config.ddp_timeout)


def build_trainer(config: Config, tokenizer: Any, data: PreparedData, checkpoint: Path | None) -> SFTTrainer:
    """See `trainer_factory.build_trainer`; until here no torch is imported."""
    import trainer_factory

    return trainer_factory.build_trainer(config, tokenizer, data, checkpoint)


def estimate_run(config: Config, tokenizer: Any, data: PreparedData) -> RunEstimate:
    """See `trainer_factory.estimate_run`; until here no torch is imported."""
    import trainer_factory

    return trainer_factory.estimate_run(config, tokenizer, data, process_count(config))


def exact_match_questions(config: Config, tokenizer: Any, data: PreparedData) -> list[Conversation]:
    """Returns the validation conversations for `exact_match_samples`; each ends with its right answer."""
    if not config.exact_match_samples or not data.evals:
        return []
    keys = config.section(DataKeys)
    rows = data_handler.validation_conversations(keys, tokenizer, seed=config.seed, limit=config.exact_match_samples)
    if not rows:
        logger.warning("exact_match_samples: no validation row is a conversation that ends with an answer")
    return rows


def measure_exact_match(
    config: Config, model: Any, tokenizer: Any, data: PreparedData, questions: list[Conversation], when: str = ""
) -> dict[str, float]:
    """Logs and returns the share of `questions` that the model answers exactly; empty without questions."""
    from sft.inference import exact_match

    size, ends = config.per_device_eval_batch_size, data.end_token_ids
    return exact_match.measure_exact_match(model, tokenizer, questions, batch_size=size, end_token_ids=ends, when=when)


def run_training(config: Config, trainer: SFTTrainer, checkpoint: Path | None) -> None:
    """Trains, from `checkpoint` or from the start. A run that fails still leaves its curve.

    Raises:
        TrainingStopped: training went wrong (exit code 3).
    """
    from sft.distributed.oom import allocator_message, is_out_of_memory, out_of_memory
    from sft.report.step_progress import ConsoleProgress

    if checkpoint and trainer.load_finished(checkpoint):
        return
    try:
        trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    except RankStopped:
        trainer.write_curve()
        raise
    except TrainingStopped:
        trainer.log_remaining()
        raise
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        trainer.write_curve()
        searched = config.per_device_train_batch_size == "auto"
        message = f"step {trainer.state.global_step + 1} ran out of memory: {allocator_message(error)}"
        raise out_of_memory(message, 1 if searched else trainer.args.per_device_train_batch_size) from error
    finally:
        for callback in trainer.callback_handler.callbacks:
            if isinstance(callback, ConsoleProgress):
                callback.close()


def streamed_account(config: Config, trainer: SFTTrainer, data: PreparedData) -> PreparedData:
    """Returns the data with the account of all rows that were streamed, which the first rank shows and writes."""
    assert trainer.progress is not None
    ledger, end_token_ids = trainer.progress.final_account()
    if distributed.is_main_process():
        show_ledger(ledger)
        run_files.write_ledger(Path(config.output_dir), ledger)
    return dataclasses.replace(data, ledger=ledger, end_token_ids=end_token_ids)
