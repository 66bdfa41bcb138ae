"""A tiny trained model for the tests of generation."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.inference.qa_model import make_qa_model


@pytest.fixture(scope="module")
def qa_model() -> tuple[Any, Any]:
    """Returns the model and its tokenizer."""
    return make_qa_model()


@pytest.fixture
def qa_model_dir(qa_model: tuple[Any, Any], tmp_path: Path) -> Path:
    """Returns the folder of the saved model."""
    for part in qa_model:
        part.save_pretrained(tmp_path / "model")
    return tmp_path / "model"
