"""Config files given as text, and the problems that loading them reports."""

from __future__ import annotations

from pathlib import Path

import pytest

from sft.config.loading import load_config
from sft.errors import UserError


def write_yaml(folder: Path, text: str) -> Path:
    """Writes a config file."""
    path = folder / "config.yaml"
    path.write_text(text)
    return path


def refusal(path: Path, *overrides: str) -> list[tuple[int | None, str | None, str]]:
    """Returns (line, key, message) of every problem, in the order reported."""
    with pytest.raises(UserError) as caught:
        load_config(path, overrides)
    assert caught.value.exit_code == 2
    return [(p.line, p.key, p.message) for p in caught.value.problems]


def hints(path: Path, *overrides: str) -> dict[str | None, str]:
    """Returns the hint of every problem by its key."""
    with pytest.raises(UserError) as caught:
        load_config(path, overrides)
    return {p.key: p.hint for p in caught.value.problems}
