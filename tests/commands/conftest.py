"""A config of a run that takes a second or two."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.runs import arithmetic, write_config, write_rows


@pytest.fixture
def config_file(tmp_path: Path, model_dir: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A config of a run that takes a second or two."""
    monkeypatch.setenv("SFT_CACHE", str(tmp_path / "cache"))
    rows = write_rows(tmp_path / "train.jsonl", arithmetic(60))
    return write_config(
        tmp_path / "run.yaml",
        model_name_or_path=str(model_dir),
        dtype="float32",
        train_file=str(rows),
        validation_split=0.1,
        output_dir=str(tmp_path / "out"),
        max_seq_length=128,
        per_device_train_batch_size=4,
        learning_rate=1e-3,
        max_steps=4,
        logging_steps=1,
        lora_config={"r": 4},
    )
