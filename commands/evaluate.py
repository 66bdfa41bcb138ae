"""Measures a model on the config's validation data."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import distributed_utils as distributed
import model_manager
import pipeline
from commands.options import Options
from sft.config.schema import Config, ModelKeys
from sft.data.preparation.packing import AutoPacking
from sft.errors import Problem, UserError
from sft.model.attention.document_attention import takes_documents
from sft.model.embeddings import resize_embeddings
from sft.model.lora import without_adapter
from sft.model.paths import is_adapter
from sft.report.console import console
from sft.report.step_progress import ConsoleProgress
from sft.training.arguments import training_arguments
from trainer_utils import SFTTrainer

logger = logging.getLogger("sft")


def run(options: Options) -> int:
    """Evaluates and prints the metrics; all ranks run this."""
    config = options.config
    folder = Path(options.model or config.output_dir).expanduser()
    _log_what_is_measured(folder, config, is_named=options.model is not None)
    model, tokenizer = _load_model(folder, config)
    obstacle = None if takes_documents(model.config) else "the model takes padded rows"
    data = pipeline.prepare_data(config, tokenizer, training=False, auto=AutoPacking(obstacle))
    if not data.evals:
        hint = "give validation_file, validation_split or eval_datasets"
        raise UserError(Problem("there is no validation data", hint, "validation_file"))
    pipeline.join_process_group(config)
    arguments = training_arguments(config.training_arguments(), bf16=False, fp16=False, plan=None)
    callbacks = [ConsoleProgress(console, bars=not config.disable_tqdm)]
    trainer = SFTTrainer(model, arguments, tokenizer, None, data.evals, data.end_token_ids, callbacks)
    results = trainer.evaluate_all()
    questions = pipeline.exact_match_questions(config, tokenizer, data)
    results |= pipeline.measure_exact_match(config, model, tokenizer, data, questions)
    if options.json and distributed.is_main_process():
        print(json.dumps(results))
    distributed.destroy_process_group()
    return 0


def _load_model(folder: Path, config: Config) -> tuple[Any, Any]:
    attention, trust = config.attn_implementation, config.trust_remote_code
    model, tokenizer = model_manager.load_trained(
        folder, dtype=config.dtype, trust_remote_code=trust, attn_implementation=attention
    )
    # A base that was never trained here is measured with the prompts that training on it would use.
    model_manager.configure_tokenizer(tokenizer, config.section(ModelKeys))
    resize_embeddings(without_adapter(model), len(tokenizer))
    return model, tokenizer


def _log_what_is_measured(folder: Path, config: Config, *, is_named: bool) -> None:
    logger.info("Measuring %s in %s", "the adapter" if is_adapter(folder) else "the model", folder)
    if not is_named and is_adapter(folder) != (config.lora_config is not None):
        trains = "an adapter" if config.lora_config is not None else "a whole model"
        logger.warning("The config trains %s, and output_dir holds something else: name it by --model", trains)
