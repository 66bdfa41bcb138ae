"""Whether enough is left of the data: too many rows lost to mistakes in it stop a run, and say which they were."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from sft.config.schema import DataKeys
from sft.errors import Problem, UserError

_ASKED_FOR = ("duplicate", "in_validation", "not_drawn")  # rows that the config leaves out
_EXAMPLES = 5  # lost rows that are named
_REMEDIES = {
    "bad_schema": "where your columns are called otherwise than the README's, name them with `columns:`",
    "bad_json": "write one JSON object a line, or one array of objects in a .json file",
    "bad_encoding": "convert the files to UTF-8",
    "too_long": "raise `max_seq_length`, or let `truncation` cut or split what is longer",
    "empty_answer": "give each row an answer; if it stands in another column, name that with `columns: {answer: ...}`",
    "no_trained_token": "give each row an answer that is trained: see `train_on`, and `weight` and `train` of messages",
    "template_mismatch": "set a `chat_template` that renders such conversations",
    "in_validation": "give other rows to train or to evaluate on: they are the same",
}
"""What to do where no row is left: rather than each row, the way in which all of them are read may be wrong."""


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
        summary = f"{lost} of {ledger['rows_read']} rows of {name!r} are lost ({as_counts(ledger['rows_lost'])})"
        if ledger["rows_trained"]:
            summary += f": {fraction:.1%}, max_lost_fraction is {keys.max_lost_fraction:.1%}"
        examples = [
            Problem(f"{e['reason']}: {e['message']}", file=e["file"], line=e["line"])
            for e in ledger["lost_examples"][:_EXAMPLES]
        ]
        if not ledger["rows_trained"]:
            raise UserError(Problem(summary, remedy(ledger["rows_lost"])), *examples)
        hint = "mend the rows below; or raise max_lost_fraction if you can do without them"
        raise UserError(Problem(summary, hint, "max_lost_fraction"), *examples)


def as_counts(rows_lost: Mapping[str, int]) -> str:
    """`20 bad_json, 3 bad_schema`, in the order given."""
    return ", ".join(f"{count} {reason}" for reason, count in rows_lost.items())


def remedy(rows_lost: Mapping[str, int]) -> str:
    """What to do where no row is left: about the reason that cost the most."""
    most = max(rows_lost, key=lambda reason: rows_lost[reason], default="")
    return _REMEDIES.get(most, "")
