"""A run from its trainer to the card of its model."""

from __future__ import annotations

import json
import logging
import time
from pathlib import Path
from typing import Any

import distributed_utils as distributed
import stages
from data_handler import PreparedData
from model_manager import save_final_model
from sft.config.schema import Config
from sft.data.preparation.serving_check import check_end_tokens
from sft.report import run_files
from sft.report.console import show_conclusion
from trainer_utils import SFTTrainer

logger = logging.getLogger("sft")


def carry_out(
    config: Config, trainer: SFTTrainer, tokenizer: Any, data: PreparedData, checkpoint: Path | None, started: float
) -> None:
    """Trains, evaluates, and leaves in the run's folder the model, its metrics and its card; all ranks call it.

    Args:
        checkpoint: that the run goes on from; None starts at step 0.
        started: when the command did, by `time.perf_counter`.

    Raises:
        TrainingStopped: training went wrong: exit code 3.
    """
    questions = stages.questions(config, tokenizer, data)
    results = stages.measure_exact_match(config, trainer.model, tokenizer, data, questions, "_before")
    trainer.fit(checkpoint)
    if config.streaming:
        data = stages.streamed_account(config, trainer, data)
    if distributed.is_main_process():  # before anything else can fail
        _save_model(trainer, tokenizer, data, Path(config.output_dir))
    results |= trainer.evaluate_all()
    results |= stages.measure_exact_match(config, trainer.model, tokenizer, data, questions, "_after")
    if distributed.is_main_process():
        _conclude(config, trainer, tokenizer, data, results, time.perf_counter() - started)


def _save_model(trainer: SFTTrainer, tokenizer: Any, data: PreparedData, output_dir: Path) -> None:
    """The final model at the top of the output folder."""
    model: Any = trainer.model
    save_final_model(model, tokenizer, output_dir, data.end_token_ids)
    stops = json.loads((output_dir / "generation_config.json").read_text()).get("eos_token_id")
    for problem in check_end_tokens(tokenizer, data.end_token_ids, stops):
        logger.warning("%s", problem)


def _conclude(
    config: Config, trainer: SFTTrainer, tokenizer: Any, data: PreparedData, results: dict[str, Any], seconds: float
) -> None:
    """The results of the run, and the model's card."""
    output_dir = Path(config.output_dir)
    trainer.state.save_to_json(str(output_dir / "trainer_state.json"))
    run_files.write_results(output_dir, results)
    stop_tokens = [str(tokenizer.decode([token])) for token in data.end_token_ids]
    made = {
        name: getattr(trainer.args, name) for name in ("per_device_train_batch_size", "gradient_accumulation_steps")
    }
    run_files.write_card(output_dir, config.model_copy(update=made), data.ledger, results, stop_tokens)
    last = {"train_loss": next((e["loss"] for e in reversed(trainer.state.log_history) if "loss" in e), None)}
    show_conclusion(output_dir, last | results, seconds)
