"""`check`'s report: the errors and warnings of every stage, each of which runs although an earlier one failed."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any, TypeVar

from sft.errors import Problem, UserError

logger = logging.getLogger("sft")
Result = TypeVar("Result")


class Report(logging.Handler):
    """Collects errors, and inside its `with` block every warning that is logged.

    Attributes:
        data: the ledger; None until the data is prepared.
        estimate: batches and steps of the run, and its memory once the model is traced.
        serving: whether the prompts are those that a server sends, as JSON; `serving_message` is the same in one line.
    """

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.errors: list[Problem] = []
        self.warnings: list[str] = []
        self.data: dict[str, Any] | None = None
        self.estimate: dict[str, Any] | None = None
        self.serving: dict[str, Any] | None = None
        self.serving_message = ""

    def __enter__(self) -> Report:
        logger.addHandler(self)
        return self

    def __exit__(self, *exc: object) -> None:
        logger.removeHandler(self)

    def emit(self, record: logging.LogRecord) -> None:
        """Keeps the text of a logged warning."""
        self.warnings.append(record.getMessage())

    def attempt(self, action: Callable[[], Result]) -> Result | None:
        """Returns what `action` returns; None when it raises a `UserError`, whose problems are noted once each."""
        try:
            return action()
        except UserError as error:
            self.errors += [p for p in error.problems if p not in self.errors]
            return None

    def as_json(self) -> dict[str, Any]:
        """Returns the whole report, in the shape of `check --json`."""
        return {
            "ok": not self.errors,
            "errors": [problem.as_json() for problem in self.errors],
            "warnings": self.warnings,
            "data": self.data,
            "estimate": self.estimate,
            "serving": self.serving,
        }
