"""What pydantic found wrong, as one plain sentence per key, with the nearest valid key where a key is unknown."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterator
from functools import cache
from typing import Any

from pydantic import BaseModel
from pydantic_core import ErrorDetails

from sft.config.field_types import Path, branches, choices_of, expected, items_of, section_of
from sft.config.key_aliases import ADVICE, OTHER_NAMES
from sft.config.overrides import annotation_at, shown
from sft.config.schema import SECRET_KEYS
from sft.config.section import Place
from sft.errors import Problem

Locate = Callable[[Path], tuple[str, Place | tuple[None, None]]]
"""Gives the key as typed and its place, by path."""


def problems_of(
    errors: list[ErrorDetails], values: dict[str, Any], schema: type[BaseModel], at: Locate
) -> list[Problem]:
    """One problem per key, in the order of the file.

    Args:
        errors: of a `pydantic.ValidationError`.
        values: the data that was validated.
        schema: the model that refused it.
        at: how each key was typed, and where.
    """
    found: dict[Path, Problem] = {}
    for error in errors:
        path, value = _reached(error, values)
        if path in found:
            continue
        key, (file, line) = at(path)
        value = "(not shown)" if SECRET_KEYS.intersection(map(str, path)) else value
        message, hint = _said(error, path, value, schema)
        found[path] = Problem(message, hint, key=key, file=file, line=line)
    return list(found.values())


def bad_keys(errors: list[ErrorDetails]) -> set[str]:
    """The top-level keys with a mistake in them."""
    return {str(error["loc"][0]) for error in errors}


def _reached(error: ErrorDetails, values: Any) -> tuple[Path, Any]:
    """The path of the mistake as far as it leads through the data: pydantic goes on with the union's branches."""
    path: Path = ()
    for part in error["loc"]:
        inside = part in values if isinstance(values, dict) else isinstance(values, list) and isinstance(part, int)
        if not inside:
            missing = error["type"] == "missing" and part == error["loc"][-1]
            return ((*path, part), None) if missing else (path, values)
        path, values = (*path, part), values[part]
    return path, values


def _said(error: ErrorDetails, path: Path, value: Any, schema: type[BaseModel]) -> tuple[str, str]:
    """The message and the hint for one mistake."""
    kind, context = error["type"], error.get("ctx", {})
    if kind == "extra_forbidden":
        return "there is no such key", _nearest(path, schema)
    annotation = annotation_at(schema, path)
    if kind == "missing":
        return f"is needed: {expected(annotation)}", ""
    limits = {"greater_than_equal": ("ge", "at least"), "greater_than": ("gt", "above")}
    limits |= {"less_than_equal": ("le", "at most"), "less_than": ("lt", "below")}
    if kind in limits:
        name, words = limits[kind]
        return f"must be {words} {context[name]:g}, got {shown(value)}", ""
    if kind == "finite_number":
        return f"must be a finite number, got {shown(value)}", ""
    if annotation is None:
        return f"not valid here: got {shown(value)}", ""
    if choices_of(annotation) and len(branches(annotation)) == 1 and len(choices_of(annotation)) == 1:
        return f"must be {expected(annotation)}, got {shown(value)}", _meaning(path, schema)
    return f"expected {expected(annotation)}, got {shown(value)}", _hint_for(value, annotation)


def _meaning(path: Path, schema: type[BaseModel]) -> str:
    """What the schema says about a key: for one with a single right value, why it is the only one."""
    section = section_of(annotation_at(schema, path[:-1]))
    return (section.model_fields[str(path[-1])].description or "") if section else ""


def _hint_for(value: Any, annotation: Any) -> str:
    wanted = expected(annotation)
    if isinstance(value, str):
        if "number" in wanted and value.replace("_", "").replace(".", "", 1).lstrip("+-").isdigit():
            return f"Write {value.replace('_', '')} without quotes or underscores."
        near = difflib.get_close_matches(value.lower(), [word.strip(",") for word in wanted.split()], n=1)
        return f"Did you mean {near[0]}?" if near else ""
    if isinstance(value, bool) and "mapping" in wanted and value:
        return "Write {} for a section with every default."
    return ""


@cache
def all_keys(schema: type[BaseModel]) -> tuple[str, ...]:
    """Every key of the schema, dotted: `lora_config.r`; the keys of list items as `datasets.path`."""
    return tuple(_walk(schema, ""))


def _walk(schema: type[BaseModel], prefix: str) -> Iterator[str]:
    for name, field in schema.model_fields.items():
        yield prefix + name
        inner = section_of(field.annotation) or section_of(items_of(field.annotation))
        if inner is not None:
            yield from _walk(inner, f"{prefix}{name}.")


def _nearest(path: Path, schema: type[BaseModel]) -> str:
    """A sentence that names the valid key nearest to the unknown one at `path`."""
    words = [str(part) for part in path if not isinstance(part, int)]
    name, section = words[-1].replace("-", "_"), ".".join(words[:-1])
    if not section and name in ADVICE:
        return ADVICE[name]
    keys = all_keys(schema)
    candidate = nearest_key(name, section, keys)
    if candidate is None:
        return "See `sft_main.py schema` for all keys."
    if section and candidate.startswith(f"{section}."):
        typed = ".".join(map(str, path[:-1]))  # with the numbers of list items in it
        candidate = f"{typed}.{candidate.removeprefix(f'{section}.')}"
    return f"Did you mean {candidate}?"


def nearest_key(name: str, section: str, keys: tuple[str, ...]) -> str | None:
    """The valid key that a wrong one most likely means: an old name, the right name elsewhere, a near spelling."""
    lowered = name.lower()
    here = [key.rpartition(".")[2] for key in keys if key.rpartition(".")[0] == section]
    spelled = difflib.get_close_matches(lowered, here, n=1, cutoff=0.84)
    renamed = OTHER_NAMES.get(lowered)
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
