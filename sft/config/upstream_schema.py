"""The keys of `TrainingArguments`, `LoraConfig` and `BitsAndBytesConfig` as schema fields, without importing them.

Importing transformers takes seconds; `--help`, `schema` and config errors take a fraction of one. So the facts about
upstream's keys (name, type, default, choices) are kept in `upstream_schema.json`, which

    python -m sft.config.upstream_schema

rewrites from the installed libraries; a test compares the two.
"""

from __future__ import annotations

import dataclasses
import enum
import importlib
import inspect
import json
import re
from functools import cache
from pathlib import Path
from typing import Annotated, Any, Literal, get_args, get_origin, get_type_hints

from pydantic import Field, StringConstraints, create_model

from sft.config.field_types import Bool, Int, Number, union_members
from sft.config.section import ConfigSection
from sft.config.upstream_docs import LIMITS, MEANINGS

FACTS_FILE = Path(__file__).with_suffix(".json")
Fact = dict[str, Any]

_ANNOTATIONS: dict[str, Any] = {
    "bool": Bool,
    "int": Int,
    "float": Number,
    "str": str,
    "dict": dict[str, Any],
    "list[str]": list[str],
    "list[int]": list[Int],
    "list[list[int]]": list[list[Int]],
    "false": Literal[False],
}


@cache
def _read_file() -> dict[str, Any]:
    return json.loads(FACTS_FILE.read_text(encoding="utf-8"))


def facts() -> dict[str, dict[str, Fact]]:
    """Returns upstream's keys per class: `facts()["LoraConfig"]["r"] == {"kinds": ["int"], "default": 8}`."""
    return _read_file()["classes"]


def known_trackers() -> list[str]:
    """Returns the names that upstream's `report_to` accepts."""
    return _read_file()["trackers"]


def upstream_defaults(class_name: str) -> dict[str, Any]:
    """Returns the default of each key of an upstream class."""
    return {name: fact["default"] for name, fact in facts()[class_name].items()}


@cache
def upstream_keys(class_name: str) -> type[ConfigSection]:
    """Makes a model with one field for each key of an upstream class, with upstream's name and default."""
    fields: dict[str, Any] = {}
    for name, fact in facts()[class_name].items():
        meaning = MEANINGS.get(class_name, {}).get(name) or f"`{class_name}.{name}` of upstream, handed on as it is."
        limits = LIMITS.get(class_name, {}).get(name, {})
        fields[name] = (_annotation(fact, limits), Field(default=fact["default"], description=meaning))
    return create_model(f"{class_name}Keys", __base__=ConfigSection, __doc__=f"Every key of `{class_name}`.", **fields)


def _annotation(fact: Fact, limits: dict[str, Any]) -> Any:
    """Builds the typing annotation of one fact, e.g. `Literal["no", "steps"]` or `int | None`."""
    union: Any = None
    for kind in fact["kinds"]:
        if kind == "none":
            continue
        if kind == "choice":
            part = _choice(fact["choices"])
        elif kind.startswith("section:"):
            part = upstream_keys(kind.removeprefix("section:"))
        else:
            part = _ANNOTATIONS[kind]
            if limits and kind in ("int", "float"):
                part = Annotated[part, Field(**limits)]
        union = part if union is None else union | part
    return union | None if "none" in fact["kinds"] else union


def _choice(choices: list[str]) -> Any:
    """Builds a `Literal`, or a pattern where upstream documents one (`pissa_niter_[number of iters]`)."""
    if not any("[" in choice for choice in choices):
        return Literal[tuple(choices)]
    alternatives = (re.sub(r"\\\[.*\\\]", r"[0-9]+", re.escape(choice)) for choice in choices)
    return Annotated[str, StringConstraints(pattern=f"^({'|'.join(alternatives)})$")]


def non_default_values(class_name: str, keys: ConfigSection) -> dict[str, Any]:
    """Returns the values that differ from the defaults of an upstream class; nested sections as upstream's classes."""
    upstream = upstream_defaults(class_name)
    return {
        name: make_upstream(value) if isinstance(value, ConfigSection) else value
        for name, value in keys
        if name in upstream and value != upstream[name]
    }


def make_upstream(section: ConfigSection) -> Any:
    """Makes the upstream object that a nested section describes, e.g. `peft.EvaConfig(rho=1.0)`."""
    class_name = type(section).__name__.removesuffix("Keys")
    module = importlib.import_module(_read_file()["modules"][class_name])
    return getattr(module, class_name)(**non_default_values(class_name, section))


