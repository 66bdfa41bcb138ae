"""What a checkpoint must agree on with the run that goes on from it, beside what the Trainer saves.

The position in the data is derived from the step, so the steps of both runs must mean the same rows.
"""

from __future__ import annotations

import hashlib
import json
import logging
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from sft.errors import Problem, UserError
from sft.metrics import TokenCounts
from sft.resume import RUN_SHAPE

logger = logging.getLogger("sft")

FILE = RUN_SHAPE


@dataclass(frozen=True)
class RunShape:
    """What decides which rows a step trains and which weights.

    `row_lengths` stands for the data, as a digest; for data that is streamed the last three stand for them.
    """

    world_size: int
    per_device_train_batch_size: int
    gradient_accumulation_steps: int
    train_rows: int
    row_lengths: str
    seed: int
    adapter: str | None
    train_sampling_strategy: str
    master_weights: bool = False
    dataloader_num_workers: int | None = None
    streaming_window: int | None = None
    streamed_data: str | None = None


def digest_lengths(lengths: np.ndarray) -> str:
    """A few characters that differ when the rows' lengths (N,) do."""
    return hashlib.blake2b(lengths.astype(np.int64).tobytes(), digest_size=8).hexdigest()


def describe_adapter(model: Any) -> str | None:
    """What decides the shapes of an adapter's weights; None for a model without one."""
    config = getattr(model, "peft_config", {}).get("default")
    if config is None:
        return None
    modules = config.target_modules  # names, one regular expression, or None beside target_parameters
    named = modules if modules is None or isinstance(modules, str) else sorted(modules)
    return f"r={config.r}, lora_alpha={config.lora_alpha}, target_modules={named}"


def save(folder: Path, shape: RunShape, counts: TokenCounts, skipped: int) -> None:
    """Writes into a checkpoint the shape, the counts since the last log, and the steps left out since the start."""
    content = {"shape": asdict(shape), "counts": asdict(counts), "skipped": skipped}
    (folder / FILE).write_text(json.dumps(content, indent=2) + "\n")


def load(folder: Path, shape: RunShape) -> tuple[TokenCounts, int]:
    """The counts since the last log and the steps left out so far, from a checkpoint of a run of the same shape.

    Raises:
        UserError: the run that goes on would train other rows than the one that was stopped.
    """
    file = folder / FILE
    if not file.is_file():
        logger.warning("%s has no %s: whether its steps mean the same rows is not known", folder, FILE)
        return TokenCounts.zero(), 0
    saved = json.loads(file.read_text())
    differing = [
        Problem(f"was {saved['shape'].get(name)} in {folder}, is {value} now", key=name)
        for name, value in asdict(shape).items()
        if saved["shape"].get(name) != value
    ]
    if differing:
        hint = "resume with the same settings; or start from its weights: model_name_or_path, and another output_dir"
        summary = "the checkpoint is of another run"
        raise UserError(Problem(summary, hint, "resume_from_checkpoint"), *differing)
    return TokenCounts(**saved["counts"]), int(saved.get("skipped", 0))
