"""The account of the data: every row that was read is trained or lost, and each loss has a reason and a place.

The shape is SPEC's LEDGER; `rows_read == rows_trained + sum(rows_lost.values())` holds by construction and is checked.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from sft.encoding import IGNORE_INDEX, Encoded

MAX_EXAMPLES = 20  # lost rows named one by one for each reason; the counts are always whole
PERCENTILES = (0, 5, 25, 50, 75, 95, 99, 100)


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
    seam_merges: int = 0
    control_tokens: int = 0
    duplicates: int = 0
    in_validation: int = 0
    lengths: list[int] = field(default_factory=list)
    packed_rows: int = 0
    packed_capacity: int = 0

    def lose(self, reason: str, message: str, file: str, line: int) -> None:
        """Counts one row as lost."""
        self.rows_lost[reason] += 1
        if self.rows_lost[reason] <= MAX_EXAMPLES:
            self.lost_examples.append({"reason": reason, "file": file, "line": line, "message": message})

    def keep(self, samples: list[Encoded]) -> None:
        """Counts one row as trained, in the one or (when it was split) several samples it became."""
        self.rows_trained += 1
        for sample in samples:
            self.tokens += len(sample.input_ids)
            self.tokens_trained += int((sample.labels != IGNORE_INDEX).sum())
            self.lengths.append(len(sample.input_ids))

    def pack(self, rows: int, capacity: int) -> None:
        """Notes that the samples were packed into `rows` rows of `capacity` tokens."""
        self.packed_rows, self.packed_capacity = rows, rows * capacity

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
            "seam_merges": self.seam_merges,
            "control_tokens": self.control_tokens,
            "duplicates": self.duplicates,
            "in_validation": self.in_validation,
            "length_percentiles": self._percentiles(),
            "packing": {
                "rows": self.packed_rows,
                "fill": round(self.tokens / self.packed_capacity, 6) if self.packed_capacity else None,
            },
        }

    def _percentiles(self) -> dict[str, int]:
        if not self.lengths:
            return {}
        values = np.percentile(self.lengths, PERCENTILES, method="inverted_cdf")
        return {f"p{p}": int(v) for p, v in zip(PERCENTILES, values, strict=True)}


def total(ledgers: list[Ledger]) -> Ledger:
    """The sum of several data sets' ledgers."""
    whole = Ledger()
    for one in ledgers:
        for name in vars(one):
            setattr(whole, name, getattr(whole, name) + getattr(one, name))
    return whole


def as_document(ledgers: dict[str, Ledger]) -> dict[str, Any]:
    """SPEC's LEDGER: the total and each data set under its name."""
    return {
        "total": total(list(ledgers.values())).as_json(),
        "datasets": {name: ledger.as_json() for name, ledger in ledgers.items()},
    }
