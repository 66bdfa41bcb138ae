"""What a checkpoint says of the run that made it."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from sft.run_shape import describe_adapter, digest_lengths


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


def test_lengths_are_told_apart_by_their_order_too() -> None:
    assert digest_lengths(np.array([3, 5])) == digest_lengths(np.array([3, 5], dtype=np.int32))
    assert digest_lengths(np.array([3, 5])) != digest_lengths(np.array([5, 3]))
