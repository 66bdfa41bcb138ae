"""Command line overrides in the usual spellings: `--learning_rate 1e-5`, `--lora_config.r=32`, `bf16=true`.

Dashes count as underscores, a switch needs no value (`--bf16`), values are YAML (`train_file=[a.jsonl,b.jsonl]`), and a
number in the key is a list index (`datasets.0.max_samples=10`).
"""

from __future__ import annotations

import logging
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from pydantic import BaseModel

from sft.config.field_types import WORDS, KeyPath, accepts, annotation_at, format_value, section_class
from sft.config.yaml_reader import read_value
from sft.errors import Problem, UserError

COMMAND_LINE = "command line"
_ASSIGNMENT = re.compile(r"[A-Za-z_][\w.-]*=")

logger = logging.getLogger("sft")


@dataclass(frozen=True)
class Override:
    """One assignment from the command line.

    Attributes:
        path: the key, e.g. `("lora_config", "r")`.
        value: as YAML reads it.
        typed: the value as typed on the command line.
        texts: the spelling of each unquoted scalar in the value, by the whole path.
    """

    path: KeyPath
    value: Any
    typed: str
    texts: Mapping[KeyPath, str]

    @property
    def key(self) -> str:
        return ".".join(map(str, self.path))


def parse_overrides(arguments: Sequence[str], schema: type[BaseModel]) -> tuple[list[Override], list[Problem]]:
    """Returns the assignments in `arguments` in their order, and a problem for each word that is none."""
    overrides: list[Override] = []
    problems: list[Problem] = []
    for key, text in _assignments(arguments, schema, problems):
        path: KeyPath = tuple(int(part) if part.isdigit() else part for part in key.replace("-", "_").split("."))
        if "" in path:
            problems.append(Problem(f"{key!r} is not a key", "Write section.key=value.", key, COMMAND_LINE))
            continue
        value, texts = _read(text, annotation_at(schema, path))
        overrides.append(Override(path, value, text, {(*path, *inner): spelling for inner, spelling in texts.items()}))
    return overrides, problems


def _assignments(
    arguments: Sequence[str], schema: type[BaseModel], problems: list[Problem]
) -> Iterator[tuple[str, str]]:
    """Yields (key, value text) for each assignment; adds a problem for each word that is none."""
    rest = list(arguments)
    while rest:
        word = rest.pop(0)
        name = word.removeprefix("--")
        if _ASSIGNMENT.match(name):
            key, _, text = name.partition("=")
            yield key, text
        elif not word.startswith("--") or not name:
            hint = "Overrides are written --key value, --key=value or key=value."
            problems.append(Problem(f"{word!r} is not an override", hint, file=COMMAND_LINE))
        elif rest and _is_value_for(rest[0], annotation_at(schema, tuple(name.replace("-", "_").split(".")))):
            yield name, rest.pop(0)
        elif accepts(annotation_at(schema, tuple(name.replace("-", "_").split("."))), bool):
            yield name, "true"
        else:
            problems.append(Problem("needs a value", f"Write {word}=VALUE.", name, COMMAND_LINE))


def _is_value_for(word: str, annotation: Any) -> bool:
    """Tells whether `word` is the value of the key before it, not the assignment after a switch."""
    if word.startswith("--"):
        return False
    return not (accepts(annotation, bool) and _ASSIGNMENT.match(word) and word.lower() not in WORDS)


def _read(text: str, annotation: Any) -> tuple[Any, Mapping[KeyPath, str]]:
    """Parses `text` as YAML; keeps it as text where YAML reads a mapping and the key accepts text only."""
    try:
        value, texts = read_value(text)
    except UserError:
        return text, {}
    holds_text = annotation is not None and accepts(annotation, str)
    if isinstance(value, dict) and holds_text and not (accepts(annotation, dict) or section_class(annotation)):
        return text, {}  # --system_prompt "Answer in one word: yes or no"
    return value, texts


def apply_overrides(
    values: dict[str, Any], overrides: Sequence[Override], schema: type[BaseModel], secrets: frozenset[str]
) -> list[Problem]:
    """Writes each override into `values` in place and logs it; returns a problem for each that cannot be written."""
    problems = []
    for override in overrides:
        try:
            before = _assign(values, override.path, override.value)
        except LookupError as error:
            problems.append(Problem(str(error.args[0]), key=override.key, file=COMMAND_LINE))
            continue
        if before is _ABSENT:
            before = _default_at(schema, override.path)
        if secrets.intersection(map(str, override.path)):
            logger.info("override: %s = (not shown)", override.key)
        else:
            logger.info(
                "override: %s = %s (was %s)", override.key, override.typed[:100], format_value(before).strip("'")
            )
    return problems


_ABSENT = object()


def _assign(values: dict[str, Any], path: KeyPath, value: Any) -> Any:
    """Sets `values[path]`, creating missing sections; returns the previous value.

    Raises:
        LookupError: a list has no such index, or a section is needed where a plain value is.
    """
    target: Any = values
    part: Any
    for depth, part in enumerate(path):
        above = ".".join(map(str, path[:depth]))
        if isinstance(target, list):
            if not isinstance(part, int):
                raise LookupError(f"{above} is a list; write {above}.0.{part} for its first item")
            if part >= len(target):
                raise LookupError(f"{above} has {len(target)} items, counted from 0")
        elif not isinstance(target, dict):
            raise LookupError(f"{above} is {format_value(target)}, which has no keys")
        else:
            part = str(part)
        if depth == len(path) - 1:
            before = target[part] if isinstance(target, list) else target.get(part, _ABSENT)
            target[part] = value
            return before
        if isinstance(target, dict) and target.get(part) is None:
            target[part] = {}
        target = target[part]
    return _ABSENT


def _default_at(schema: type[BaseModel], path: KeyPath) -> Any:
    section = section_class(annotation_at(schema, path[:-1])) if len(path) > 1 else schema
    field = section.model_fields.get(str(path[-1])) if section else None
    return field.get_default(call_default_factory=True) if field and not field.is_required() else None
