"""The value types of the config: strict scalars, and what a plain YAML scalar means for a field of a given type.

YAML decides a scalar's type by its look, a config key by its meaning. `fit` settles the two: `run_name: 2024` is text,
`max_steps: 1e3` is the integer 1000, `packing: no` is False, and `save_strategy: no` stays the word.
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
"""Any real number: an integer is fine, a boolean or quoted digits are not."""

PathText = Annotated[str, AfterValidator(os.path.expanduser)]
"""What is or may be a path on this machine: `~` is the user's home, expanded once and here for all who read the key."""

WORDS = {"yes": True, "on": True, "true": True, "no": False, "off": False, "false": False}
"""Spellings of a boolean; YAML 1.2 knows only the last of each, people use all."""

Path = tuple[str | int, ...]
"""Where a value stands in the document, e.g. `("datasets", 0, "path")`."""

_SCALAR_NAMES = {
    bool: "true or false",
    int: "a whole number",
    float: "a number",
    str: "text",
    dict: "a mapping of keys to values",
    list: "a list",
}


def branches(annotation: Any) -> list[Any]:
    """The alternatives of a (possibly nested) union, without `Annotated` around them; `None` comes as `NoneType`."""
    origin = get_origin(annotation)
    if origin is Annotated:
        return branches(get_args(annotation)[0])
    if origin in (Union, types.UnionType):
        return [branch for part in get_args(annotation) for branch in branches(part)]
    return [annotation]


def section_of(annotation: Any) -> type[BaseModel] | None:
    """The model that a key opens, for `lora_config: LoraKeys | None`, or None."""
    for branch in branches(annotation):
        if isinstance(branch, type) and issubclass(branch, BaseModel):
            return branch
    return None


def items_of(annotation: Any) -> Any:
    """The annotation of a list's items, or None where no list is accepted."""
    for branch in branches(annotation):
        if get_origin(branch) is list:
            return get_args(branch)[0]
    return None


def choices_of(annotation: Any) -> list[Any]:
    """Every value that a `Literal` in the annotation names."""
    return [value for branch in branches(annotation) if get_origin(branch) is Literal for value in get_args(branch)]


def accepts(annotation: Any, kind: type) -> bool:
    """Whether a value of the builtin type `kind` can fit, a `Literal` counting by its values."""
    for branch in branches(annotation):
        if branch is kind or get_origin(branch) is kind:
            return True
        if get_origin(branch) is Literal and any(type(value) is kind for value in get_args(branch)):
            return True
    return False


def expected(annotation: Any) -> str:
    """The annotation in English: `a whole number or null`, `one of no, steps, epoch`."""
    parts: list[str] = []
    for branch in branches(annotation):
        if branch is type(None):
            part = "null"
        elif get_origin(branch) is Literal:
            values = [_as_yaml(value) for value in get_args(branch)]
            part = f"one of {', '.join(values)}" if len(values) > 1 else values[0]
        elif get_origin(branch) is list:
            part = f"a list of {_plural(get_args(branch)[0])}"
        elif section_of(branch) or get_origin(branch) is dict:
            part = _SCALAR_NAMES[dict]
        else:
            part = _SCALAR_NAMES.get(branch, str(branch))
        if part not in parts:
            parts.append(part)
    parts.sort(key=lambda part: part == "null")
    return " or ".join(parts)


def _plural(annotation: Any) -> str:
    names = {str: "texts", int: "whole numbers", float: "numbers"}
    first = branches(annotation)[0]
    return names.get(first, "mappings" if section_of(first) else "values")


def _as_yaml(value: Any) -> str:
    return {True: "true", False: "false"}[value] if isinstance(value, bool) else str(value)


def fit(annotation: Any, value: Any, texts: Mapping[Path, str], path: Path = ()) -> Any:
    """`value` as the key means it, where its look and its meaning differ; what cannot fit comes back as it is.

    Args:
        annotation: the type that the key declares.
        value: as YAML reads it.
        texts: the spelling of every unquoted scalar of the document, by path.
        path: where `value` stands.
    """
    section, item = section_of(annotation), items_of(annotation)
    if isinstance(value, dict):
        if section is None:
            return value
        fields = section.model_fields
        return {
            key: fit(fields[key].annotation, inner, texts, (*path, key)) if key in fields else inner
            for key, inner in value.items()
        }
    if isinstance(value, list):
        return [fit(item, inner, texts, (*path, i)) for i, inner in enumerate(value)] if item else value
    return _fit_scalar(annotation, value, texts.get(path))


def _fit_scalar(annotation: Any, value: Any, text: str | None) -> Any:
    if isinstance(value, str):
        is_word = value.lower() in WORDS and accepts(annotation, bool)
        return WORDS[value.lower()] if is_word and value not in choices_of(annotation) else value
    if isinstance(value, float) and value.is_integer() and accepts(annotation, int) and not accepts(annotation, float):
        return int(value)
    if isinstance(value, (bool, int, float)) and text is not None and accepts(annotation, str):
        # Only where nothing else fits: `report_to: 5` is not a number that somebody meant, `run_name: 2024` is a name.
        kinds = (bool,) if isinstance(value, bool) else (int, float)
        return value if any(accepts(annotation, kind) for kind in kinds) else text
    return value
