"""What a checkpoint must agree on with the run that goes on from it, beside what the Trainer saves.

The position in the data is derived from the step, so the steps of both runs must mean the same rows.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from sft.checkpoint.discovery import RUN_SHAPE
from sft.errors import Problem, UserError
from sft.loss.metrics import TokenCounts
from sft.model.quantization import quantization_settings

logger = logging.getLogger("sft")

FILE = RUN_SHAPE

_ADAPTER_SHAPE = ("r", "lora_alpha", "target_modules")
# Of an adapter's config, what changes neither what its weights mean nor which there are. Dropout is a setting of
# training as the learning rate is. The base is told apart by itself.
_NO_MATTER = (
    "auto_mapping",
    "base_model_name_or_path",
    "inference_mode",
    "lora_dropout",
    "peft_type",
    "peft_version",
    "revision",
    "task_type",
)
# What decides the numbers that a quantized base holds; what it computes in is chosen for the machine.
_BITS = ("load_in_4bit", "load_in_8bit")
_QUANTIZATION = (
    "bnb_4bit_quant_type",
    "bnb_4bit_use_double_quant",
    "llm_int8_threshold",
    "llm_int8_has_fp16_weight",
    "llm_int8_skip_modules",
)


@dataclass(frozen=True)
class ResumeFingerprint:
    """What decides which rows a step trains and which weights.

    `row_lengths` stands for the data, as a digest; for data that is streamed `dataloader_num_workers`,
    `streaming_window` and `streamed_data` stand for them. `adapter_facts` is what `adapter` leaves out.
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
    adapter_facts: dict[str, Any] | None = None


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


def adapter_facts(model: Any) -> dict[str, Any] | None:
    """What decides the function of an adapter's weights, by config key, as JSON has it; None for a model without one.

    Weights of the same shapes on another base, or scaled by another rule, are another model without anything to notice.
    """
    config = getattr(model, "peft_config", {}).get("default")
    if config is None:
        return None
    settings = {n: v for n, v in config.to_dict().items() if n not in (*_ADAPTER_SHAPE, *_NO_MATTER)}
    facts = {f"lora_config.{name}": value for name, value in settings.items()}
    base = model.get_base_model()
    facts["model_name_or_path"] = base.name_or_path
    if commit := getattr(base.config, "_commit_hash", None):  # of a hub model
        facts["model_revision"] = commit
    held = quantization_settings(base.config)
    names = _BITS if held is None else _BITS + _QUANTIZATION
    facts |= {f"quantization_config.{name}": (held or {}).get(name, False) for name in names}
    plain: dict[str, Any] = json.loads(json.dumps(facts, default=lambda v: sorted(v) if isinstance(v, set) else str(v)))
    return plain


def save(
    folder: Path,
    shape: ResumeFingerprint,
    counts: TokenCounts,
    skipped: int,
    ranks: Sequence[int] | None = None,
    dtype: str | None = None,
) -> None:
    """Writes into a checkpoint the shape, the counts since the last log, and the steps left out since the start.

    Args:
        ranks: those that write their random state into `folder`, by which a missing one is found; None for all.
        dtype: of the weights at rest, which a run with `dtype: auto` keeps when it goes on.
    """
    content = {"shape": asdict(shape), "counts": asdict(counts), "skipped": skipped}
    content["ranks"] = list(range(shape.world_size) if ranks is None else ranks)
    content["dtype"] = dtype
    (folder / FILE).write_text(json.dumps(content, indent=2) + "\n")


def dtype_of_checkpoint(checkpoint: Path) -> str | None:
    """The format of the weights of the run that left this checkpoint; None where it does not tell.

    An older version wrote none. Where it trained all weights, its optimizer tells whether they were bfloat16.
    """
    file = checkpoint / FILE
    if not file.is_file():
        return None
    content = json.loads(file.read_text())
    if content.get("dtype"):
        return str(content["dtype"])
    if content["shape"].get("adapter") is not None:
        return None
    return "bfloat16" if content["shape"].get("master_weights") else "float32"


def load(folder: Path, shape: ResumeFingerprint) -> tuple[TokenCounts, int]:
    """The counts since the last log and the steps left out so far, from a checkpoint of a run of the same shape.

    Raises:
        UserError: the run that goes on would train other rows than the one that was stopped, or another function.
    """
    file = folder / FILE
    if not file.is_file():
        logger.warning("%s has no %s: whether its steps mean the same rows is not known", folder, FILE)
        return TokenCounts.zero(), 0
    saved = json.loads(file.read_text())
    differing = [
        _master_weights_differ(folder, was)
        if name == "master_weights"
        else Problem(f"was {was} in {folder}, is {value} now", key=name)
        for name, was, value in _differences(saved["shape"], asdict(shape))
        if not (name == "model_name_or_path" and _has_moved(was))
    ]
    if differing:
        hint = "resume with the same settings; or start from its weights: model_name_or_path, and another output_dir"
        summary = "the checkpoint is of another run"
        raise UserError(Problem(summary, hint, "resume_from_checkpoint"), *differing)
    return TokenCounts(**saved["counts"]), int(saved.get("skipped", 0))


def _differences(saved: Mapping[str, Any], now: Mapping[str, Any]) -> Iterator[tuple[str, Any, Any]]:
    """(name, then, now) of what differs; a fact that one side does not tell, as an older version, is no difference."""
    for name, value in now.items():
        was = saved.get(name, value)
        if name == "adapter_facts":
            yield from _differences(was or {}, value or {})
        elif was != value:
            yield name, was, value


def _master_weights_differ(folder: Path, was: bool) -> Problem:
    """No key has this name: what decides it is `dtype`."""
    dtype, held = ("bfloat16", "kept") if was else ("float32", "kept no")
    return Problem(
        f"the optimizer in {folder} {held} float32 values of bfloat16 weights", f"set `dtype: {dtype}`", "dtype"
    )


def _has_moved(base: Any) -> bool:
    """Whether a base that was a folder is gone from there: then it is moved, as far as can be told by its name."""
    gone = isinstance(base, str) and os.path.isabs(base) and not os.path.isdir(base)
    if gone:
        logger.warning("The base model of the checkpoint is not at %s any more: taken for the one given now", base)
    return gone
