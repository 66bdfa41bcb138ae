"""Loads a YAML file and command line overrides as one checked `Config`, and writes it as YAML.

    load_config("sft.yaml", ["--learning_rate", "1e-5", "lora_config.r=32"]) -> Config

Nothing here imports torch or transformers, so that a mistake in the config is reported in a fraction of a second.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from sft.config.loading import load_config
from sft.config.schema import GROUPS, SECRET_KEYS, Config
from sft.config.section import ConfigSection
from sft.config.validation import require_trainable
from sft.config.yaml_reader import add_core_resolvers

__all__ = ["config_text", "json_schema", "load_config", "require_trainable", "write_config"]


def json_schema() -> dict[str, Any]:
    """Returns the JSON Schema of the config, for editors."""
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **Config.model_json_schema()}


def write_config(config: Config, path: str | Path) -> None:
    """Writes the resolved config, grouped: what the user set, and every key of ours with its effective value.

    Secrets and the checkpoint that the run resumes from are omitted: the file repeats the run from step 0, and with
    `auto` it would find a finished run. But for these, loading the file gives an equal config.
    """
    if config.resume_from_checkpoint:  # false applies to each start of a job, and is kept
        config = config.model_copy(update={"resume_from_checkpoint": None})
    Path(path).write_text(config_text(config), encoding="utf-8")


def config_text(config: Config) -> str:
    """Returns the YAML that `write_config` writes."""
    parts = []
    for group in GROUPS:
        title = (group.__doc__ or "").splitlines()[0]
        values = _values_to_write(config.section(group))
        body = yaml.dump(values, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=110)
        parts.append(f"# {title}\n{body}")
    return "\n".join(parts)


class _Dumper(yaml.SafeDumper):
    """Quotes text that YAML 1.1 or 1.2 would read as another type, and writes text of several lines as a block."""


def _represent_text(dumper: yaml.SafeDumper, text: str) -> yaml.Node:
    lines = text.split("\n")
    style = '"' if not all(line.isprintable() for line in lines) else "|" if len(lines) > 1 else None
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style=style)


_Dumper.add_representer(str, _represent_text)
add_core_resolvers(_Dumper)


def _values_to_write(keys: ConfigSection) -> dict[str, Any]:
    """Returns the values of one group or section that are written: keys of ours, and those that the user set."""
    own = type(keys).__annotations__.keys()
    return {
        name: _plain(value) for name, value in keys if name not in SECRET_KEYS and (name in own or keys.is_set(name))
    }


def _plain(value: Any) -> Any:
    if isinstance(value, ConfigSection):
        return _values_to_write(value)
    if isinstance(value, list):
        return [_plain(item) for item in value]
    # `save_steps` is a number that may be a share: 500 reads better than 500.0, and loads as the same value.
    return int(value) if isinstance(value, float) and value.is_integer() and abs(value) < 1e15 else value
