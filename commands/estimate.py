"""Tells what a run will take: each rank's memory at its peak, its tokens and steps, and the least time."""

from __future__ import annotations

import json

import model_manager
import pipeline
from commands.options import Options
from sft.config.schema import ModelKeys
from sft.report.console import show_estimate


def run(options: Options) -> int:
    """Prints the estimate."""
    config = options.config
    model_manager.check_model(config.section(ModelKeys), config.lora_config)
    tokenizer = model_manager.load_tokenizer(config.section(ModelKeys))
    estimate = pipeline.estimate_run(config, tokenizer, pipeline.read_data(config, tokenizer))
    if options.json:
        print(json.dumps(estimate.as_json()))
    else:
        show_estimate(estimate.as_json())
    return 0
