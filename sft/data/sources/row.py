"""The row that all readers yield, and the types that they share."""

from __future__ import annotations

from collections.abc import Callable, Generator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sft.errors import Problem, UserError


@dataclass(slots=True)
class Row:
    """One row of a source. Not frozen: that makes each row four times as slow to create.

    Attributes:
        file: the path or hub name, as the user wrote it.
        index: position in the source, counted from 0 over all of its files.
        line: line in the file counted from 1; in formats without lines (JSON array, Parquet) the row, from 1.
        data: the row's keys and values, or None when it could not be read.
        lost: `(reason, message)` when it could not be read.
    """

    file: str
    index: int
    line: int
    data: dict[str, Any] | None
    lost: tuple[str, str] | None = None


Wanted = Callable[[int], bool] | None
"""Tells from a row's index whether it is wanted; None wants all."""
Rows = Generator[Row, None, int]
"""Yields the wanted rows and returns the number of all rows, wanted or not."""
Parsed = tuple[dict[str, Any] | None, tuple[str, str] | None]
"""A row's `data` and `lost`."""


def require_distinct(columns: list[str], file: Path, line: int | None = None) -> None:
    """Raises `UserError` when two columns of a table have the same name: a row could hold only one of them."""
    duplicate = next((name for name in columns if columns.count(name) > 1), None)
    if duplicate is not None:
        raise UserError(Problem(f"two columns are called {duplicate!r}", file=str(file), line=line))
