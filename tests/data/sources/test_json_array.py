"""A JSON array read through a window gives the values, and the errors, of the array read at once."""

from __future__ import annotations

import io
import json
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from sft.data.sources.json_array import array_values
from tests.data.sources.samples import any_json


def through_a_window(text: str, size: int) -> Any:
    """Returns the values, or the message, line and column of the error."""
    try:
        return repr([value for value, _ in array_values(io.StringIO(text, newline=""), size)])
    except json.JSONDecodeError as error:
        return error.msg, error.lineno, error.colno


def at_once(text: str) -> Any:
    try:
        return repr(json.loads(text))
    except json.JSONDecodeError as error:
        return error.msg, error.lineno, error.colno


@given(
    st.lists(any_json, max_size=5),
    st.sampled_from([None, 1]),
    st.booleans(),
    st.integers(1, 40),
    st.sampled_from(["", " ", "\n\r\n "]),
)
@example([1234567890], None, True, 3, "")
def test_the_values_of_an_array(rows, indent, ascii, size, around):
    text = around + json.dumps(rows, indent=indent, ensure_ascii=ascii) + around
    assert through_a_window(text, size) == repr(json.loads(text))


@given(st.lists(any_json, min_size=1, max_size=4), st.data(), st.integers(1, 40), st.sampled_from([None, 1]))
def test_an_array_that_is_broken_gives_the_same_error_at_the_same_place(rows, data, size, indent):
    text = json.dumps(rows, indent=indent)
    at = data.draw(st.integers(1, len(text)))
    broken = text[:at] + data.draw(st.sampled_from(["", "]", "x", ",", "\n", '"', "}", "\\"])) + text[at:]
    cut = broken[: data.draw(st.integers(at, len(broken)))]
    assert through_a_window(cut, size) == at_once(cut)


def test_an_early_error_in_a_large_array_is_found_without_reading_the_rest():
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
def test_a_duplicate_key_loses_only_its_value_wherever_the_window_ends(size):
    text = '[{"a": 1}, {"b": {"c": 1, "c": 2}, "d": [3, "long enough"]}, {"a": 2}]'
    found = list(array_values(io.StringIO(text), size))
    assert [value for value, _ in found if isinstance(value, dict) and "a" in value] == [{"a": 1}, {"a": 2}]
    assert [str(duplicate) for _, duplicate in found] == ["None", "the key 'c' appears twice in one object", "None"]
