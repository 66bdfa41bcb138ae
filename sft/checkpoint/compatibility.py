"""What a run must have in common with a checkpoint to resume from it, and the counts that it continues.

The position in the data is derived from the step, so a step must mean the same samples in both runs.
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

_ADAPTER_SHAPE = ("r", "lora_alpha", "target_modules")
# Settings of an adapter that change neither its weights nor the function of the model. Dropout is a setting of training
# as the learning rate is. The base model is compared by itself.
_NOT_COMPARED = (
    "auto_mapping",
    "base_model_name_or_path",
    "inference_mode",
    "lora_dropout",
    "peft_type",
    "peft_version",
    "revision",
    "task_type",
)
# Settings that decide the values of a quantized base. Its compute dtype is chosen for the machine.
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
    """What decides which samples and which weights a step trains.

    Attributes:
        row_lengths: a digest that identifies the data; streamed data is identified by `dataloader_num_workers`,
            `streaming_window` and `streamed_data` instead.
        adapter: from `describe_adapter`.
        adapter_facts: the adapter's other settings, from `adapter_facts`.
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
    """Returns a digest of the samples' lengths, (N,)."""
    return hashlib.blake2b(lengths.astype(np.int64).tobytes(), digest_size=8).hexdigest()


def describe_adapter(model: Any) -> str | None:
    """Describes the settings that decide the shapes of an adapter's weights; None for a model without one."""
    config = getattr(model, "peft_config", {}).get("default")
    if config is None:
        return None
    modules = config.target_modules  # names, one regular expression, or None beside target_parameters
    named = modules if modules is None or isinstance(modules, str) else sorted(modules)
    return f"r={config.r}, lora_alpha={config.lora_alpha}, target_modules={named}"


def adapter_facts(model: Any) -> dict[str, Any] | None:
    """Returns the settings that decide the function of an adapter's weights, by config key; None without an adapter.

    Weights of the same shapes load without an error on another base or with another scaling, but are another model.
    """
    config = getattr(model, "peft_config", {}).get("default")
    if config is None:
        return None
    settings = {n: v for n, v in config.to_dict().items() if n not in (*_ADAPTER_SHAPE, *_NOT_COMPARED)}
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
    folder: Path, shape: ResumeFingerprint, counts: TokenCounts, skipped: int, ranks: Sequence[int], dtype: str | None
) -> None:
    """Writes the fingerprint, the counts since the last log, and the number of skipped steps into a checkpoint.

    Args:
        ranks: those that write their random state into `folder`, so that a missing file is noticed.
        dtype: of the stored weights, which a resumed run with `dtype: auto` keeps.
    """
    facts = {"shape": asdict(shape), "counts": asdict(counts), "skipped": skipped, "ranks": list(ranks), "dtype": dtype}
    (folder / RUN_SHAPE).write_text(json.dumps(facts, indent=2) + "\n")


def dtype_of_checkpoint(checkpoint: Path) -> str | None:
    """Returns the dtype of the weights in the checkpoint's run; None where it is not known.

    Older versions did not write it. Of a run that trained all weights the optimizer shows whether they were bfloat16.
    """
    file = checkpoint / RUN_SHAPE
    if not file.is_file():
        return None
    content = json.loads(file.read_text())
    if content.get("dtype"):
        return str(content["dtype"])
    if content["shape"].get("adapter") is not None:
        return None
    return "bfloat16" if content["shape"].get("master_weights") else "float32"


def load(folder: Path, shape: ResumeFingerprint) -> tuple[TokenCounts, int]:
    """Reads the counts since the last log and the number of skipped steps from a checkpoint.

    Raises:
        UserError: the resumed run would train other samples than the stopped one, or another model.
    """
    file = folder / RUN_SHAPE
    if not file.is_file():
        logger.warning("%s has no %s: it is not known whether its steps mean the same rows", folder, RUN_SHAPE)
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
    """Yields (name, value then, value now) of what differs; a name that one side lacks, as older versions, does not."""
    for name, value in now.items():
        was = saved.get(name, value)
        if name == "adapter_facts":
            yield from _differences(was or {}, value or {})
        elif was != value:
            yield name, was, value


def _master_weights_differ(folder: Path, was: bool) -> Problem:
    """Explains the difference by `dtype`, which decides it: there is no config key of this name."""
    dtype, held = ("bfloat16", "kept") if was else ("float32", "kept no")
    message = f"the optimizer in {folder} {held} float32 values of bfloat16 weights"
    return Problem(message, f"set `dtype: {dtype}`", "dtype")


def _has_moved(base: Any) -> bool:
    """Returns whether the base was a folder that no longer exists, and so has probably been moved."""
    gone = isinstance(base, str) and os.path.isabs(base) and not os.path.isdir(base)
    if gone:
        logger.warning("The base model of the checkpoint is no longer at %s: assumed to be the one given now", base)
    return gone
