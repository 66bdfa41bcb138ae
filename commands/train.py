"""Trains, evaluates, and saves the model with its logs and its card."""

from __future__ import annotations

import json
import logging
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import config_manager
import distributed_utils as distributed
import model_manager
import pipeline
from commands.options import Options
from sft.checkpoint.discovery import describe_resume, find_checkpoint
from sft.checkpoint.output_dir import archive_previous_run
from sft.config.schema import Config, ModelKeys, TrainingKeys
from sft.data.preparation.serving_check import check_end_tokens
from sft.model.tokenizer import remember_system_prompt
from sft.report import run_files
from sft.report.console import show_conclusion
from sft.training.optim.lr_schedule import require_schedule

if TYPE_CHECKING:
    from data_handler import PreparedData
    from trainer_utils import SFTTrainer

logger = logging.getLogger("sft")


def run(options: Options) -> int:
    """Trains as the config says; all ranks run this."""
    started = time.perf_counter()
    config = options.config
    output_dir = Path(config.output_dir)
    require_schedule(config.section(TrainingKeys))
    pipeline.forbid_overlap(config)
    if distributed.is_main_process():
        run_files.lock_output_dir(output_dir)
    checkpoint = find_checkpoint(config.resume_from_checkpoint, output_dir)
    if checkpoint:
        logger.info("Resuming from %s", checkpoint)

    model_manager.check_model(config.section(ModelKeys), config.lora_config)
    tokenizer = model_manager.load_tokenizer(config.section(ModelKeys))
    data = pipeline.prepare_data(config, tokenizer)
    pipeline.require_served(config, tokenizer)
    remember_system_prompt(tokenizer, config.system_prompt)

    pipeline.join_process_group(config)
    distributed.require_agreement({"checkpoint": str(checkpoint), **data.identity()})
    trainer = pipeline.build_trainer(config, tokenizer, data, checkpoint)
    if distributed.is_main_process():  # nothing of an earlier run was touched until here
        archive_previous_run(output_dir, checkpoint)
        config_manager.write_config(config, output_dir / "config.yaml")
        run_files.write_ledger(output_dir, data.ledger)
    try:
        _train_and_evaluate(config, trainer, tokenizer, data, checkpoint, started)
    except KeyboardInterrupt as stop:
        stop.add_note(describe_resume(output_dir))
        raise
    distributed.destroy_process_group()
    return 0


def _train_and_evaluate(
    config: Config, trainer: SFTTrainer, tokenizer: Any, data: PreparedData, checkpoint: Path | None, started: float
) -> None:
    questions = pipeline.exact_match_questions(config, tokenizer, data)
    results = pipeline.measure_exact_match(config, trainer.model, tokenizer, data, questions, "_before")
    pipeline.run_training(config, trainer, checkpoint)
    if config.streaming:
        data = pipeline.streamed_account(config, trainer, data)
    if distributed.is_main_process():  # before anything else can fail
        _save_model(trainer, tokenizer, data, Path(config.output_dir))
    results |= trainer.evaluate_all()
    results |= pipeline.measure_exact_match(config, trainer.model, tokenizer, data, questions, "_after")
    if distributed.is_main_process():
        _write_results(config, trainer, tokenizer, data, results)
        loss = next((entry["loss"] for entry in reversed(trainer.state.log_history) if "loss" in entry), None)
        show_conclusion(Path(config.output_dir), {"train_loss": loss} | results, time.perf_counter() - started)


def _save_model(trainer: SFTTrainer, tokenizer: Any, data: PreparedData, output_dir: Path) -> None:
    """Saves the final model at the top of the output folder."""
    model: Any = trainer.model
    model_manager.save_final_model(model, tokenizer, output_dir, data.end_token_ids)
    stops = json.loads((output_dir / "generation_config.json").read_text()).get("eos_token_id")
    for problem in check_end_tokens(tokenizer, data.end_token_ids, stops):
        logger.warning("%s", problem)


def _write_results(
    config: Config, trainer: SFTTrainer, tokenizer: Any, data: PreparedData, results: dict[str, Any]
) -> None:
    """Writes the curve, the results and the model card."""
    output_dir = Path(config.output_dir)
    trainer.state.save_to_json(str(output_dir / "trainer_state.json"))
    run_files.write_results(output_dir, results)
    stop_tokens = [str(tokenizer.decode([token])) for token in data.end_token_ids]
    batch_keys = ("per_device_train_batch_size", "gradient_accumulation_steps")
    chosen = {name: getattr(trainer.args, name) for name in batch_keys}
    run_files.write_card(output_dir, config.model_copy(update=chosen), data.ledger, results, stop_tokens)
