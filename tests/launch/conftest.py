"""Fixtures of the launcher's tests: a config, and plans for it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import pytest

from sft.launch.options import parse_arguments
from sft.launch.plan import ENTRY, Plan, make_plan
from tests.ranks import pretend_gpus


@pytest.fixture
def config(tmp_path: Path) -> Path:
    """A config that names a model and a data file, which nothing opens."""
    path = tmp_path / "c.yaml"
    path.write_text("model_name_or_path: some/model\ntrain_file: train.jsonl\n")
    return path


class Planner:
    """Makes plans for a config, in an environment of only the given variables."""

    def __init__(self, config: Path) -> None:
        self.config = config

    def __call__(self, *words: str, env: Mapping[str, str] | None = None) -> Plan:
        """The plan for the config with these further words on the command line."""
        return make_plan(parse_arguments(["--config", str(self.config), *words]), env or {})

    def command(self, *overrides: str) -> tuple[str, ...]:
        """The command that a plan with these overrides has."""
        return (str(ENTRY), "train", "--config_file", str(self.config), *overrides)


@pytest.fixture
def plan(config: Path, monkeypatch: pytest.MonkeyPatch) -> Planner:
    """A planner on a machine without GPUs."""
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    pretend_gpus(monkeypatch, 0)
    return Planner(config)
