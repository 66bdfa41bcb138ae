"""Rules between keys: what excludes what, and what needs what. Each broken rule is one problem."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterator

from sft.config.best_metric import WATCHING, metric_problems
from sft.config.overrides import shown
from sft.config.schema import Config
from sft.config.upstream_schema import trackers
from sft.errors import Problem, UserError

TRAIN_SOURCES = ("dataset_name", "dataset_path", "train_file", "datasets")
VALIDATION_SOURCES = ("validation_file", "validation_split", "eval_datasets")

_EXCLUSIVE: tuple[tuple[tuple[str, ...], str], ...] = (
    (TRAIN_SOURCES, "Keep one of them; `datasets` takes several data sets."),
    (VALIDATION_SOURCES, "Keep one of them; `eval_datasets` takes several data sets."),
    (("model_name_or_path", "from_scratch"), "Keep one: a trained model, or random weights."),
    (("quantization_config.load_in_4bit", "quantization_config.load_in_8bit"), "Keep one of them."),
    (("bf16", "fp16"), "Keep one of them; bf16 where the machine has it."),
    (("bf16_full_eval", "fp16_full_eval"), "Keep one of them."),
    (("warmup_ratio", "warmup_steps"), "Keep one: a share of all steps, or a number of steps."),
    (("global_batch_size", "gradient_accumulation_steps"), "Keep one: each follows from the other."),
)

_SETTINGS_OF_A_START = {
    "loftq_config": "loftq",
    "eva_config": "eva",
    "corda_config": "corda",
    "lora_ga_config": "lora_ga",
}


def broken_rules(config: Config, wrong: frozenset[str] = frozenset()) -> list[Problem]:
    """Every rule that the values given by the user break together.

    Args:
        config: the config, without the keys in `wrong`.
        wrong: top-level keys with a mistake of their own. A rule that speaks of one of them cannot be judged.
    """
    needs = (p for p in _needs(config) if not wrong.intersection(re.findall(r"\w+", f"{p.key} {p.message} {p.hint}")))
    return [*_exclusive(config), *needs]


def is_given(config: Config, key: str) -> bool:
    """Whether the user gave `key` a value other than its "off" value: null, false, zero, or an empty list."""
    place: object = config
    for part in key.split("."):
        if place is None or part not in getattr(place, "model_fields_set", ()):
            return False
        place = getattr(place, part)
    return bool(place) or place == ""


def _exclusive(config: Config) -> Iterator[Problem]:
    for keys, hint in _EXCLUSIVE:
        given = [key for key in keys if is_given(config, key)]
        if len(given) > 1:
            # Named at the one that came last: that is the one just added.
            *others, last = sorted(given, key=lambda key: (config.place(key)[1] or 0, keys.index(key)))
            yield config.problem(last, f"excludes {' and '.join(f'{o} ({_where(config, o)})' for o in others)}", hint)


def _where(config: Config, key: str) -> str:
    file, line = config.place(key)
    return f"line {line}" if line is not None else file or "given too"


def _needs(config: Config) -> Iterator[Problem]:
    if is_given(config, "from_scratch") and not is_given(config, "tokenizer_name_or_path"):
        hint = "Add tokenizer_name_or_path: random weights come with no tokenizer."
        yield config.problem("from_scratch", "needs tokenizer_name_or_path", hint)
    quantization = config.quantization_config
    if quantization is not None and not (quantization.load_in_4bit or quantization.load_in_8bit):
        hint = "Write load_in_4bit: true or load_in_8bit: true in it, or remove the section."
        yield config.problem("quantization_config", "asks for neither 4 nor 8 bits", hint)
    for section, start in _SETTINGS_OF_A_START.items():
        lora = config.lora_config
        if lora is not None and getattr(lora, section) is not None and lora.init_lora_weights != start:
            hint = f"Write init_lora_weights: {start}, or remove it."
            yield config.problem(f"lora_config.{section}", f"is used only with init_lora_weights: {start}", hint)
    if config.dataset_config_name is not None and config.dataset_name is None:
        yield config.problem("dataset_config_name", "needs dataset_name", "It names a configuration of a hub data set.")
    shuffle_seed, data_seed = config.shuffle_seed, config.data_seed
    if None not in (shuffle_seed, data_seed) and shuffle_seed != data_seed:
        message = f"is {data_seed}, but shuffle_seed, which orders the training rows too, is {shuffle_seed}"
        yield config.problem("data_seed", message, "Keep one of them.")
    yield from _weights(config)
    yield from _auto_batch(config)
    yield from _streaming(config)
    yield from _numbers(config)
    yield from _trackers(config)
    yield from _needs_of_training(config)


def _weights(config: Config) -> Iterator[Problem]:
    entries = config.datasets or []
    without = [number for number, entry in enumerate(entries) if entry.weight is None]
    if without and len(without) < len(entries):
        hint = "Give every data set a weight, or none: without, each row is taken once."
        yield config.problem(f"datasets.{without[0]}", "has no weight, others have", hint)
    for number, entry in enumerate(config.eval_datasets or []):
        if entry.weight is not None:
            hint = "Remove it: each validation row is measured once."
            yield config.problem(f"eval_datasets.{number}.weight", "validation data is not mixed", hint)


def _numbers(config: Config) -> Iterator[Problem]:
    """Numbers that upstream would take in another sense than the one they have."""
    if config.max_steps == 0:
        hint = "Write -1 to train for num_train_epochs."
        yield config.problem("max_steps", "0 would train for num_train_epochs, not for no step", hint)
    for key in ("logging_steps", "eval_steps", "save_steps", "warmup_steps"):
        value = getattr(config, key) or 0
        if value > 1 and value % 1:
            hint = "Below 1 it is a share of all steps, from 1 on a number of steps."
            yield config.problem(key, f"expected a whole number of steps, got {value:g}", hint)


def _auto_batch(config: Config) -> Iterator[Problem]:
    key = "per_device_train_batch_size"
    if config.per_device_train_batch_size != "auto":
        return
    if config.streaming:
        hint = "Give a number: the longest rows of a stream are not known before its end."
        yield config.problem(key, "auto needs all rows at once, and streaming reads them one after another", hint)


def _streaming(config: Config) -> Iterator[Problem]:
    """What needs to know all rows before the first is trained, and how many there are."""
    if not config.streaming:
        return
    if config.max_steps < 1:
        hint = "Write max_steps: how many rows a stream has is not known before its end."
        yield config.problem("streaming", "needs max_steps", hint)
    for key in ("validation_split", "dedupe"):
        if is_given(config, key):
            hint = "Remove one of them; prepare_data.py does it once, in files of their own."
            yield config.problem(key, "needs all rows at once, and streaming reads them one after another", hint)
    if config.train_sampling_strategy not in ("random", "sequential"):
        message = f"{config.train_sampling_strategy} needs all rows at once, and streaming reads them one after another"
        yield config.problem("train_sampling_strategy", message, "Write random (within each window) or sequential.")
    if not config.dataloader_in_order:
        hint = "Remove it: where a stream goes on after a resume follows from the order of its batches."
        yield config.problem("dataloader_in_order", "excludes streaming", hint)
    for key in ("save_strategy", "eval_strategy", "logging_strategy"):
        if getattr(config, key) == "epoch":
            yield config.problem(key, "a stream has no end of an epoch", "Write steps.")
    if config.mix_by == "tokens":
        hint = "Write mix_by: rows; a row's tokens are not known when it is its data set's turn."
        yield config.problem("mix_by", "streaming mixes by rows", hint)


def _trackers(config: Config) -> Iterator[Problem]:
    asked = [config.report_to] if isinstance(config.report_to, str) else config.report_to
    for name in asked:
        if name in ("none", "all") and len(asked) > 1:
            yield config.problem("report_to", f"{name} stands alone, not beside other trackers", "Keep one of them.")
        if name not in (*trackers(), "none", "all"):
            near = difflib.get_close_matches(name.lower(), trackers(), n=1)
            hint = f"Did you mean {near[0]}?" if near else f"Trackers are {', '.join(trackers())}; or none, or all."
            yield config.problem("report_to", f"there is no tracker {name!r}", hint)


def _needs_of_training(config: Config) -> Iterator[Problem]:
    # Data sets on the hub or in a folder may bring a validation split of their own.
    has_validation = any(is_given(config, key) for key in (*VALIDATION_SOURCES, "dataset_name", "dataset_path"))
    if config.eval_strategy != "no" and not has_validation:
        hint = f"Give one of {', '.join(VALIDATION_SOURCES)}, or write eval_strategy: no."
        yield config.problem("eval_strategy", f"{shown(config.eval_strategy)} needs validation data", hint)
    if config.load_best_model_at_end:
        yield from _best_model(config)
    yield from metric_problems(config)
    yield from _schedule(config)
    for old in ("gradient_checkpointing", "gradient_checkpointing_kwargs"):
        new = old.replace("gradient", "activation")
        before, now = getattr(config, old), getattr(config, new)
        if before is not None and now is not None and before != now:
            message = f"is {shown(before)}, but {new}, its new name, is {shown(now)}"
            yield config.problem(old, message, "Keep one of them.")
    if config.activation_checkpoint is not None and (config.activation_checkpointing or config.gradient_checkpointing):
        message = "is given beside activation_checkpointing, which would overrule it"
        yield config.problem("activation_checkpoint", message, "Keep one of them.")
    if config.dataloader_prefetch_factor is not None and config.dataloader_num_workers == 0:
        hint = "Write dataloader_num_workers: 1 or more."
        yield config.problem("dataloader_prefetch_factor", "needs worker processes that fetch ahead", hint)


def _schedule(config: Config) -> Iterator[Problem]:
    """What upstream leaves out without a word where the schedule has no use for it."""
    schedule = config.lr_scheduler_type
    if schedule in WATCHING and config.eval_strategy == "no":
        yield config.problem(
            "lr_scheduler_type", f"{schedule} needs evaluation", "Write eval_strategy: steps or epoch."
        )
    if schedule in ("constant", *WATCHING):
        hint = "Remove it, or write lr_scheduler_type: constant_with_warmup."
        for key in ("warmup_ratio", "warmup_steps"):
            if is_given(config, key):
                yield config.problem(key, f"lr_scheduler_type: {schedule} has no warmup", hint)
    if schedule in ("constant", "constant_with_warmup") and is_given(config, "lr_scheduler_kwargs"):
        message = f"lr_scheduler_type: {schedule} has no further settings"
        yield config.problem("lr_scheduler_kwargs", message, "Remove it, or write another schedule.")


def _best_model(config: Config) -> Iterator[Problem]:
    """Upstream's rules for `load_best_model_at_end`, told here with file and line."""
    key = "load_best_model_at_end"
    if config.eval_strategy == "no":
        yield config.problem(key, "needs evaluation", "Write eval_strategy: steps or epoch.")
        return
    if config.save_strategy == "best":
        return
    if config.save_strategy != config.eval_strategy:
        message = f"needs a checkpoint at each evaluation, but save_strategy is {config.save_strategy}"
        yield config.problem(key, message, f"Write save_strategy: {config.eval_strategy}, or save_strategy: best.")
    elif config.eval_strategy == "steps":
        eval_steps = config.eval_steps or config.logging_steps
        if (eval_steps < 1) != (config.save_steps < 1) or round(config.save_steps / eval_steps, 6) % 1:
            message = f"needs save_steps ({config.save_steps:g}) to be a multiple of eval_steps ({eval_steps:g})"
            yield config.problem(key, message, f"Write save_steps: {eval_steps:g}.")


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


def require_trainable(config: Config) -> None:
    """Checks what only a training run needs: a model, training data, and no key that no run honours.

    Raises:
        UserError: something of it is missing, or is asked for and not honoured.
    """
    problems = training_problems(config)
    if problems:
        raise UserError(*problems)
