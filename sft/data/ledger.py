"""Accounts for every row: it is trained or lost, and each lost row has a reason and a place.

`rows_read == rows_trained + sum(rows_lost.values())` holds by construction and is checked. `as_document` gives the
ledger document of `check --json` and `data_report.json`; `require_enough_rows` rejects one with too many lost rows.
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

MAX_EXAMPLES = 20  # lost rows kept as examples for each reason; the counts are complete
PERCENTILES = (0, 5, 25, 50, 75, 95, 99, 100)
BARS = 16  # of the histogram of lengths
_REPORTED_EXAMPLES = 5  # lost rows that an error lists
_REQUESTED = ("duplicate", "in_validation", "not_drawn")  # rows that the config itself excludes
_REMEDIES = {
    "bad_schema": "if your columns have other names than the README's, name them with `columns:`",
    "bad_json": "write one JSON object per line, or one array of objects in a .json file",
    "bad_encoding": "convert the files to UTF-8",
    "too_long": "raise `max_seq_length`, or let `truncation` cut or split what is longer",
    "empty_answer": "give each row an answer; if it is in another column, name that with `columns: {answer: ...}`",
    "no_trained_token": "give each row an answer that is trained: see `train_on`, and `weight` and `train` of messages",
    "template_mismatch": "set a `chat_template` that renders such conversations",
    "in_validation": "train or evaluate on other rows: they are the same",
}
"""What to do when no row is left: then the way in which all rows are read is more likely wrong than each row."""


@dataclass
class Ledger:
    """The counts of one data set."""

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
        """Counts rows as trained, and the documents made from them (several for a row that was split)."""
        self.rows_trained += rows
        self.tokens += len(documents.input_ids)
        self.tokens_trained += int((documents.labels != IGNORE_INDEX).sum())
        self.lengths.update(_count_values(documents.lengths))

    def draw(self, rows: int, lengths: np.ndarray, tokens_trained: int, passes: float) -> None:
        """Replaces the counts of kept rows by those of the mixture that was drawn from them.

        Args:
            rows: rows in the mixture, each counted once.
            lengths: (N,) tokens of each document in the mixture; repeated rows repeat.
            tokens_trained: supervised tokens in the mixture.
            passes: how often the mixture repeats the data set.
        """
        if self.rows_trained > rows:
            self.rows_lost["not_drawn"] += self.rows_trained - rows
        self.rows_trained, self.tokens, self.tokens_trained = rows, int(lengths.sum()), tokens_trained
        self.lengths, self.passes = _count_values(lengths), passes

    def pack(self, rows: int, capacity: int, tokens: int) -> None:
        """Records the packed rows of all data sets that share them, and how many tokens they could hold and do hold."""
        self.packed_rows, self.packed_capacity, self.packed_tokens = rows, capacity, tokens

    def as_json(self) -> dict[str, Any]:
        """Returns the counts as one entry of the ledger document."""
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
            "length_percentiles": self._length_percentiles(),
            "length_histogram": self._length_histogram(),
            "passes": self.passes,
            "packing": {
                "rows": self.packed_rows,
                "fill": round(self.packed_tokens / self.packed_capacity, 6) if self.packed_capacity else None,
            },
        }

    def _length_percentiles(self) -> dict[str, int]:
        if not self.lengths:
            return {}
        lengths = np.array(sorted(self.lengths))
        running = np.cumsum([self.lengths[n] for n in lengths.tolist()])
        # The smallest length that at least p percent of the documents do not exceed.
        places = np.searchsorted(running, -(-np.array(PERCENTILES) * running[-1] // 100))
        return {f"p{p}": int(lengths[at]) for p, at in zip(PERCENTILES, places, strict=True)}

    def _length_histogram(self) -> list[list[int]]:
        """Counts documents in at most `BARS` equal ranges of lengths: `[from, to, documents]` each, `to` included."""
        if not self.lengths:
            return []
        width = -(-max(self.lengths) // BARS)
        bars: Counter[int] = Counter()
        for length, count in self.lengths.items():
            bars[(length - 1) // width] += count
        return [[bar * width + 1, (bar + 1) * width, bars[bar]] for bar in range(max(bars) + 1)]

    def merge(self, other: Ledger) -> None:
        """Adds another ledger of the same data set, e.g. another process's."""
        for name in ("lost_examples", "rows_lost", "formats", "lengths", *_COUNTS):
            setattr(self, name, getattr(self, name) + getattr(other, name))


