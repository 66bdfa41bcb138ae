"""Fixtures shared by all tests; nothing here reaches a network."""

from __future__ import annotations

import os
import sys

# Before anything imports a Hugging Face library: no test may ask the hub for anything.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
# Tiny models are quickest on one thread, and tests do not disturb each other.
os.environ.setdefault("OMP_NUM_THREADS", "1")

from pathlib import Path

import pytest

from tests.builders import save_model_dir

SHARED_DATA = Path(__file__).resolve().parents[2] / "shared" / "data"


@pytest.fixture(autouse=True)
def _no_earlier_optimizer() -> None:
    """bitsandbytes remembers parameters by their ids, which those of a later test may have."""
    if optim := sys.modules.get("bitsandbytes.optim"):
        optim.GlobalOptimManager.get_instance().initialize()


@pytest.fixture(scope="session")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Llama with a ChatML tokenizer, saved as a user's model directory."""
    return save_model_dir(tmp_path_factory.mktemp("tiny_llama"))


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """Real data for tests to read in place; absent on a user's machine."""
    if not SHARED_DATA.is_dir():
        pytest.skip("the folder of real data stands beside the checkout on development machines only")
    return SHARED_DATA
