"""Shows the first rows as the model will see them, with the tokens that are trained."""

from __future__ import annotations

import json

import data_handler
import model_manager
from commands.options import Options
from sft.config.schema import DataKeys, ModelKeys
from sft.report.console import show_packed, show_sample


def run(options: Options) -> int:
    """Prints the first samples."""
    config = options.config
    keys = config.section(DataKeys)
    tokenizer = model_manager.load_tokenizer(config.section(ModelKeys))
    samples = data_handler.preview(keys, tokenizer, options.num_samples, seed=config.seed)
    if options.json:
        print(json.dumps({"samples": list(samples)}, ensure_ascii=False))
        return 0
    shown = []
    for sample in samples:
        show_sample(sample, tokenizer)
        shown.append(sample)
    if keys.packing in ("bfd", "wrapped"):
        show_packed(shown, str(keys.packing), keys.max_seq_length)
    return 0
