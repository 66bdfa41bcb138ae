"""Rules between keys: which exclude each other, and which need another. Each broken rule is one problem."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterator

from sft.config.best_metric import METRIC_SCHEDULES, check_best_metric
from sft.config.field_types import format_value
from sft.config.schema import Config
from sft.config.upstream_docs import UNSUPPORTED
from sft.config.upstream_schema import known_trackers
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

_LORA_INITS = ("loftq", "eva", "corda", "lora_ga")
"""Values of `init_lora_weights` that alone read a section of lora_config: loftq_config, eva_config, ..."""


def find_broken_rules(config: Config, wrong: frozenset[str] = frozenset()) -> list[Problem]:
    """Returns every rule that the given values break together, whatever the command.

    Args:
        config: the config, without the keys in `wrong`.
        wrong: top-level keys with a mistake of their own; problems that mention one of them are not reported.
    """
    rules = (
        _check_model,
        _check_data,
        _check_streaming,
        _check_numbers,
        _check_trackers,
        _check_evaluation,
        _check_schedule,
        _check_training,
    )
    found = (problem for rule in rules for problem in rule(config))
    unaffected = [p for p in found if wrong.isdisjoint(re.findall(r"\w+", f"{p.key} {p.message} {p.hint}"))]
    return [*_check_exclusive(config), *unaffected]


def is_given(config: Config, key: str) -> bool:
    """Tells whether the user gave `key` a value other than null, false, zero or an empty list."""
    value: object = config
    for part in key.split("."):
        if value is None or part not in getattr(value, "model_fields_set", ()):
            return False
        value = getattr(value, part)
    return bool(value) or value == ""


def _check_exclusive(config: Config) -> Iterator[Problem]:
    for keys, hint in _EXCLUSIVE:
        given = [key for key in keys if is_given(config, key)]
        if len(given) > 1:
            # Reported at the last one in the file: most likely the one just added.
            *others, last = sorted(given, key=lambda key: (config.place(key)[1] or 0, keys.index(key)))
            yield config.problem(last, f"excludes {' and '.join(f'{o} ({_where(config, o)})' for o in others)}", hint)


def _where(config: Config, key: str) -> str:
    file, line = config.place(key)
    return f"line {line}" if line is not None else file or "given too"


def _check_model(config: Config) -> Iterator[Problem]:
    if is_given(config, "from_scratch") and not is_given(config, "tokenizer_name_or_path"):
        hint = "Add tokenizer_name_or_path: random weights come with no tokenizer."
        yield config.problem("from_scratch", "needs tokenizer_name_or_path", hint)
    quantization = config.quantization_config
    if quantization is not None and not (quantization.load_in_4bit or quantization.load_in_8bit):
        hint = "Write load_in_4bit: true or load_in_8bit: true in it, or remove the section."
        yield config.problem("quantization_config", "asks for neither 4 nor 8 bits", hint)
    lora = config.lora_config
    for init in _LORA_INITS:
        if lora is not None and getattr(lora, f"{init}_config") is not None and lora.init_lora_weights != init:
            hint = f"Write init_lora_weights: {init}, or remove it."
            yield config.problem(f"lora_config.{init}_config", f"is used only with init_lora_weights: {init}", hint)


def _check_data(config: Config) -> Iterator[Problem]:
    if config.dataset_config_name is not None and config.dataset_name is None:
        yield config.problem("dataset_config_name", "needs dataset_name", "It names a configuration of a hub data set.")
    shuffle_seed, data_seed = config.shuffle_seed, config.data_seed
    if None not in (shuffle_seed, data_seed) and shuffle_seed != data_seed:
        message = f"is {data_seed}, but shuffle_seed, which orders the training rows too, is {shuffle_seed}"
        yield config.problem("data_seed", message, "Keep one of them.")
    entries = config.datasets or []
    without = [number for number, entry in enumerate(entries) if entry.weight is None]
    if without and len(without) < len(entries):
        hint = "Give every data set a weight, or none: without weights, an epoch takes each row once."
        yield config.problem(f"datasets.{without[0]}", "has no weight, others have", hint)
    for number, entry in enumerate(config.eval_datasets or []):
        if entry.weight is not None:
            hint = "Remove it: each validation row is measured once."
            yield config.problem(f"eval_datasets.{number}.weight", "validation data is not mixed", hint)


def _check_streaming(config: Config) -> Iterator[Problem]:
    """Yields a problem for each key that needs all rows before training starts, or their number."""
    if not config.streaming:
        return
    one_by_one = "needs all rows at once, and streaming reads them one after another"
    if config.per_device_train_batch_size == "auto":
        hint = "Give a number: the longest rows of a stream are not known before its end."
        yield config.problem("per_device_train_batch_size", f"auto {one_by_one}", hint)
    if config.max_steps < 1:
        hint = "Write max_steps: how many rows a stream has is not known before its end."
        yield config.problem("streaming", "needs max_steps", hint)
    for key in ("validation_split", "dedupe"):
        if is_given(config, key):
            hint = "Remove one of them; prepare_data.py does it once, in files of their own."
            yield config.problem(key, one_by_one, hint)
    if config.train_sampling_strategy not in ("random", "sequential"):
        hint = "Write random (within each window) or sequential."
        yield config.problem("train_sampling_strategy", f"{config.train_sampling_strategy} {one_by_one}", hint)
    if not config.dataloader_in_order:
        hint = "Remove it: the position of a resumed stream follows from the order of its batches."
        yield config.problem("dataloader_in_order", "excludes streaming", hint)
    for key in ("save_strategy", "eval_strategy", "logging_strategy"):
        if getattr(config, key) == "epoch":
            yield config.problem(key, "a stream has no end of an epoch", "Write steps.")
    if config.mix_by == "tokens":
        hint = "Write mix_by: rows; a row's tokens are not counted yet when its data set is chosen."
        yield config.problem("mix_by", "streaming mixes by rows", hint)


def _check_numbers(config: Config) -> Iterator[Problem]:
    """Yields a problem for each number that upstream would interpret in another way."""
    if config.max_steps == 0:
        hint = "Write -1 to train for num_train_epochs."
        yield config.problem("max_steps", "0 would train for num_train_epochs, not for zero steps", hint)
    for key in ("logging_steps", "eval_steps", "save_steps", "warmup_steps"):
        value = getattr(config, key) or 0
        if value > 1 and value % 1:
            hint = "Below 1 it is a share of all steps, from 1 on a number of steps."
            yield config.problem(key, f"expected a whole number of steps, got {value:g}", hint)


def _check_trackers(config: Config) -> Iterator[Problem]:
    names = [config.report_to] if isinstance(config.report_to, str) else config.report_to
    for name in names:
        if name in ("none", "all") and len(names) > 1:
            yield config.problem("report_to", f"{name} excludes other trackers", "Keep one of them.")
        if name not in (*known_trackers(), "none", "all"):
            near = difflib.get_close_matches(name.lower(), known_trackers(), n=1)
            known = ", ".join(known_trackers())
            hint = f"Did you mean {near[0]}?" if near else f"Trackers are {known}; or none, or all."
            yield config.problem("report_to", f"there is no tracker {name!r}", hint)


def _check_evaluation(config: Config) -> Iterator[Problem]:
    # Data sets on the hub or in a folder may have a validation split of their own.
    has_validation = any(is_given(config, key) for key in (*VALIDATION_SOURCES, "dataset_name", "dataset_path"))
    if config.eval_strategy != "no" and not has_validation:
        hint = f"Give one of {', '.join(VALIDATION_SOURCES)}, or write eval_strategy: no."
        yield config.problem("eval_strategy", f"{format_value(config.eval_strategy)} needs validation data", hint)
    if config.load_best_model_at_end:
        yield from _check_best_model(config)
    yield from check_best_metric(config)


def _check_best_model(config: Config) -> Iterator[Problem]:
    """Checks upstream's rules for `load_best_model_at_end`, here with file and line."""
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


