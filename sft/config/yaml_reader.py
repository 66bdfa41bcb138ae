"""Reads YAML 1.2 with the line of every key; a key given twice is a mistake, and merge keys (`<<`) work.

PyYAML reads YAML 1.1, in which `1e-5` is text, `no` is false, `12:30` is 750, `2024-01-01` is a date, and the second of
two equal keys silently wins. Here PyYAML composes nodes, which have line numbers, and the data is built from those.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from sft.config.field_types import KeyPath
from sft.errors import Problem, UserError

_TAG = "tag:yaml.org,2002:"
_BOOLEANS = {"true": True, "True": True, "TRUE": True, "false": False, "False": False, "FALSE": False}

_CORE_SCALARS = (
    ("null", r"~|null|Null|NULL|", ["~", "n", "N", ""]),
    ("bool", "|".join(_BOOLEANS), list("tTfF")),
    ("int", r"[-+]?[0-9]+|0o[0-7]+|0x[0-9a-fA-F]+", list("-+0123456789")),
    (
        "float",
        r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)",
        list("-+.0123456789"),
    ),
    ("merge", "<<", ["<"]),
)
"""The unquoted scalars of YAML 1.2's core schema (and `<<`): tag, pattern, first characters."""


def add_core_resolvers(cls: Any) -> None:
    """Adds the scalars of YAML 1.2 to a PyYAML loader or dumper."""
    for name, pattern, first in _CORE_SCALARS:
        cls.add_implicit_resolver(_TAG + name, re.compile(f"(?:{pattern})$"), first)


class _Loader(yaml.SafeLoader):
    """A PyYAML loader with the scalars of YAML 1.2 in place of those of 1.1."""

    yaml_implicit_resolvers: dict[str, Any] = {}  # noqa: RUF012 (PyYAML declares it without ClassVar)


add_core_resolvers(_Loader)


@dataclass
class YamlDocument:
    """A YAML mapping and its positions in the file.

    Attributes:
        values: the data.
        file: the name shown in messages.
        lines: the line of every key and list item, from 1, by path.
        texts: the spelling of every unquoted scalar, by path.
        problems: mistakes that leave the rest readable, such as a key that occurs twice.
    """

    values: dict[str, Any]
    file: str
    lines: dict[KeyPath, int] = field(default_factory=dict)
    texts: dict[KeyPath, str] = field(default_factory=dict)
    problems: list[Problem] = field(default_factory=list)


def read_yaml(path: str | Path) -> YamlDocument:
    """Reads the mapping in a YAML file.

    Raises:
        UserError: the file is missing, a folder, unreadable, empty, not YAML, or not a mapping; with file and line.
    """
    name = str(path)
    try:
        text = Path(path).read_text(encoding="utf-8-sig")
    except FileNotFoundError:
        hint = "Check the path after --config_file."
        raise UserError(Problem("there is no such config file", hint, file=name)) from None
    except UnicodeDecodeError as error:
        raise UserError(Problem(f"not UTF-8 text (byte {error.start})", "Save it as UTF-8.", file=name)) from None
    except OSError as error:
        raise UserError(Problem(f"cannot be read: {error.strerror}", file=name)) from None
    try:
        node = yaml.compose(text, Loader=_Loader)
    except yaml.YAMLError as error:
        raise UserError(_explain_yaml_error(error, text, name)) from None
    if node is None or (isinstance(node, yaml.ScalarNode) and not node.value):
        raise UserError(Problem("the config file is empty", "Write at least a model and a data set.", file=name))
    if not isinstance(node, yaml.MappingNode):
        kind = "a list" if isinstance(node, yaml.SequenceNode) else f"the single value {node.value!r}"
        line = node.start_mark.line + 1
        raise UserError(Problem(f"expected `key: value` lines, got {kind}", file=name, line=line))
    builder = _Builder(name)
    return YamlDocument(builder.build(node, ()), name, builder.lines, builder.texts, builder.problems)


def read_value(text: str) -> tuple[Any, dict[KeyPath, str]]:
    """Reads one YAML value, e.g. of a command line override, and the spellings of its unquoted scalars.

    Raises:
        UserError: it is not YAML.
    """
    try:
        node = yaml.compose(text, Loader=_Loader)
    except yaml.YAMLError as error:
        raise UserError(_explain_yaml_error(error, text, "command line")) from None
    builder = _Builder("command line")
    value = None if node is None else builder.build(node, ())
    if builder.problems:
        raise UserError(*builder.problems)
    return value, builder.texts


