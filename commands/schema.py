"""Prints the JSON Schema of the config, for editors."""

from __future__ import annotations

import json

import config_manager
from commands.options import Options


def run(_: Options) -> int:
    """Prints one JSON document."""
    print(json.dumps(config_manager.json_schema(), indent=2))
    return 0
