"""From a YAML file and command line overrides to one checked `Config`, and back to YAML.

    load_config("sft.yaml", ["--learning_rate", "1e-5", "lora_config.r=32"]) -> Config

Nothing here imports torch or transformers: a mistake in the config is told in a fraction of a second.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from sft.config.error_messages import bad_keys, problems_of
from sft.config.field_types import Path as KeyPath
from sft.config.field_types import fit
from sft.config.overrides import COMMAND_LINE, Override, apply_overrides, parse_overrides
from sft.config.schema import GROUPS, SECRET_KEYS, Config
from sft.config.section import ConfigSection, Place, upwards
from sft.config.validation import broken_rules, training_problems
from sft.config.yaml_reader import Document, add_core_resolvers, read_yaml
from sft.errors import Problem, UserError

_SECTION_HINTS = {
    "lora_config": "Write `lora_config: {}` for every default, or `lora_config: null` to train all weights.",
    "quantization_config": "Write `load_in_4bit: true` under it, or `quantization_config: null` for none.",
}


def load_config(path: str | Path, overrides: Sequence[str] = ()) -> Config:
    """The checked config in a YAML file, with `overrides` from the command line on top.

    Args:
        path: of the YAML file.
        overrides: words in any of the spellings `--key value`, `--key=value`, `key=value`, `--switch`.

    Raises:
        UserError: every mistake in the file and the overrides at once.
    """
    document = read_yaml(path)
    assigned, problems = parse_overrides(overrides, Config)
    problems = [*document.problems, *problems, *_empty_sections(document, assigned)]
    problems += apply_overrides(document.values, assigned, Config, SECRET_KEYS)
    return _checked(document, assigned, problems)


def require_trainable(config: Config) -> None:
    """Checks what only a training run needs: a model, training data, and no key that no run honours.

    Raises:
        UserError: something of it is missing, or is asked for and not honoured.
    """
    problems = training_problems(config)
    if problems:
        raise UserError(*problems)


def json_schema() -> dict[str, Any]:
    """The JSON Schema of the config, for editors."""
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **Config.model_json_schema()}


def write_config(config: Config, path: str | Path) -> None:
    """Writes the resolved config, grouped: what the user set, and every key of ours with its effective value.

    Secrets are left out, and the checkpoint that the run goes on from: the file repeats the run, from its start, and
    with `auto` would find that it is finished. But for these, loading the file gives an equal config.
    """
    if config.resume_from_checkpoint:  # false is a wish for each start of a job, and stays
        config = config.model_copy(update={"resume_from_checkpoint": None})
    Path(path).write_text(config_text(config), encoding="utf-8")


def config_text(config: Config) -> str:
    """The YAML that `write_config` writes."""
    parts = []
    for group in GROUPS:
        title = (group.__doc__ or "").splitlines()[0]
        body = yaml.dump(
            _written(config.section(group)), Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=110
        )
        parts.append(f"# {title}\n{body}")
    return "\n".join(parts)


def _checked(document: Document, assigned: Sequence[Override], problems: list[Problem]) -> Config:
    """The config that the data describes.

    Raises:
        UserError: `problems`, and whatever else is wrong.
    """
    typed = {override.path: override for override in assigned}
    texts = {path: text for path, text in document.texts.items() if not any(path[: len(p)] == p for p in typed)}
    for override in assigned:
        texts.update(override.texts)
    values = fit(Config, document.values, texts)
    places: dict[str, Place] = {_dotted(path): (document.file, line) for path, line in document.lines.items()}
    places.update({override.key: (COMMAND_LINE, None) for override in assigned})

    def at(path: KeyPath) -> tuple[str, Place | tuple[None, None]]:
        """The key as typed and its place; for a section that an override opened, the override's."""
        key = _dotted(path)
        if key not in places:
            opened_by = next((o.key for o in assigned if o.path[: len(path)] == path), None)
            key = opened_by or key
        return key, next((places[k] for k in upwards(key) if k in places), (document.file, None))

    try:
        config = Config.model_validate(values)
    except ValidationError as error:
        errors = error.errors(include_url=False)
        problems = [*problems, *problems_of(errors, values, Config, at)]
        wrong = bad_keys(errors)
        config = Config.model_validate({key: value for key, value in values.items() if key not in wrong})
        config.locate(places)
        problems += broken_rules(config, frozenset(wrong))
    else:
        config.locate(places)
        problems = [*problems, *broken_rules(config)]
    if problems:
        raise UserError(*sorted(problems, key=lambda p: (p.file == COMMAND_LINE, p.line or 0)))
    return config


def _empty_sections(document: Document, assigned: Sequence[Override]) -> list[Problem]:
    """Sections left empty: `lora_config:` with nothing under it reads as null, and the run would train everything."""
    opened = {override.path[0] for override in assigned}
    return [
        Problem(
            "the section is empty",
            hint,
            key=key,
            file=document.file,
            line=document.lines[key,],
        )
        for key, hint in _SECTION_HINTS.items()
        if document.texts.get((key,)) == "" and key not in opened
    ]


def _dotted(path: KeyPath) -> str:
    return ".".join(map(str, path))


class _Dumper(yaml.SafeDumper):
    """Quotes whatever YAML 1.1 or 1.2 would read as something other than text, and shows long text as a block."""


def _represent_text(dumper: yaml.SafeDumper, text: str) -> yaml.Node:
    lines = text.split("\n")
    style = '"' if not all(line.isprintable() for line in lines) else "|" if len(lines) > 1 else None
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style=style)


_Dumper.add_representer(str, _represent_text)
add_core_resolvers(_Dumper)


def _written(keys: ConfigSection) -> dict[str, Any]:
    """The values that a written config shows of one group or section: ours, and those that the user set."""
    own = type(keys).__annotations__.keys()
    return {
        name: _plain(value) for name, value in keys if name not in SECRET_KEYS and (name in own or keys.is_set(name))
    }


def _plain(value: Any) -> Any:
    if isinstance(value, ConfigSection):
        return _written(value)
    if isinstance(value, list):
        return [_plain(item) for item in value]
    # `save_steps` is a number that may be a share: 500 reads better than 500.0, and loads as the same.
    return int(value) if isinstance(value, float) and value.is_integer() and abs(value) < 1e15 else value
