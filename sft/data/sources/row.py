"""A row on its way from a file to its normal form, and the contract of whatever reads rows."""

from __future__ import annotations

from collections.abc import Callable, Generator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sft.errors import Problem, UserError


@dataclass(slots=True)
class Row:
    """One row of a source. (Not frozen: that would cost four times as much, for each row of each file.)

    Attributes:
        file: the path (or hub name) as the user would recognise it.
        index: position in the source, counted from 0 over all of its files.
        line: line in the file counted from 1; for formats without lines (a JSON array, Parquet) the row, from 1.
        data: the row's mapping, or None when it could not be read.
        lost: `(reason, message)` when it could not be read.
    """

    file: str
    index: int
    line: int
    data: dict[str, Any] | None
    lost: tuple[str, str] | None = None


Wanted = Callable[[int], bool] | None
"""Tells by its index whether a row is wanted; None wants all."""
Rows = Generator[Row, None, int]
"""Rows; what it returns is the number of rows counted, wanted or not."""
Parsed = tuple[dict[str, Any] | None, tuple[str, str] | None]
"""A row's mapping or None, and `(reason, message)` where it is None."""


def require_distinct(columns: list[str], file: Path, line: int | None = None) -> None:
    """Raises `UserError` when two columns of a table have one name: a row could hold only one of them."""
    twice = next((name for name in columns if columns.count(name) > 1), None)
    if twice is not None:
        raise UserError(Problem(f"two columns are called {twice!r}", file=str(file), line=line))
