"""The value types of the config: strict scalars, and what a plain YAML scalar means for a field of a given type.

YAML derives a scalar's type from its spelling; the config key declares its own. `coerce` converts between the two:
`run_name: 2024` becomes text, `max_steps: 1e3` the integer 1000, `packing: no` False; `save_strategy: no` stays text.
"""

from __future__ import annotations

import os
import types
from collections.abc import Mapping
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic import AfterValidator, BaseModel, Strict

Bool = Annotated[bool, Strict()]
Int = Annotated[int, Strict()]
Number = Annotated[float, Strict()]
"""A real number: integers are accepted, booleans and quoted digits are not."""

PathText = Annotated[str, AfterValidator(os.path.expanduser)]
"""Text that is or may be a path on this machine: `~` is expanded here, once for every reader of the key."""

WORDS = {"yes": True, "on": True, "true": True, "no": False, "off": False, "false": False}
"""Spellings of a boolean that people use; YAML 1.2 has only `true` and `false`."""

KeyPath = tuple[str | int, ...]
"""The keys and list indices that lead to a value, e.g. `("datasets", 0, "path")`."""

_SCALAR_NAMES = {
    bool: "true or false",
    int: "a whole number",
    float: "a number",
    str: "text",
    dict: "a mapping of keys to values",
}


def union_members(annotation: Any) -> list[Any]:
    """Returns the members of a (possibly nested) union without their `Annotated`; `None` is `NoneType`."""
    origin = get_origin(annotation)
    if origin is Annotated:
        return union_members(get_args(annotation)[0])
    if origin in (Union, types.UnionType):
        return [branch for part in get_args(annotation) for branch in union_members(part)]
    return [annotation]


def section_class(annotation: Any) -> type[BaseModel] | None:
    """Returns the model in an annotation, e.g. `LoraKeys` of `LoraKeys | None`; None where there is none."""
    branches = union_members(annotation)
    return next((branch for branch in branches if isinstance(branch, type) and issubclass(branch, BaseModel)), None)


def item_type(annotation: Any) -> Any:
    """Returns the annotation of a list's items; None where no list is accepted."""
    return next((get_args(branch)[0] for branch in union_members(annotation) if get_origin(branch) is list), None)


def literal_values(annotation: Any) -> list[Any]:
    """Returns the values of every `Literal` in the annotation."""
    literals = [branch for branch in union_members(annotation) if get_origin(branch) is Literal]
    return [value for branch in literals for value in get_args(branch)]


def accepts(annotation: Any, kind: type) -> bool:
    """Tells whether the annotation accepts values of the builtin type `kind`, in a `Literal` as well."""
    declared = any(branch is kind or get_origin(branch) is kind for branch in union_members(annotation))
    return declared or any(type(value) is kind for value in literal_values(annotation))


def describe_type(annotation: Any) -> str:
    """Describes an annotation in words: `a whole number or null`, `one of no, steps, epoch`."""
    parts: list[str] = []
    for branch in union_members(annotation):
        if branch is type(None):
            part = "null"
        elif get_origin(branch) is Literal:
            values = [str(value).lower() if isinstance(value, bool) else str(value) for value in get_args(branch)]
            part = f"one of {', '.join(values)}" if len(values) > 1 else values[0]
        elif get_origin(branch) is list:
            first = union_members(get_args(branch)[0])[0]
            names = {str: "texts", int: "whole numbers", float: "numbers"}
            part = f"a list of {names.get(first, 'mappings' if section_class(first) else 'values')}"
        elif section_class(branch) or get_origin(branch) is dict:
            part = _SCALAR_NAMES[dict]
        else:
            part = _SCALAR_NAMES.get(branch, str(branch))
        if part not in parts:
            parts.append(part)
    parts.sort(key=lambda part: part == "null")
    return " or ".join(parts)


def annotation_at(schema: type[BaseModel], path: KeyPath) -> Any:
    """Returns the type that the schema declares at `path`; None where there is no such key."""
    annotation: Any = schema
    for part in path:
        section = section_class(annotation)
        if section is not None and part in section.model_fields:
            annotation = section.model_fields[str(part)].annotation
        elif isinstance(part, int) or str(part).isdigit():
            annotation = item_type(annotation)
        else:
            return None
    return annotation


def format_value(value: Any) -> str:
    """Spells a value as the config does, in at most 100 characters."""
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    text = repr(value)
    return text if len(text) <= 100 else f"{text[:97]}..."


def coerce(annotation: Any, value: Any, texts: Mapping[KeyPath, str], path: KeyPath = ()) -> Any:
    """Converts scalars in `value` to the types that their keys declare; returns what it cannot convert unchanged.

    Args:
        annotation: the type that the key declares.
        value: as YAML reads it.
        texts: the spelling of every unquoted scalar of the document, by path.
        path: of `value` in the document.
    """
    section, item = section_class(annotation), item_type(annotation)
    if isinstance(value, dict):
        if section is None:
            return value
        fields = section.model_fields
        return {
            key: coerce(fields[key].annotation, inner, texts, (*path, key)) if key in fields else inner
            for key, inner in value.items()
        }
    if isinstance(value, list):
        return [coerce(item, inner, texts, (*path, i)) for i, inner in enumerate(value)] if item else value
    return _coerce_scalar(annotation, value, texts.get(path))


def _coerce_scalar(annotation: Any, value: Any, text: str | None) -> Any:
    if isinstance(value, str):
        is_word = value.lower() in WORDS and accepts(annotation, bool)
        return WORDS[value.lower()] if is_word and value not in literal_values(annotation) else value
    if isinstance(value, float) and value.is_integer() and accepts(annotation, int) and not accepts(annotation, float):
        return int(value)
    if isinstance(value, (bool, int, float)) and text is not None and accepts(annotation, str):
        # Text only where the key accepts no number: `run_name: 2024` is a name.
        kinds = (bool,) if isinstance(value, bool) else (int, float)
        return value if any(accepts(annotation, kind) for kind in kinds) else text
    return value
