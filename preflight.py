"""Checks everything about a run that can be known before it starts: config, model files, tokenizer, every row."""

from __future__ import annotations

from pathlib import Path

import config_manager
import data_handler
import model_manager
import pipeline
from sft.checkpoint.discovery import find_checkpoint
from sft.config.schema import Config, DataKeys, ModelKeys, TrainingKeys
from sft.data.loading.batch_plan import plan_batches
from sft.distributed.gpus import require_gpus, require_tf32
from sft.report import run_files
from sft.report.check_report import Report
from sft.report.console import quiet_libraries
from sft.report.trackers import require_trackers
from sft.training.optim.lr_schedule import require_schedule


def check_run(config: Config, report: Report) -> None:
    """Notes in the report whatever would stop the run of `config`, and what the run would take."""
    training, keys = config.section(TrainingKeys), config.section(DataKeys)
    report.attempt(lambda: config_manager.require_trainable(config))
    report.attempt(lambda: require_trackers(training))
    report.attempt(lambda: require_schedule(training))
    report.attempt(lambda: require_gpus(config.num_gpus or 0))
    report.attempt(lambda: require_tf32(training, on_cpu=config.use_cpu or config.num_gpus == 0))
    report.attempt(lambda: run_files.require_writable(Path(config.output_dir)))
    report.attempt(lambda: pipeline.forbid_overlap(config))
    report.attempt(lambda: find_checkpoint(config.resume_from_checkpoint, Path(config.output_dir)))
    if config.torch_compile:
        from sft.model.compile import compile_settings

        settings = config.torch_compile, config.torch_compile_backend, config.torch_compile_mode
        report.attempt(lambda: compile_settings(*settings))
    report.attempt(lambda: model_manager.check_model(config.section(ModelKeys), config.lora_config))
    tokenizer = report.attempt(lambda: model_manager.load_tokenizer(config.section(ModelKeys)))
    if tokenizer is None:
        return
    data = report.attempt(lambda: pipeline.read_data(config, tokenizer, whole_window=True))
    if data is None:
        return
    report.data = data.ledger
    serving = report.attempt(lambda: data_handler.serving_contract(keys, tokenizer))
    if serving:
        report.serving, report.serving_message = serving.as_json(), serving.message
        report.errors += serving.problems
    report.attempt(lambda: data_handler.require_enough_rows(keys, data.ledger))
    plan = report.attempt(
        lambda: plan_batches(training, data.train_rows, data.train_tokens, pipeline.process_count(config))
    )
    report.estimate = plan.as_json() if plan else None
    if plan and not report.errors:
        quiet_libraries()  # tracing the model imports them
        told = report.attempt(lambda: pipeline.estimate_run(config, tokenizer, data))
        report.estimate = told.as_json() if told else report.estimate
