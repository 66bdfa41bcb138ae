"""JSON is read as Python reads it, except that a duplicate key is an error."""

from __future__ import annotations

import json

import pytest
from hypothesis import given

from sft.data.json_values import DuplicateKey, loads
from tests.data.sources.samples import any_json


@given(any_json)
def test_loads_gives_what_json_loads_gives(value):
    assert repr(loads(json.dumps(value))) == repr(json.loads(json.dumps(value)))
    assert repr(loads(f" {json.dumps(value)}\n ")) == repr(json.loads(json.dumps(value)))


@pytest.mark.parametrize("text", ["", " ", "{", "nul", '{"a": 1} x', "1 2", "[1,]", "'a'"])
def test_loads_fails_as_json_loads_does(text):
    with pytest.raises(json.JSONDecodeError) as ours:
        loads(text)
    with pytest.raises(json.JSONDecodeError) as theirs:
        json.loads(text)
    assert str(ours.value) == str(theirs.value)


def test_a_duplicate_key_is_named():
    with pytest.raises(DuplicateKey, match=r"^the key 'b' appears twice in one object$"):
        loads('{"a": {"b": 1, "c": 2, "b": 1}}')
    assert loads('[{"a": 1}, {"a": 2}]') == [{"a": 1}, {"a": 2}]
