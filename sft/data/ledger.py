"""The account of the data: every row that was read is trained or lost, and each loss has a reason and a place.

The shape is SPEC's LEDGER; `rows_read == rows_trained + sum(rows_lost.values())` holds by construction and is checked.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any

import numpy as np

from sft.config.schema import DataKeys
from sft.data.documents import IGNORE_INDEX, Documents
from sft.errors import Problem, UserError

MAX_EXAMPLES = 20  # lost rows named one by one for each reason; the counts are always whole
PERCENTILES = (0, 5, 25, 50, 75, 95, 99, 100)
BARS = 16  # of the histogram of lengths


@dataclass
class Ledger:
    """Counts of one data set, filled row by row."""

    rows_read: int = 0
    rows_trained: int = 0
    rows_lost: Counter[str] = field(default_factory=Counter)
    lost_examples: list[dict[str, Any]] = field(default_factory=list)
    formats: Counter[str] = field(default_factory=Counter)
    tokens: int = 0
    tokens_trained: int = 0
    tokens_truncated: int = 0
    answers_cut: int = 0
    control_tokens: int = 0
    unrolled: int = 0
    thoughts_left_out: int = 0
    texts_left_out: int = 0
    duplicates: int = 0
    in_validation: int = 0
    lengths: Counter[int] = field(default_factory=Counter)
    passes: float | None = None
    packed_rows: int = 0
    packed_capacity: int = 0
    packed_tokens: int = 0

    def lose(self, reason: str, message: str, file: str, line: int) -> None:
        """Counts one row as lost."""
        self.rows_lost[reason] += 1
        if self.rows_lost[reason] <= MAX_EXAMPLES:
            self.lost_examples.append({"reason": reason, "file": file, "line": line, "message": message})

    def keep(self, rows: int, documents: Documents) -> None:
        """Counts rows as trained, and the documents that they became (several where a row was split)."""
        self.rows_trained += rows
        self.tokens += len(documents.input_ids)
        self.tokens_trained += int((documents.labels != IGNORE_INDEX).sum())
        self.lengths.update(_counted(documents.lengths))

    def draw(self, rows: int, lengths: np.ndarray, tokens_trained: int, passes: float) -> None:
        """Notes what a mixture takes of the rows that were kept.

        Args:
            rows: that are in it, each counted once.
            lengths: (N,) tokens of each document in it, those of repeated rows repeated.
            tokens_trained: trained tokens in it.
            passes: how often it goes through the data set.
        """
        if self.rows_trained > rows:
            self.rows_lost["not_drawn"] += self.rows_trained - rows
        self.rows_trained, self.tokens, self.tokens_trained = rows, int(lengths.sum()), tokens_trained
        self.lengths, self.passes = _counted(lengths), passes

    def pack(self, rows: int, capacity: int, tokens: int) -> None:
        """Notes that samples were packed, of this data set and of those that share its rows.

        Args:
            rows: that they were packed into.
            capacity: tokens that all these rows could hold.
            tokens: that they do hold.
        """
        self.packed_rows, self.packed_capacity, self.packed_tokens = rows, capacity, tokens

    def as_json(self) -> dict[str, Any]:
        """SPEC's LEDGER entry L."""
        assert self.rows_read == self.rows_trained + self.rows_lost.total(), "a row is unaccounted for"
        return {
            "rows_read": self.rows_read,
            "rows_trained": self.rows_trained,
            "rows_lost": dict(self.rows_lost.most_common()),
            "lost_examples": self.lost_examples,
            "formats": dict(self.formats.most_common()),
            "tokens": {
                "total": self.tokens,
                "trained": self.tokens_trained,
                "masked": self.tokens - self.tokens_trained,
                "truncated": self.tokens_truncated,
            },
            "answers_cut": self.answers_cut,
            "control_tokens": self.control_tokens,
            "unrolled": self.unrolled,
            "thoughts_left_out": self.thoughts_left_out,
            "texts_left_out": self.texts_left_out,
            "duplicates": self.duplicates,
            "in_validation": self.in_validation,
            "length_percentiles": self._percentiles(),
            "length_histogram": self._histogram(),
            "passes": self.passes,
            "packing": {
                "rows": self.packed_rows,
                "fill": round(self.packed_tokens / self.packed_capacity, 6) if self.packed_capacity else None,
            },
        }

    def _percentiles(self) -> dict[str, int]:
        if not self.lengths:
            return {}
        lengths = np.array(sorted(self.lengths))
        running = np.cumsum([self.lengths[n] for n in lengths.tolist()])
        # The smallest length that at least p per cent of the documents do not exceed.
        places = np.searchsorted(running, -(-np.array(PERCENTILES) * running[-1] // 100))
        return {f"p{p}": int(lengths[at]) for p, at in zip(PERCENTILES, places, strict=True)}

    def _histogram(self) -> list[list[int]]:
        """At most `BARS` equal ranges of lengths: `[from, to, documents]` each, `to` included."""
        if not self.lengths:
            return []
        width = -(-max(self.lengths) // BARS)
        bars: Counter[int] = Counter()
        for length, count in self.lengths.items():
            bars[(length - 1) // width] += count
        return [[bar * width + 1, (bar + 1) * width, bars[bar]] for bar in range(max(bars) + 1)]

    def merge(self, other: Ledger) -> None:
        """Adds another account of the same data set, e.g. another process's."""
        for name in ("lost_examples", "rows_lost", "formats", "lengths"):
            setattr(self, name, getattr(self, name) + getattr(other, name))
        for name in _COUNTS:
            setattr(self, name, getattr(self, name) + getattr(other, name))


_COUNTS = tuple(f.name for f in fields(Ledger) if f.type == "int")


def _counted(lengths: np.ndarray) -> Counter[int]:
    values, counts = np.unique(lengths, return_counts=True)
    return Counter(dict(zip(values.tolist(), counts.tolist(), strict=True)))


def total(ledgers: list[Ledger]) -> Ledger:
    """The sum of several data sets' ledgers."""
    whole = Ledger()
    for one in ledgers:
        whole.merge(one)
    return whole


def as_document(ledgers: Mapping[str, Ledger], evals: Mapping[str, Ledger] | None = None) -> dict[str, Any]:
    """SPEC's LEDGER: the total and each data set under its name.

    Args:
        evals: of the evaluation sets; one that is called as a training set gets `eval_` in front.
    """
    named = dict(ledgers) | {n if n not in ledgers else f"eval_{n}": one for n, one in (evals or {}).items()}
    return {
        "total": total(list(named.values())).as_json(),
        "datasets": {name: ledger.as_json() for name, ledger in named.items()},
    }


def as_state(ledger: Ledger) -> dict[str, Any]:
    """All of it as JSON has it; counters as pairs, for JSON's keys are texts."""
    return {name: [*map(list, v.items())] if isinstance(v, Counter) else v for name, v in vars(ledger).items()}


def from_state(state: dict[str, Any]) -> Ledger:
    """The ledger that `as_state` was given; counts that older checkpoints hold and nothing reads are skipped."""
    ledger = Ledger()
    for name in vars(ledger).keys() & state.keys():
        value = state[name]
        setattr(ledger, name, Counter(dict(value)) if isinstance(getattr(ledger, name), Counter) else value)
    return ledger


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
