"""The output folder's lock, and its files other than weights and checkpoints: log, ledger, results, model card."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from sft.config.schema import Config
from sft.errors import Problem, UserError
from sft.report.console import write_log_file
from sft.report.model_card import CardFacts, write_model_card

_ON_THE_CARD = (
    "num_train_epochs",
    "max_steps",
    "per_device_train_batch_size",
    "gradient_accumulation_steps",
    "global_batch_size",
    "learning_rate",
    "lr_scheduler_type",
    "warmup_ratio",
    "warmup_steps",
    "optim",
    "weight_decay",
    "max_grad_norm",
    "label_smoothing_factor",
    "neftune_noise_alpha",
    "max_seq_length",
    "packing",
    "train_on",
    "bf16",
    "fp16",
    "seed",
)
_LORA_ON_THE_CARD = ("r", "lora_alpha", "lora_dropout", "target_modules", "use_dora", "use_rslora")

_locks: list[FileLock] = []  # held until the process ends


def require_writable(output_dir: Path) -> None:
    """Raises `UserError` unless files can be written to `output_dir`; creates nothing."""
    existing = next(p for p in (output_dir.absolute(), *output_dir.absolute().parents) if p.exists())
    if not existing.is_dir():
        raise UserError(Problem(f"{str(existing)!r} is a file", "name a folder", "output_dir"))
    try:  # os.access is true for root even on a read-only file system
        tempfile.TemporaryDirectory(prefix=".sft-", dir=existing).cleanup()
    except OSError as error:
        message = f"cannot write to {str(existing)!r}: {error.strerror}"
        raise UserError(Problem(message, "name another folder", "output_dir")) from None


def lock_output_dir(output_dir: Path) -> None:
    """Locks the folder until the process ends or locks another, and starts the log file.

    Raises:
        UserError: the folder cannot be written, or another run has locked it.
    """
    require_writable(output_dir)
    while _locks:  # an earlier run in this process
        _locks.pop().release()
    try:
        output_dir.mkdir(parents=True, exist_ok=True)
        lock = FileLock(output_dir / ".lock")
        lock.acquire(timeout=0)
    except Timeout:
        message = f"another run is writing to {str(output_dir)!r}"
        raise UserError(Problem(message, "wait for it, or name another folder", "output_dir")) from None
    except OSError as error:
        message = f"cannot write to {str(output_dir)!r}: {error.strerror}"
        raise UserError(Problem(message, "name another folder", "output_dir")) from None
    _locks.append(lock)
    write_log_file(output_dir / "logs" / "training_log.txt")


def write_ledger(output_dir: Path, document: dict[str, Any]) -> None:
    """Writes the ledger of all data sets."""
    _write(output_dir / "logs" / "data_report.json", document)


def write_results(output_dir: Path, results: dict[str, Any]) -> None:
    """Writes the metrics of the last evaluation."""
    _write(output_dir / "logs" / "eval_results.json", results)


def write_card(
    output_dir: Path, config: Config, ledger: dict[str, Any], results: dict[str, Any], stop_tokens: list[str]
) -> None:
    """Writes the model card: base model, data, settings and last metrics."""
    import peft
    import torch
    import transformers

    settings = {name: getattr(config, name) for name in _ON_THE_CARD if getattr(config, name) not in (None, False)}
    if config.lora_config is not None:
        settings |= {f"lora_config.{name}": getattr(config.lora_config, name) for name in _LORA_ON_THE_CARD}
    if config.quantization_config is not None:
        settings["quantization_config"] = config.quantization_config.kwargs()
    facts = CardFacts(
        title=config.run_name or output_dir.name,
        base_model=config.model_name_or_path,
        is_adapter=config.lora_config is not None,
        path=str(output_dir),
        datasets=ledger["datasets"],
        hyperparameters=settings,
        metrics={k: v for k, v in results.items() if isinstance(v, int | float)},
        stop_tokens=stop_tokens,
        chat=any(f != "text" for entry in ledger["datasets"].values() for f in entry["formats"]),
        versions={library.__name__: library.__version__ for library in (torch, transformers, peft)},
    )
    write_model_card(output_dir, facts)


def _write(file: Path, content: dict[str, Any]) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
