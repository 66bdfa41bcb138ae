"""The files of SPEC's output folder that are neither weights nor checkpoints: the ledger and the results."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

LEDGER_FILE = Path("logs") / "data_report.json"
RESULTS_FILE = Path("logs") / "eval_results.json"
LOG_FILE = Path("logs") / "training_log.txt"


def write_ledger(output_dir: Path, document: dict[str, Any]) -> None:
    """Writes SPEC's LEDGER document."""
    _write(output_dir / LEDGER_FILE, document)


def write_results(output_dir: Path, results: dict[str, Any]) -> None:
    """Writes the last evaluation's metrics."""
    _write(output_dir / RESULTS_FILE, results)


def _write(file: Path, content: dict[str, Any]) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
