"""Runs of the real command, as a user starts it, and the files that they leave."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).resolve().parents[1]


def write_rows(file: Path, rows: list[dict[str, Any]]) -> Path:
    """JSON Lines."""
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


def arithmetic(count: int, start: int = 0) -> list[dict[str, str]]:
    """Questions and answers of unequal length."""
    return [
        {
            "question": f"What is {n} and {n * 7}?" + " Think." * (n % 5),
            "answer": f"It is {n * 8}." + " Sure." * (n % 3),
        }
        for n in range(start, start + count)
    ]


def write_config(file: Path, **keys: Any) -> Path:
    """A config file."""
    file.write_text(yaml.safe_dump(keys, sort_keys=False))
    return file


def run(
    *arguments: str | Path,
    processes: int = 0,
    env: dict[str, str] | None = None,
    script: Path = ROOT / "sft_main.py",
) -> subprocess.CompletedProcess:
    """`sft_main.py`, or a script that calls it, in a process of its own, or in several under torchrun."""
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"] if processes else []
    command = [sys.executable, *launcher, str(script), *map(str, arguments)]
    given = {"PYTHONPATH": str(ROOT), **({"OMP_NUM_THREADS": "1"} if processes else {}), **(env or {})}
    return subprocess.run(command, cwd=ROOT, env={**os.environ, **given}, capture_output=True, text=True, timeout=900)


def refused_before_data(
    config_file: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    verbs: Sequence[str] = ("train",),
) -> tuple[dict[str, Any], list[str]]:
    """The one error that `check` tells as JSON, and what each verb says; all refuse the config, and read no data."""
    import pipeline
    import sft_main

    assert sft_main.main(["check", "--config_file", str(config_file), "--json"]) == 2
    (told,) = json.loads(capsys.readouterr().out)["errors"]
    monkeypatch.setattr(pipeline, "prepare_data", lambda *_, **__: pytest.fail("the data was prepared"))
    said = []
    for verb in verbs:
        assert sft_main.main([verb, "--config_file", str(config_file)]) == 2
        said.append(capsys.readouterr().err)
    return told, said


def log_history(output_dir: Path) -> list[dict[str, Any]]:
    """The training logs in `trainer_state.json`."""
    state = json.loads((output_dir / "trainer_state.json").read_text())
    return [entry for entry in state["log_history"] if "loss" in entry]


def losses(output_dir: Path) -> list[float]:
    """The loss curve."""
    return [entry["loss"] for entry in log_history(output_dir)]
