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
        policy: `drop` loses the row, `error` too (the caller turns it into an error), `left` keeps the last tokens,
            `right` the first, `split` makes consecutive windows.

    Raises:
        RowLost: `too_long`, or `no_trained_token` if no kept token is supervised.
    """
    length, windows, answers_cut = len(sample.input_ids), [sample], 0
    supervised = sample.labels != IGNORE_INDEX
    if length > max_seq_length:
        if policy in ("drop", "error"):
            raise RowLost("too_long", f"{length} tokens, max_seq_length is {max_seq_length}")
        if policy == "left":
            windows = [_window(sample, length - max_seq_length, length)]
        elif policy == "right":
            windows = [_window(sample, 0, max_seq_length)]
            answers_cut = int(supervised[max_seq_length - 1 : max_seq_length + 1].all())
        else:
            windows = [_window(sample, at, at + max_seq_length) for at in range(0, length, max_seq_length)]
            # An end token that comes first in its window loses its label: nothing predicts it there.
            answers_cut = int((supervised & ~np.append(supervised[1:], False))[::max_seq_length].sum())
    kept = [window for window in windows if (window.labels != IGNORE_INDEX).any()]
    if not kept:
        several = "no window of the split row has a supervised token"
        raise RowLost("no_trained_token", several if len(windows) > 1 else "no supervised token is left")
    return Fitted(kept, length - sum(len(window.input_ids) for window in kept), answers_cut)


def _window(sample: Encoded, start: int, end: int) -> Encoded:
    labels = sample.labels[start:end].copy()
    labels[:1] = IGNORE_INDEX  # nothing predicts a window's first token
    return Encoded(sample.input_ids[start:end], labels)