def _check_schedule(config: Config) -> Iterator[Problem]:
    """Yields a problem for each setting that upstream silently ignores under this schedule."""
    schedule = config.lr_scheduler_type
    if schedule in METRIC_SCHEDULES and config.eval_strategy == "no":
        hint = "Write eval_strategy: steps or epoch."
        yield config.problem("lr_scheduler_type", f"{schedule} needs evaluation", hint)
    if schedule in ("constant", *METRIC_SCHEDULES):
        hint = "Remove it, or write lr_scheduler_type: constant_with_warmup."
        for key in ("warmup_ratio", "warmup_steps"):
            if is_given(config, key):
                yield config.problem(key, f"lr_scheduler_type: {schedule} has no warmup", hint)
    if schedule in ("constant", "constant_with_warmup") and is_given(config, "lr_scheduler_kwargs"):
        message = f"lr_scheduler_type: {schedule} has no further settings"
        yield config.problem("lr_scheduler_kwargs", message, "Remove it, or write another schedule.")


def _check_training(config: Config) -> Iterator[Problem]:
    for old in ("gradient_checkpointing", "gradient_checkpointing_kwargs"):
        new = old.replace("gradient", "activation")
        before, now = getattr(config, old), getattr(config, new)
        if before is not None and now is not None and before != now:
            message = f"is {format_value(before)}, but {new}, its new name, is {format_value(now)}"
            yield config.problem(old, message, "Keep one of them.")
    if config.activation_checkpoint is not None and (config.activation_checkpointing or config.gradient_checkpointing):
        message = "is given together with activation_checkpointing, which would override it"
        yield config.problem("activation_checkpoint", message, "Keep one of them.")
    if config.dataloader_prefetch_factor is not None and config.dataloader_num_workers == 0:
        hint = "Write dataloader_num_workers: 1 or more."
        yield config.problem("dataloader_prefetch_factor", "needs worker processes that fetch ahead", hint)


