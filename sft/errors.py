"""Mistakes of the user's, as data: what is wrong, where, and what to do about it.

A stage raises `UserError`; `sft_main` prints it and ends with its exit code. It is never a traceback.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True)
class Problem:
    """One thing that is wrong.

    Attributes:
        message: what is wrong, with the value received.
        hint: what to do.
        key: the config key as the user typed it, e.g. `lora_config.rank`.
        file: where the mistake stands: a YAML file, a data file, or `command line`.
        line: the line in `file`, counted from 1.
    """

    message: str
    hint: str = ""
    key: str | None = None
    file: str | None = None
    line: int | None = None

    def where(self) -> str:
        """`file:line: key`, as much of it as is known."""
        place = self.file or ""
        if place and self.line is not None:
            place += f":{self.line}"
        return ": ".join(part for part in (place, self.key) if part)

    def as_json(self) -> dict[str, Any]:
        """The shape that `check --json` prints: no field that is unknown."""
        return {name: value for name, value in asdict(self).items() if value not in (None, "")}

    def __str__(self) -> str:
        text = ": ".join(part for part in (self.where(), self.message) if part)
        return f"{text}\n    {self.hint}" if self.hint else text


class UserError(Exception):
    """The config or the data is wrong: all `problems` at once, exit code 2."""

    exit_code = 2

    def __init__(self, *problems: Problem | str) -> None:
        self.problems = tuple(p if isinstance(p, Problem) else Problem(p) for p in problems)
        super().__init__("\n".join(str(p) for p in self.problems))


class TrainingStopped(UserError):
    """Training went wrong and was stopped before it did damage (a loss that is not finite, say), exit code 3."""

    exit_code = 3


class RankStopped(TrainingStopped):
    """This rank was stopped alone: the others do not know, and wait for it in their next collective."""


def first_line(error: BaseException) -> str:
    """Returns the first line of an error's message, or the name of its class where it has none."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
