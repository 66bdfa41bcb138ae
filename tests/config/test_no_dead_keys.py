"""Every key of ours is read somewhere outside the config stage.

test_schema.py follows the keys of transformers, peft and bitsandbytes to their classes. Code reads a key of ours as an
attribute of a `*Keys` object; this test searches the source for such attributes.
"""

from __future__ import annotations

import ast
import re

import pytest

from sft.config.schema import (
    AdapterKeys,
    Config,
    DataKeys,
    DatasetKeys,
    DistributionKeys,
    LossKeys,
    ModelKeys,
    TrainingKeys,
    WatchKeys,
)
from sft.config.upstream_schema import upstream_defaults
from tests.runs import ROOT

CONFIG_STAGE = [ROOT / "config_manager.py", *(ROOT / "sft" / "config").glob("*.py")]
STAGES = [*ROOT.glob("*.py"), *(ROOT / "commands").glob("*.py"), *(ROOT / "sft").rglob("*.py")]
SOURCES = [path for path in STAGES if path not in CONFIG_STAGE]
# An expression of this kind is a group of keys: an annotation, `config.section(DataKeys)`, `load_config(...)`, an item
# of `keys.datasets`.
GIVES_KEYS = re.compile(r"\b(\w+Keys|Config|load_config|eval_datasets|datasets)\b")
# Replaced by an upstream key in `TrainingKeys.training_arguments`, as test_schema.py asserts.
MAPPED = {"warmup_ratio"}
UPSTREAM = upstream_defaults("TrainingArguments").keys()

OURS = [
    *(
        key
        for group in (ModelKeys, DataKeys, LossKeys, AdapterKeys, DistributionKeys, WatchKeys)
        for key in group.model_fields
    ),
    *(key for key in TrainingKeys.model_fields if key not in UPSTREAM | MAPPED),
    "resume_from_checkpoint",
]


def assigned_pairs(node: ast.Assign) -> list[tuple[str, str]]:
    """Returns each target of an assignment with its value; `a, b = x, y` has two."""
    pairs: list[tuple[ast.expr, ast.expr]] = []
    for target in node.targets:
        if isinstance(target, ast.Tuple) and isinstance(node.value, ast.Tuple):
            pairs += zip(target.elts, node.value.elts, strict=True)
        else:
            pairs.append((target, node.value))
    return [(ast.unparse(target), ast.unparse(value)) for target, value in pairs]


def holders_in(tree: ast.AST) -> set[str]:
    """Returns the names (`keys`, `self._keys`, `entry`) that hold a group of keys somewhere in a module."""
    holders = {
        node.arg
        for node in ast.walk(tree)
        if isinstance(node, ast.arg) and node.annotation and GIVES_KEYS.search(ast.unparse(node.annotation))
    }
    fields = {
        node.target.id
        for node in ast.walk(tree)
        if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name)
        if GIVES_KEYS.search(ast.unparse(node.annotation))
    }
    holders |= fields | {f"self.{name}" for name in fields}
    for node in ast.walk(tree):
        if isinstance(node, ast.Assign):
            for target, value in assigned_pairs(node):
                if value in holders or GIVES_KEYS.search(value):
                    holders.add(target)
        elif isinstance(node, (ast.For, ast.comprehension)):
            owners = {id(part.value) for part in ast.walk(node.iter) if isinstance(part, ast.Attribute)}
            names = {part.id for part in ast.walk(node.iter) if isinstance(part, ast.Name) and id(part) not in owners}
            if names & holders or GIVES_KEYS.search(ast.unparse(node.iter)):
                holders |= {name.id for name in ast.walk(node.target) if isinstance(name, ast.Name)}
    return holders


def keys_read(source: str) -> set[str]:
    """Returns the attributes read from names that hold a group of keys, in one module."""
    tree = ast.parse(source)
    holders = holders_in(tree)
    read: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Load):
            holder = ast.unparse(node.value)
            if holder in holders or ".section(" in holder:
                read.add(node.attr)
        elif isinstance(node, ast.Call) and ast.unparse(node.func) == "getattr" and len(node.args) >= 2:
            holder, key = (ast.unparse(argument) for argument in node.args[:2])
            read |= {key.strip("'")} if holder in holders else set()
    return read


@pytest.fixture(scope="module")
def read_anywhere() -> set[str]:
    assert len(SOURCES) > 10
    return set().union(*(keys_read(path.read_text(encoding="utf-8")) for path in SOURCES))


def test_the_scan_finds_reads_alone():
    source = (
        "def f(keys: DataKeys, text: str):\n"
        "    text.truncation.split()\n"
        "    for one in keys.datasets or ():\n"
        "        print(one.path)\n"
        "    for number, two in enumerate(keys.datasets):\n"
        "        print(two.split)\n"
        "    rest = config.section(ModelKeys)\n"
        "    self.kept = keys\n"
        "    print(self.kept.columns, self.format)\n"
        "    return rest.dtype, keys.packing, 'keys.dedupe'\n"
    )
    assert keys_read(source) == {"datasets", "path", "split", "dtype", "packing", "columns"}


@pytest.mark.parametrize("key", OURS)
def test_a_key_of_ours_is_read(read_anywhere, key):
    assert key in Config.model_fields
    assert key in read_anywhere


@pytest.mark.parametrize("key", list(DatasetKeys.model_fields))
def test_a_key_of_a_data_set_is_read(read_anywhere, key):
    assert key in read_anywhere