def require_trainable(config: Config) -> None:
    """Checks what only a training run needs: a model, data, trainable weights, and no unsupported key.

    Raises:
        UserError: all that is missing, excludes another key in training, or is unsupported.
    """
    if problems := [*_check_model_and_data(config), *_check_trainable_weights(config), *_check_unsupported(config)]:
        raise UserError(*problems)


def _check_model_and_data(config: Config) -> Iterator[Problem]:
    if not config.model_name_or_path and config.from_scratch is None:
        hint = "Name a model folder or hub model, or give `from_scratch` a model config."
        yield config.problem("model_name_or_path", "is needed to train", hint)
    if not any(is_given(config, key) for key in TRAIN_SOURCES):
        yield config.problem("train_file", "there is no training data", f"Give one of {', '.join(TRAIN_SOURCES)}.")


def _check_trainable_weights(config: Config) -> Iterator[Problem]:
    """Checks that the weights can be trained; `evaluate` and `preview`, which train none, accept such a config."""
    if config.from_scratch is not None:
        for key in ("lora_config", "quantization_config"):
            if getattr(config, key) is not None:
                message = "excludes from_scratch: randomly initialized weights must not be frozen"
                yield config.problem(key, message, "Remove one of them.")
    elif config.quantization_config is not None and config.lora_config is None:
        message = "quantized weights cannot be trained without an adapter"
        hint = "Add a lora_config section (`lora_config: {}` takes every default), or remove quantization_config."
        yield config.problem("quantization_config", message, hint)


def _check_unsupported(config: Config) -> Iterator[Problem]:
    for key, (message, hint) in UNSUPPORTED.items():
        if is_given(config, key):
            yield config.problem(key, message, hint)
    if config.optim.startswith("schedule_free"):
        message = f"{config.optim} trains on other weights than it evaluates and saves, and nothing here switches them"
        yield config.problem("optim", message, "Remove it for AdamW, or write another optimizer.")
