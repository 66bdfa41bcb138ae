"""The user's mistakes as data: what is wrong, where, and what to do about it.

A stage raises `UserError`; `sft_main` prints it without a traceback and exits with its exit code.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True)
class Problem:
    """One mistake of the user.

    Attributes:
        message: what is wrong, with the value received.
        hint: what to do.
        key: the config key as the user typed it, e.g. `lora_config.rank`.
        file: that holds the mistake: a YAML file, a data file, or `command line`.
        line: the line in `file`, counted from 1.
    """

    message: str
    hint: str = ""
    key: str | None = None
    file: str | None = None
    line: int | None = None

    def where(self) -> str:
        """Returns `file:line: key`, or the parts of it that are known."""
        place = self.file or ""
        if place and self.line is not None:
            place += f":{self.line}"
        return ": ".join(part for part in (place, self.key) if part)

    def as_json(self) -> dict[str, Any]:
        """Returns the fields that are known, as `check --json` prints them."""
        return {name: value for name, value in asdict(self).items() if value not in (None, "")}

    def __str__(self) -> str:
        text = ": ".join(part for part in (self.where(), self.message) if part)
        return f"{text}\n    {self.hint}" if self.hint else text


class UserError(Exception):
    """Reports a wrong config or wrong data: all `problems` at once, exit code 2."""

    exit_code = 2

    def __init__(self, *problems: Problem | str) -> None:
        self.problems = tuple(p if isinstance(p, Problem) else Problem(p) for p in problems)
        super().__init__("\n".join(str(p) for p in self.problems))


class TrainingStopped(UserError):
    """Reports training that was stopped before it did damage, e.g. at a loss that is not finite: exit code 3."""

    exit_code = 3


class RankStopped(TrainingStopped):
    """Reports that only this rank was stopped: the others do not know, and wait for it in their next collective."""


def first_line(error: BaseException) -> str:
    """Returns the first line of an error's message, or the name of its class where it has none."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
