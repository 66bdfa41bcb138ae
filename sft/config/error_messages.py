"""Turns pydantic's errors into one sentence per key; an unknown key comes with the nearest valid one."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterator
from functools import cache
from typing import Any

from pydantic import BaseModel
from pydantic_core import ErrorDetails

from sft.config.field_types import (
    KeyPath,
    annotation_at,
    describe_type,
    format_value,
    item_type,
    literal_values,
    section_class,
    union_members,
)
from sft.config.key_aliases import HINTS, KEY_ALIASES
from sft.config.schema import SECRET_KEYS
from sft.config.section import Place
from sft.errors import Problem

Locate = Callable[[KeyPath], tuple[str, Place | tuple[None, None]]]
"""Returns the key as typed and its place, by path."""


def explain_errors(
    errors: list[ErrorDetails], values: dict[str, Any], schema: type[BaseModel], locate: Locate
) -> list[Problem]:
    """Returns one problem per key, in the order of `errors`.

    Args:
        errors: of a `pydantic.ValidationError`.
        values: the data that was validated.
        schema: the model that refused it.
        locate: returns how a key was typed, and where.
    """
    found: dict[KeyPath, Problem] = {}
    for error in errors:
        path, value = _find_value(error, values)
        if path in found:
            continue
        key, (file, line) = locate(path)
        value = "(not shown)" if SECRET_KEYS.intersection(map(str, path)) else value
        message, hint = _explain(error, path, value, schema)
        found[path] = Problem(message, hint, key=key, file=file, line=line)
    return list(found.values())


def _find_value(error: ErrorDetails, values: Any) -> tuple[KeyPath, Any]:
    """Returns the path and value of a mistake, without the union members that pydantic appends to its path."""
    path: KeyPath = ()
    for part in error["loc"]:
        inside = part in values if isinstance(values, dict) else isinstance(values, list) and isinstance(part, int)
        if not inside:
            missing = error["type"] == "missing" and part == error["loc"][-1]
            return ((*path, part), None) if missing else (path, values)
        path, values = (*path, part), values[part]
    return path, values


def _explain(error: ErrorDetails, path: KeyPath, value: Any, schema: type[BaseModel]) -> tuple[str, str]:
    """Returns the message and the hint for one mistake."""
    kind, context = error["type"], error.get("ctx", {})
    if kind == "extra_forbidden":
        return "there is no such key", _suggest_key(path, schema)
    annotation = annotation_at(schema, path)
    if kind == "missing":
        return f"is needed: {describe_type(annotation)}", ""
    limits = {"greater_than_equal": ("ge", "at least"), "greater_than": ("gt", "above")}
    limits |= {"less_than_equal": ("le", "at most"), "less_than": ("lt", "below")}
    if kind in limits:
        name, words = limits[kind]
        return f"must be {words} {context[name]:g}, got {format_value(value)}", ""
    if kind == "finite_number":
        return f"must be a finite number, got {format_value(value)}", ""
    if annotation is None:
        return f"not valid here: got {format_value(value)}", ""
    if len(union_members(annotation)) == len(literal_values(annotation)) == 1:
        section = section_class(annotation_at(schema, path[:-1]))  # its description of a key with one value says why
        why = (section.model_fields[str(path[-1])].description or "") if section else ""
        return f"must be {describe_type(annotation)}, got {format_value(value)}", why
    return f"expected {describe_type(annotation)}, got {format_value(value)}", _suggest_value(value, annotation)


def _suggest_value(value: Any, annotation: Any) -> str:
    wanted = describe_type(annotation)
    if isinstance(value, str):
        if "number" in wanted and value.replace("_", "").replace(".", "", 1).lstrip("+-").isdigit():
            return f"Write {value.replace('_', '')} without quotes or underscores."
        near = difflib.get_close_matches(value.lower(), [word.strip(",") for word in wanted.split()], n=1)
        return f"Did you mean {near[0]}?" if near else ""
    if isinstance(value, bool) and "mapping" in wanted and value:
        return "Write {} for a section with every default."
    return ""


@cache
def list_keys(schema: type[BaseModel]) -> tuple[str, ...]:
    """Returns every key of the schema, dotted: `lora_config.r`; the keys of list items as `datasets.path`."""
    return tuple(_walk(schema, ""))


def _walk(schema: type[BaseModel], prefix: str) -> Iterator[str]:
    for name, field in schema.model_fields.items():
        yield prefix + name
        inner = section_class(field.annotation) or section_class(item_type(field.annotation))
        if inner is not None:
            yield from _walk(inner, f"{prefix}{name}.")


def _suggest_key(path: KeyPath, schema: type[BaseModel]) -> str:
    """Names the valid key nearest to the unknown one at `path`."""
    words = [str(part) for part in path if not isinstance(part, int)]
    name, section = words[-1].replace("-", "_"), ".".join(words[:-1])
    if not section and name in HINTS:
        return HINTS[name]
    candidate = _find_nearest(name, section, list_keys(schema))
    if candidate is None:
        return "See `sft_main.py schema` for all keys."
    if section and candidate.startswith(f"{section}."):
        typed = ".".join(map(str, path[:-1]))  # includes list indices
        candidate = f"{typed}.{candidate.removeprefix(f'{section}.')}"
    return f"Did you mean {candidate}?"


def _find_nearest(name: str, section: str, keys: tuple[str, ...]) -> str | None:
    """Returns the key most likely meant: by an alias, by its name in another section, or by a near spelling."""
    lowered = name.lower()
    here = [key.rpartition(".")[2] for key in keys if key.rpartition(".")[0] == section]
    spelled = difflib.get_close_matches(lowered, here, n=1, cutoff=0.84)
    renamed = KEY_ALIASES.get(lowered)
    elsewhere = [key for key in keys if key.rpartition(".")[2] in (lowered, renamed)]
    dotted = f"{section}." if section else ""
    if renamed in keys and (not section or renamed.startswith(section + ".")):
        return renamed
    if lowered in here:
        return dotted + lowered
    if elsewhere:
        return min(elsewhere, key=lambda key: (key.rpartition(".")[2] != lowered, key.count(".")))
    if renamed in keys:
        return renamed
    if spelled:
        return dotted + spelled[0]
    for cutoff, pool in ((0.6, here), (0.7, [key.rpartition(".")[2] for key in keys])):
        close = difflib.get_close_matches(lowered, pool, n=1, cutoff=cutoff)
        if close:
            full = dotted + close[0]
            return full if full in keys else next(key for key in keys if key.rpartition(".")[2] == close[0])
    return None
