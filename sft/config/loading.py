"""Loads one checked `Config` from a YAML file and command line overrides."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from pydantic import ValidationError

from sft.config.error_messages import explain_errors
from sft.config.field_types import KeyPath, coerce
from sft.config.overrides import COMMAND_LINE, Override, apply_overrides, parse_overrides
from sft.config.schema import SECRET_KEYS, Config
from sft.config.section import Place, enclosing_keys
from sft.config.validation import find_broken_rules
from sft.config.yaml_reader import YamlDocument, read_yaml
from sft.errors import Problem, UserError

_SECTION_HINTS = {
    "lora_config": "Write `lora_config: {}` for every default, or `lora_config: null` to train all weights.",
    "quantization_config": "Write `load_in_4bit: true` under it, or `quantization_config: null` for none.",
}


def load_config(path: str | Path, overrides: Sequence[str] = ()) -> Config:
    """Loads and checks the config of a YAML file with `overrides` from the command line.

    Args:
        path: of the YAML file.
        overrides: words in the spellings `--key value`, `--key=value`, `key=value`, `--switch`.

    Raises:
        UserError: every mistake in the file and the overrides at once.
    """
    document = read_yaml(path)
    assigned, problems = parse_overrides(overrides, Config)
    problems = [*document.problems, *problems, *_find_empty_sections(document, assigned)]
    problems += apply_overrides(document.values, assigned, Config, SECRET_KEYS)
    return _build_config(document, assigned, problems)


def _build_config(document: YamlDocument, assigned: Sequence[Override], problems: list[Problem]) -> Config:
    """Validates the values of the file and the overrides.

    Raises:
        UserError: `problems`, and every further mistake.
    """
    typed = {override.path: override for override in assigned}
    texts = {path: text for path, text in document.texts.items() if not any(path[: len(p)] == p for p in typed)}
    for override in assigned:
        texts.update(override.texts)
    values = coerce(Config, document.values, texts)
    places: dict[str, Place] = {_dotted(path): (document.file, line) for path, line in document.lines.items()}
    places.update({override.key: (COMMAND_LINE, None) for override in assigned})

    def locate(path: KeyPath) -> tuple[str, Place | tuple[None, None]]:
        """Returns the key as typed and its place; for a section that an override created, those of the override."""
        key = _dotted(path)
        if key not in places:
            key = next((o.key for o in assigned if o.path[: len(path)] == path), key)
        return key, next((places[k] for k in enclosing_keys(key) if k in places), (document.file, None))

    try:
        config = Config.model_validate(values)
    except ValidationError as error:
        errors = error.errors(include_url=False)
        problems = [*problems, *explain_errors(errors, values, Config, locate)]
        wrong = frozenset(str(error["loc"][0]) for error in errors)
        config = Config.model_validate({key: value for key, value in values.items() if key not in wrong})
        config.locate(places)
        problems += find_broken_rules(config, wrong)
    else:
        config.locate(places)
        problems = [*problems, *find_broken_rules(config)]
    if problems:
        raise UserError(*sorted(problems, key=lambda p: (p.file == COMMAND_LINE, p.line or 0)))
    return config


def _find_empty_sections(document: YamlDocument, assigned: Sequence[Override]) -> list[Problem]:
    """Finds sections without keys: YAML reads an empty `lora_config:` as null, and the run would train all weights."""
    opened = {override.path[0] for override in assigned}
    return [
        Problem("the section is empty", hint, key=key, file=document.file, line=document.lines[key,])
        for key, hint in _SECTION_HINTS.items()
        if document.texts.get((key,)) == "" and key not in opened
    ]


def _dotted(path: KeyPath) -> str:
    return ".".join(map(str, path))