# Values that the library accepts and its annotations do not list.
_UNLISTED_CHOICES = {"init_lora_weights": ["lora_ga"]}
# `BitsAndBytesConfig.__init__` has no annotations; where the default is None, its type is stated here.
_UNTYPED = {
    "llm_int8_skip_modules": ["list[str]", "none"],
    "bnb_4bit_compute_dtype": ["str", "none"],
    "bnb_4bit_quant_storage": ["str", "none"],
}
_UNTYPED_CHOICES = {
    "bnb_4bit_quant_type": ["fp4", "nf4"],
    "bnb_4bit_compute_dtype": ["float32", "bfloat16", "float16"],
    "bnb_4bit_quant_storage": ["float16", "float32", "int8", "uint8", "float64", "bfloat16"],
}


def installed_facts() -> dict[str, Any]:
    """Reads the facts from the installed libraries, shaped as `upstream_schema.json`. Importing them takes seconds."""
    import accelerate
    import bitsandbytes
    import peft
    import transformers
    from transformers.integrations.integration_utils import INTEGRATION_TO_CALLBACK

    classes: dict[str, dict[str, Fact]] = {}
    modules: dict[str, str] = {}
    _describe_dataclass(transformers.TrainingArguments, classes, modules)
    _describe_dataclass(peft.LoraConfig, classes, modules)
    _describe_signature(transformers.BitsAndBytesConfig, classes, modules)
    versions = {lib.__name__: lib.__version__ for lib in (transformers, peft, accelerate, bitsandbytes)}
    return {"versions": versions, "trackers": list(INTEGRATION_TO_CALLBACK), "modules": modules, "classes": classes}


def _describe_dataclass(cls: type, classes: dict[str, dict[str, Fact]], modules: dict[str, str]) -> None:
    """Adds `cls`, and every dataclass among its fields, to `classes`."""
    hints = get_type_hints(cls)
    described = classes.setdefault(cls.__name__, {})
    modules[cls.__name__] = cls.__module__
    for field in dataclasses.fields(cls):
        if not field.init:
            continue
        choices: list[str] = list(_UNLISTED_CHOICES.get(field.name, []))
        branches = union_members(hints[field.name])
        kinds = list(dict.fromkeys(_name_kind(branch, choices) for branch in branches))
        for branch in branches:
            if isinstance(branch, type) and dataclasses.is_dataclass(branch) and branch.__name__ not in classes:
                _describe_dataclass(branch, classes, modules)
        if "str" in kinds and (listed := field.metadata.get("choices")):
            choices += listed
            kinds.insert(kinds.index("str"), "choice")
        if "choice" in kinds and "str" in kinds:  # upstream annotates `Enum | str`, and accepts only the enum's values
            kinds.remove("str")
        if any(kind.startswith("section:") for kind in kinds) and "dict" in kinds:  # the section declares its keys
            kinds.remove("dict")
        factory = None if field.default_factory is dataclasses.MISSING else field.default_factory
        default = factory() if factory else field.default
        if dataclasses.is_dataclass(default) or (default == {} and "dict" not in kinds):
            default = None
        if default is None and "none" not in kinds:
            kinds.append("none")
        described[field.name] = _fact(kinds, choices, getattr(default, "value", default))


def _name_kind(branch: Any, choices: list[str]) -> str:
    """Names one union member of an upstream annotation; adds the values of an enum or `Literal` to `choices`."""
    if branch is type(None):
        return "none"
    if get_origin(branch) is Literal:
        if get_args(branch) == (False,):
            return "false"
        choices[:0] = get_args(branch)
        return "choice"
    if isinstance(branch, type) and issubclass(branch, enum.Enum):
        choices[:0] = [member.value for member in branch]
        return "choice"
    if dataclasses.is_dataclass(branch):
        return f"section:{branch.__name__}"  # type: ignore[union-attr]
    if get_origin(branch) in (list, tuple):
        inner = _name_kind(union_members(get_args(branch)[0])[0], choices)
        return f"list[{'list[int]' if inner == 'list[int]' else 'str' if inner == 'choice' else inner}]"
    if get_origin(branch) is dict:
        return "dict"
    return branch.__name__


def _describe_signature(cls: type, classes: dict[str, dict[str, Fact]], modules: dict[str, str]) -> None:
    """Adds the named parameters of `cls.__init__` to `classes`; upstream ignores further `**kwargs`."""
    described = classes.setdefault(cls.__name__, {})
    modules[cls.__name__] = cls.__module__
    for name, parameter in inspect.signature(cls).parameters.items():
        if parameter.kind is inspect.Parameter.VAR_KEYWORD:
            continue
        kinds = list(_UNTYPED.get(name) or [type(parameter.default).__name__])
        choices = _UNTYPED_CHOICES.get(name, [])
        if choices:
            kinds[kinds.index("str")] = "choice"
        described[name] = _fact(kinds, choices, parameter.default)


def _fact(kinds: list[str], choices: list[str], default: Any) -> Fact:
    return {"kinds": kinds, **({"choices": choices} if "choice" in kinds else {}), "default": default}


if __name__ == "__main__":
    FACTS_FILE.write_text(json.dumps(installed_facts(), indent=1) + "\n", encoding="utf-8")
