"""What a training run needs beyond a valid config; evaluating, previewing and merging do not."""

from __future__ import annotations

from collections.abc import Iterator

from sft.config.schema import Config
from sft.config.validation import TRAIN_SOURCES, is_given
from sft.errors import Problem

_NOT_SHARDED = ("models are not sharded yet", "Remove it: processes train whole copies (DDP).")
_EVALUATES_ALIKE = ("evaluation computes as training does", "Remove it, or set `dtype`.")
_HAS_A_HEAD = (
    "the head of the model is fused to the loss here already, and Liger's kernels would be put in its place",
    "Remove it; loss_chunk_size says how many tokens' logits are held at a time.",
)
_UPLOAD = "hf upload USER/NAME OUTPUT_DIR . --exclude 'checkpoint-*' --exclude 'earlier-run-*' --exclude .lock"
REFUSED: dict[str, tuple[str, str]] = {
    "fsdp": _NOT_SHARDED,
    "fsdp_config": _NOT_SHARDED,
    "deepspeed": _NOT_SHARDED,
    "parallelism_config": _NOT_SHARDED,
    "bf16_full_eval": _EVALUATES_ALIKE,
    "fp16_full_eval": _EVALUATES_ALIKE,
    "use_liger_kernel": _HAS_A_HEAD,
    "liger_kernel_config": _HAS_A_HEAD,
    "auto_find_batch_size": (
        "goes on from weights that the attempts before have trained already, with another number of steps",
        "Write per_device_train_batch_size: auto, which tries passes out before the run and leaves no trace in it.",
    ),
    "enable_jit_checkpoint": (
        "a run that SIGTERM ends would look like one that is done",
        "Remove it; save_steps says how much an interrupted run may lose.",
    ),
    "push_to_hub": (
        "uploads checkpoints, or nothing, instead of the model that the run ends with",
        f"Remove it, and upload when the run is done: {_UPLOAD}",
    ),
}
"""Keys of upstream's Trainer that this one does not honour: better an error than a run that ignores them."""


def training_problems(config: Config) -> list[Problem]:
    """Everything of it that is missing, and what the config asks for that no run honours."""
    problems = []
    if config.model_name_or_path is None and config.from_scratch is None:
        hint = "Name a model folder or hub model, or give `from_scratch` a model config."
        problems.append(config.problem("model_name_or_path", "is needed to train", hint))
    if not any(is_given(config, key) for key in TRAIN_SOURCES):
        hint = f"Give one of {', '.join(TRAIN_SOURCES)}."
        problems.append(config.problem("train_file", "there is no training data", hint))
    quantization = config.quantization_config
    if (
        quantization is not None
        and config.lora_config is None
        and (quantization.load_in_4bit or quantization.load_in_8bit)
    ):
        message = "quantized weights cannot be trained without an adapter"
        hint = "Add a lora_config section (`lora_config: {}` takes every default), or remove quantization_config."
        problems.append(config.problem("quantization_config", message, hint))
    return [*problems, *_not_trained_here(config)]


def _not_trained_here(config: Config) -> Iterator[Problem]:
    for key, (message, hint) in REFUSED.items():
        if is_given(config, key):
            yield config.problem(key, message, hint)
    if config.optim.startswith("schedule_free"):
        message = f"{config.optim} holds other weights to train on than to evaluate and save, and is not told which"
        yield config.problem("optim", message, "Leave it out for AdamW, or write another optimizer.")
