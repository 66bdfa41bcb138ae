"""The base of every group of config keys: strict, immutable, and knows where each key was written."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

from pydantic import BaseModel, ConfigDict, PrivateAttr

from sft.errors import Problem, UserError

Place = tuple[str, int | None]
"""A file (or `command line`) and the line in it, counted from 1."""


def enclosing_keys(key: str) -> Iterator[str]:
    """Yields a dotted key and those around it: `a.b.c`, `a.b`, `a`."""
    while key:
        yield key
        key = key.rpartition(".")[0]


class ConfigSection(BaseModel):
    """A group of config keys. Unknown keys are refused, and values are not converted silently."""

    model_config = ConfigDict(
        extra="forbid", frozen=True, protected_namespaces=(), use_attribute_docstrings=True, allow_inf_nan=False
    )

    _places: Mapping[str, Place] = PrivateAttr(default_factory=dict)
    _section: str = PrivateAttr(default="")

    def locate(self, places: Mapping[str, Place], section: str = "") -> None:
        """Stores where every key was written, here and in nested sections.

        Args:
            places: file and line by dotted key of the whole config.
            section: the dotted key of this section with a dot at its end, e.g. `datasets.0.`.
        """
        self._places, self._section = places, section
        for name, value in self:
            for suffix, item in enumerate(value) if isinstance(value, list) else [("", value)]:
                if isinstance(item, ConfigSection):
                    item.locate(places, f"{section}{name}.{suffix}." if suffix != "" else f"{section}{name}.")

    def __eq__(self, other: object) -> bool:
        """Compares the values alone, not where they were written."""
        return type(self) is type(other) and self.__dict__ == getattr(other, "__dict__", None)

    __hash__ = None  # type: ignore[assignment]

    def is_set(self, key: str) -> bool:
        """Tells whether the user gave `key`, in the file or on the command line."""
        return key in self.model_fields_set

    def place(self, key: str) -> Place | tuple[None, None]:
        """Returns where `key` (dotted, e.g. `datasets.0.path`) or the nearest section around it was written."""
        keys = enclosing_keys(self._section + key)
        return next((self._places[near] for near in keys if near in self._places), (None, None))

    def problem(self, key: str, message: str, hint: str = "") -> Problem:
        """Makes the `Problem` of a mistake in `key`, with the file and line where the user wrote it."""
        file, line = self.place(key)
        return Problem(message, hint, key=self._section + key, file=file, line=line)


@contextmanager
def located(keys: ConfigSection) -> Iterator[None]:
    """Adds to each `UserError` raised inside the file and line where the user wrote its key."""
    try:
        yield
    except UserError as error:
        problems = []
        for problem in error.problems:
            if problem.key is not None and problem.file is None:
                file, line = keys.place(problem.key)
                problem = dataclasses.replace(problem, file=file, line=line)
            problems.append(problem)
        raise UserError(*problems) from error.__cause__
