"""The files of a run's output folder that are neither weights nor checkpoints: ledger, results, model card."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from sft.model_card import CardDataset, CardFacts, write_model_card
from sft.schema import SECRET_KEYS, Config, TrainingKeys

LEDGER_FILE = Path("logs") / "data_report.json"
RESULTS_FILE = Path("logs") / "eval_results.json"
LOG_FILE = Path("logs") / "training_log.txt"


def write_ledger(output_dir: Path, document: dict[str, Any]) -> None:
    """Writes SPEC's LEDGER document."""
    _write(output_dir / LEDGER_FILE, document)


def write_results(output_dir: Path, results: dict[str, Any]) -> None:
    """Writes the last evaluation's metrics."""
    _write(output_dir / RESULTS_FILE, results)


def write_card(
    output_dir: Path, config: Config, ledger: dict[str, Any], results: dict[str, Any], stop_tokens: list[str]
) -> None:
    """Writes README.md: what the model is, what it was trained on and how, and its last metrics."""
    import peft
    import torch
    import transformers

    given = config.section(TrainingKeys).training_arguments() | {"max_seq_length": config.max_seq_length}
    if config.lora_config is not None:
        given["lora_config"] = config.lora_config.kwargs()
    if config.quantization_config is not None:
        given["quantization_config"] = config.quantization_config.kwargs()
    datasets = [
        CardDataset(name, entry["rows_read"], entry["rows_trained"], entry["tokens"]["trained"])
        for name, entry in ledger["datasets"].items()
    ]
    facts = CardFacts(
        title=config.run_name or output_dir.name,
        base_model=config.model_name_or_path,
        is_adapter=config.lora_config is not None,
        path=str(output_dir),
        datasets=datasets,
        hyperparameters={k: v for k, v in given.items() if k not in (*SECRET_KEYS, "output_dir")},
        metrics={k: v for k, v in results.items() if isinstance(v, int | float)},
        stop_tokens=stop_tokens,
        chat=any(f != "text" for entry in ledger["datasets"].values() for f in entry["formats"]),
        versions={library.__name__: library.__version__ for library in (torch, transformers, peft)},
    )
    write_model_card(output_dir, facts)


def _write(file: Path, content: dict[str, Any]) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
