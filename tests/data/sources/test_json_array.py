"""A JSON array read through a window gives the values, and the errors, that it gives when it is read whole."""

from __future__ import annotations

import io
import json
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from sft.data.json_values import DuplicateKey, loads
from sft.data.sources import json_array
from sft.data.sources.json_array import array_values

values = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=8), st.just('🎉\\"\n')),
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(st.text(max_size=3), inner, max_size=3)),
    max_leaves=8,
)


def through_a_window(text: str, size: int) -> Any:
    """The values, or the message, line and column of the error."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(json_array, "_WINDOW", size)
        try:
            return repr([value for value, _ in array_values(io.StringIO(text, newline=""))])
        except json.JSONDecodeError as error:
            return error.msg, error.lineno, error.colno


def as_a_whole(text: str) -> Any:
    try:
        return repr(json.loads(text))
    except json.JSONDecodeError as error:
        return error.msg, error.lineno, error.colno


@given(
    st.lists(values, max_size=5),
    st.sampled_from([None, 1]),
    st.booleans(),
    st.integers(1, 40),
    st.sampled_from(["", " ", "\n\r\n "]),
)
@example([1234567890], None, True, 3, "")
def test_the_values_of_an_array(rows, indent, ascii, size, around):
    text = around + json.dumps(rows, indent=indent, ensure_ascii=ascii) + around
    assert through_a_window(text, size) == repr(json.loads(text))


@given(st.lists(values, min_size=1, max_size=4), st.data(), st.integers(1, 40), st.sampled_from([None, 1]))
def test_an_array_that_is_broken_gives_the_same_error_at_the_same_place(rows, data, size, indent):
    text = json.dumps(rows, indent=indent)
    at = data.draw(st.integers(1, len(text)))
    broken = text[:at] + data.draw(st.sampled_from(["", "]", "x", ",", "\n", '"', "}", "\\"])) + text[at:]
    cut = broken[: data.draw(st.integers(at, len(broken)))]
    assert through_a_window(cut, size) == as_a_whole(cut)


def test_an_error_early_in_a_large_array_is_found_without_reading_on():
    class Endless(io.StringIO):
        taken = 0

        def read(self, size: int | None = -1) -> str:
            self.taken += 1
            assert self.taken < 10
            return super().read(size)

    text = '[{"a": 1}, {"a" 2}, ' + '{"a": 3}, ' * 1_000_000
    found = array_values(Endless(text))
    assert next(found) == ({"a": 1}, None)
    with pytest.raises(json.JSONDecodeError, match="Expecting ':' delimiter: line 1 column 17"):
        next(found)


@pytest.mark.parametrize("size", range(1, 60))
def test_a_key_that_stands_twice_costs_its_value_alone_wherever_the_window_ends(size, monkeypatch):
    monkeypatch.setattr(json_array, "_WINDOW", size)
    text = '[{"a": 1}, {"b": {"c": 1, "c": 2}, "d": [3, "long enough"]}, {"a": 2}]'
    found = list(array_values(io.StringIO(text)))
    assert [value for value, _ in found if isinstance(value, dict) and "a" in value] == [{"a": 1}, {"a": 2}]
    assert [str(twice) for _, twice in found] == ["None", "the key 'c' stands twice in one object", "None"]


@given(values)
def test_strict_json_reads_what_json_does(value):
    assert repr(loads(json.dumps(value))) == repr(json.loads(json.dumps(value)))
    assert repr(loads(f" {json.dumps(value)}\n ")) == repr(json.loads(json.dumps(value)))


@pytest.mark.parametrize("text", ["", " ", "{", "nul", '{"a": 1} x', "1 2", "[1,]", "'a'"])
def test_strict_json_fails_as_json_does(text):
    with pytest.raises(json.JSONDecodeError) as ours:
        loads(text)
    with pytest.raises(json.JSONDecodeError) as theirs:
        json.loads(text)
    assert str(ours.value) == str(theirs.value)


def test_a_key_that_stands_twice_is_named():
    with pytest.raises(DuplicateKey, match=r"^the key 'b' stands twice in one object$"):
        loads('{"a": {"b": 1, "c": 2, "b": 1}}')
    assert loads('[{"a": 1}, {"a": 2}]') == [{"a": 1}, {"a": 2}]
