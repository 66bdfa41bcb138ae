"""What a checkpoint says of the run that made it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from sft import run_shape
from sft.errors import UserError
from sft.metrics import TokenCounts
from sft.run_shape import RunShape, describe_adapter, digest_lengths


@pytest.mark.parametrize(
    ("modules", "shown"),
    [({"v_proj", "q_proj"}, "['q_proj', 'v_proj']"), (r".*\.q_proj", r".*\.q_proj"), (None, "None")],
)
def test_an_adapter_is_described_however_its_modules_are_named(modules: Any, shown: str) -> None:
    config = SimpleNamespace(r=8, lora_alpha=16, target_modules=modules)
    assert describe_adapter(SimpleNamespace(peft_config={"default": config})) == (
        f"r=8, lora_alpha=16, target_modules={shown}"
    )


def test_a_whole_model_has_no_adapter() -> None:
    assert describe_adapter(object()) is None


def test_what_is_counted_comes_back(tmp_path: Path) -> None:
    shape = RunShape(1, 2, 3, 40, "3f", 0, None, "random")
    counts = TokenCounts(1.5, 1.25, 7, 3, 2, 1, 30)
    run_shape.save(tmp_path, shape, counts, skipped=4)
    assert run_shape.load(tmp_path, shape) == (counts, 4)
    with pytest.raises(UserError, match="seed: was 0"):
        run_shape.load(tmp_path, replace(shape, seed=1))
    (tmp_path / run_shape.FILE).unlink()
    assert run_shape.load(tmp_path, shape) == (TokenCounts.zero(), 0)


def test_lengths_are_told_apart_by_their_order_too() -> None:
    assert digest_lengths(np.array([3, 5])) == digest_lengths(np.array([3, 5], dtype=np.int32))
    assert digest_lengths(np.array([3, 5])) != digest_lengths(np.array([5, 3]))