def _explain_yaml_error(error: yaml.YAMLError, text: str, name: str) -> Problem:
    mark = getattr(error, "problem_mark", None)
    reason = getattr(error, "problem", None) or getattr(error, "reason", None) or str(error)
    line = mark.line + 1 if mark else None
    lines = text.splitlines()
    hint = f"The line reads: {lines[mark.line].strip()[:100]}" if mark and mark.line < len(lines) else ""
    if "\\t" in reason or (mark and mark.line < len(lines) and "\t" in lines[mark.line][: mark.column + 1]):
        hint += "\n    YAML indents with spaces; this line has a tab."
    return Problem(f"not readable as YAML: {reason}", hint.strip(), file=name, line=line)


class _Builder:
    """Builds data from composed nodes, and collects `lines`, `texts` and `problems` of a `YamlDocument`."""

    def __init__(self, file: str) -> None:
        self.file = file
        self.lines: dict[KeyPath, int] = {}
        self.texts: dict[KeyPath, str] = {}
        self.problems: list[Problem] = []
        self._open: set[int] = set()

    def build(self, node: yaml.Node, path: KeyPath) -> Any:
        if id(node) in self._open:
            self._add_problem(node, path, "an anchor that contains itself")
            return None
        self._open.add(id(node))
        try:
            if not isinstance(node, yaml.ScalarNode) and node.tag not in (_TAG + "map", _TAG + "seq"):
                self._add_problem(node, path, f"the tag {node.tag} is not supported here")
            if isinstance(node, yaml.MappingNode):
                return self._mapping(node, path)
            if isinstance(node, yaml.SequenceNode):
                items = []
                for i, item in enumerate(node.value):
                    self.lines[*path, i] = item.start_mark.line + 1
                    items.append(self.build(item, (*path, i)))
                return items
            assert isinstance(node, yaml.ScalarNode)
            return self._scalar(node, path)
        finally:
            self._open.discard(id(node))

    def _mapping(self, node: yaml.MappingNode, path: KeyPath) -> dict[str, Any]:
        merged: dict[str, Any] = {}
        values: dict[str, Any] = {}
        # Merge keys first: the mapping's own keys win, in whatever order they are written.
        for key_node, value_node in sorted(node.value, key=lambda pair: pair[0].tag != _TAG + "merge"):
            if key_node.tag == _TAG + "merge":
                for source in value_node.value if isinstance(value_node, yaml.SequenceNode) else [value_node]:
                    inherited = self.build(source, path)
                    merged = {**inherited, **merged} if isinstance(inherited, dict) else merged
                continue
            if not isinstance(key_node, yaml.ScalarNode):
                self._add_problem(key_node, path, "a key must be one word, not a list or a mapping")
                continue
            key, line = key_node.value, key_node.start_mark.line + 1
            if key in values:
                message = f"given twice; the first time on line {self.lines[*path, key]}"
                self._add_problem(key_node, (*path, key), message, "Keep one of them.")
            self.lines[*path, key] = line
            values[key] = self.build(value_node, (*path, key))
        return {**merged, **values}

    def _scalar(self, node: yaml.ScalarNode, path: KeyPath) -> Any:
        text, kind = node.value, node.tag.removeprefix(_TAG)
        if node.style is None and kind in ("null", "bool", "int", "float"):
            self.texts[path] = text
        try:
            if kind == "null":
                return None
            if kind == "bool":
                return _BOOLEANS[text]
            if kind == "int":
                return int(text, 0) if text[:2] in ("0o", "0x") else int(text)
            if kind == "float":
                return float(re.sub(r"\.(inf|nan)", r"\1", text.lower()))
        except (KeyError, ValueError):
            self._add_problem(node, path, f"{text!r} is not a {kind}")
            return None
        if kind != "str" and kind != "merge":
            self._add_problem(node, path, f"the tag {node.tag} is not supported here")
        return text

    def _add_problem(self, node: yaml.Node, path: KeyPath, message: str, hint: str = "") -> None:
        key = ".".join(map(str, path)) or None
        self.problems.append(Problem(message, hint, key=key, file=self.file, line=node.start_mark.line + 1))
