"""Every shipped YAML file is a valid config."""

from __future__ import annotations

import pytest

from sft.config.loading import load_config
from sft.config.validation import require_trainable
from tests.runs import ROOT

SHIPPED = sorted([ROOT / "sample_config.yaml", *(ROOT / "configs").rglob("*.y*ml")])


def test_configs_are_shipped():
    assert len(SHIPPED) > 1
    assert SHIPPED[-1].name == "sample_config.yaml"


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: str(path.relative_to(ROOT)))
def test_a_shipped_config_is_valid_and_can_be_trained(path):
    require_trainable(load_config(path))
