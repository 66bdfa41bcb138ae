"""Whether enough is left of the data: too many rows lost to mistakes in it stop a run, and say which they were."""

from __future__ import annotations

from typing import Any

from sft.errors import Problem, UserError
from sft.schema import DataKeys

_ASKED_FOR = ("duplicate", "in_validation", "not_drawn")  # rows that the config leaves out
_EXAMPLES = 5  # lost rows that are named


def require_enough_rows(keys: DataKeys, document: dict[str, Any]) -> None:
    """Judges each data set of a ledger.

    Args:
        keys: their `max_lost_fraction` is the share of its rows that a data set may lose to mistakes.
        document: SPEC's LEDGER.

    Raises:
        UserError: nothing is left to train, or too much was lost on the way.
    """
    for name, ledger in document["datasets"].items():
        if not ledger["rows_read"]:
            hint = "validation_split holds rows out of a data set of two rows and more"
            raise UserError(Problem(f"{name!r} has no rows", hint, "validation_split"))
        lost = sum(count for reason, count in ledger["rows_lost"].items() if reason not in _ASKED_FOR)
        fraction = lost / ledger["rows_read"]
        if ledger["rows_trained"] and fraction <= keys.max_lost_fraction:
            continue
        reasons = ", ".join(f"{n} {reason}" for reason, n in ledger["rows_lost"].items())
        summary = f"{lost} of {ledger['rows_read']} rows of {name!r} are lost ({reasons})"
        if ledger["rows_trained"]:
            summary += f": {fraction:.1%}, max_lost_fraction is {keys.max_lost_fraction:.1%}"
        examples = [
            Problem(f"{e['reason']}: {e['message']}", file=e["file"], line=e["line"])
            for e in ledger["lost_examples"][:_EXAMPLES]
        ]
        hint = "mend the rows below; or raise max_lost_fraction if you can do without them"
        raise UserError(Problem(summary, hint, "max_lost_fraction"), *examples)
