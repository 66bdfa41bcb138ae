"""`check`'s report: every mistake of every stage, each stage tried although an earlier one failed."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TypeVar

from sft.errors import Problem, UserError

if TYPE_CHECKING:
    from sft.data.preparation.serving_check import ServingContract

logger = logging.getLogger("sft")
Result = TypeVar("Result")


class Report(logging.Handler):
    """Collects errors and warnings while it is entered; `as_json` is SPEC's shape.

    Attributes:
        data: the ledger, once the data was prepared.
        estimate: the run's arithmetic.
        serving: whether what is trained is what is served.
    """

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.errors: list[Problem] = []
        self.warnings: list[str] = []
        self.data: dict[str, Any] | None = None
        self.estimate: dict[str, Any] | None = None
        self.serving: ServingContract | None = None

    def __enter__(self) -> Report:
        logger.addHandler(self)
        return self

    def __exit__(self, *exc: object) -> None:
        logger.removeHandler(self)

    def emit(self, record: logging.LogRecord) -> None:
        """Notes a warning that a stage logs."""
        self.warnings.append(record.getMessage())

    def attempt(self, action: Callable[[], Result]) -> Result | None:
        """What `action` returns; None when it ends in mistakes, which are noted once."""
        try:
            return action()
        except UserError as error:
            self.errors += [p for p in error.problems if p not in self.errors]
            return None

    def as_json(self) -> dict[str, Any]:
        """The whole report."""
        return {
            "ok": not self.errors,
            "errors": [problem.as_json() for problem in self.errors],
            "warnings": self.warnings,
            "data": self.data,
            "estimate": self.estimate,
            "serving": self.serving.as_json() if self.serving else None,
        }