_COUNTS = tuple(f.name for f in fields(Ledger) if f.type == "int")


def _count_values(lengths: np.ndarray) -> Counter[int]:
    values, counts = np.unique(lengths, return_counts=True)
    return Counter(dict(zip(values.tolist(), counts.tolist(), strict=True)))


def total(ledgers: list[Ledger]) -> Ledger:
    """Sums the ledgers of several data sets."""
    result = Ledger()
    for ledger in ledgers:
        result.merge(ledger)
    return result


def as_document(ledgers: Mapping[str, Ledger], evals: Mapping[str, Ledger] | None = None) -> dict[str, Any]:
    """Builds the ledger document: the total, and each data set under its name.

    Args:
        evals: ledgers of the evaluation sets; a name that a training set has too gets the prefix `eval_`.
    """
    named = dict(ledgers) | {n if n not in ledgers else f"eval_{n}": one for n, one in (evals or {}).items()}
    return {
        "total": total(list(named.values())).as_json(),
        "datasets": {name: ledger.as_json() for name, ledger in named.items()},
    }


def as_state(ledger: Ledger) -> dict[str, Any]:
    """Returns all counts as JSON values; counters as lists of pairs, because JSON's keys are strings."""
    return {name: [*map(list, v.items())] if isinstance(v, Counter) else v for name, v in vars(ledger).items()}


def from_state(state: dict[str, Any]) -> Ledger:
    """The ledger that `as_state` was given; counts that older checkpoints hold and nothing reads are skipped."""
    ledger = Ledger()
    for name in vars(ledger).keys() & state.keys():
        value = state[name]
        setattr(ledger, name, Counter(dict(value)) if isinstance(getattr(ledger, name), Counter) else value)
    return ledger


def require_enough_rows(keys: DataKeys, document: dict[str, Any]) -> None:
    """Checks each data set of a ledger document against `keys.max_lost_fraction`.

    Raises:
        UserError: a data set has no row left to train, or lost too many.
    """
    for name, ledger in document["datasets"].items():
        if not ledger["rows_read"]:
            hint = "validation_split needs a data set of at least two rows"
            raise UserError(Problem(f"{name!r} has no rows", hint, "validation_split"))
        lost = sum(count for reason, count in ledger["rows_lost"].items() if reason not in _REQUESTED)
        fraction = lost / ledger["rows_read"]
        if ledger["rows_trained"] and fraction <= keys.max_lost_fraction:
            continue
        summary = f"{lost} of {ledger['rows_read']} rows of {name!r} are lost ({as_counts(ledger['rows_lost'])})"
        examples = [
            Problem(f"{e['reason']}: {e['message']}", file=e["file"], line=e["line"])
            for e in ledger["lost_examples"][:_REPORTED_EXAMPLES]
        ]
        if not ledger["rows_trained"]:
            raise UserError(Problem(summary, remedy(ledger["rows_lost"])), *examples)
        summary += f": {fraction:.1%}, max_lost_fraction is {keys.max_lost_fraction:.1%}"
        hint = "fix the rows below, or raise max_lost_fraction to train without them"
        raise UserError(Problem(summary, hint, "max_lost_fraction"), *examples)


def as_counts(rows_lost: Mapping[str, int]) -> str:
    """Writes `20 bad_json, 3 bad_schema`, in the order given."""
    return ", ".join(f"{count} {reason}" for reason, count in rows_lost.items())


def remedy(rows_lost: Mapping[str, int]) -> str:
    """Says what to do when no row is left, about the most frequent reason."""
    most_frequent = max(rows_lost, key=lambda reason: rows_lost[reason], default="")
    return _REMEDIES.get(most_frequent, "")
