"""Cuts, splits or drops samples longer than `max_seq_length`; answers that lose their end are always counted."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from sft.data.documents import IGNORE_INDEX
from sft.data.encoding.encoder import Encoded
from sft.data.formats.conversation import RowLost


@dataclass(frozen=True, slots=True)
class Fitted:
    """The samples that one sample became, none longer than the limit, and what was lost.

    Attributes:
        samples: one; several after a split.
        truncated: tokens that are in no sample.
        answers_cut: answers that lost their end token, or its label.
    """

    samples: list[Encoded]
    truncated: int = 0
    answers_cut: int = 0


def fit(sample: Encoded, max_seq_length: int, policy: str) -> Fitted:
    """Shortens `sample` to at most `max_seq_length` tokens.

    Args:
        sample: input_ids and labels of shape (T,).
        max_seq_length: the limit, in tokens.
        policy: `drop` loses the row, `error` too (the caller turns it into an error), `left` keeps the last tokens,
            `right` the first, `split` makes consecutive windows.

    Raises:
        RowLost: `too_long`, or `no_trained_token` if no kept token is supervised.
    """
    length = len(sample.input_ids)
    if length <= max_seq_length:
        _require_trained(sample)
        return Fitted([sample])
    if policy in ("drop", "error"):
        raise RowLost("too_long", f"{length} tokens, max_seq_length is {max_seq_length}")
    if policy == "left":
        kept = _window(sample, length - max_seq_length, length)
        _require_trained(kept)
        return Fitted([kept], truncated=length - max_seq_length)
    if policy == "right":
        kept = _window(sample, 0, max_seq_length)
        _require_trained(kept)
        return Fitted([kept], length - max_seq_length, _answers_cut(sample, max_seq_length))
    windows = [_window(sample, at, min(at + max_seq_length, length)) for at in range(0, length, max_seq_length)]
    kept_windows = [w for w in windows if (w.labels != IGNORE_INDEX).any()]
    if not kept_windows:
        raise RowLost("no_trained_token", "no window of the split row has a supervised token")
    truncated = length - sum(len(w.input_ids) for w in kept_windows)
    # An end token that comes first in its window loses its label: nothing predicts it there.
    is_end = (sample.labels != IGNORE_INDEX) & (np.append(sample.labels[1:], IGNORE_INDEX) == IGNORE_INDEX)
    return Fitted(kept_windows, truncated, int(is_end[::max_seq_length].sum()))


def _window(sample: Encoded, start: int, end: int) -> Encoded:
    labels = sample.labels[start:end].copy()
    labels[:1] = IGNORE_INDEX  # nothing predicts a window's first token
    return Encoded(sample.input_ids[start:end], labels)


def _answers_cut(sample: Encoded, cut: int) -> int:
    """Returns 1 if `cut` is inside an answer, which then misses its end."""
    return int(sample.labels[cut] != IGNORE_INDEX and sample.labels[cut - 1] != IGNORE_INDEX)


def _require_trained(sample: Encoded) -> None:
    if not (sample.labels != IGNORE_INDEX).any():
        raise RowLost("no_trained_token", "no supervised token is left")
