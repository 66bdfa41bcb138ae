"""Each policy for samples longer than the limit, token by token."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sft.data.documents import IGNORE_INDEX
from sft.data.encoding.encoder import Encoded
from sft.data.encoding.truncation import Fitted, fit
from sft.data.formats.conversation import RowLost


def sample(pattern: str) -> Encoded:
    """`"..aA"`: a dot is a masked token; ids count from 10."""
    ids = np.arange(10, 10 + len(pattern), dtype=np.int32)
    return Encoded(ids, np.where([c != "." for c in pattern], ids, IGNORE_INDEX).astype(np.int32))


def patterns(fitted: Fitted) -> list[tuple[list[int], str]]:
    """Ids of each sample, and which of them are supervised."""
    for one in fitted.samples:
        trained = one.labels != IGNORE_INDEX
        assert (one.labels[trained] == one.input_ids[trained]).all()
        assert len(one.labels) == len(one.input_ids)
    return [
        (one.input_ids.tolist(), "".join("a" if label != IGNORE_INDEX else "." for label in one.labels))
        for one in fitted.samples
    ]


@pytest.mark.parametrize("policy", ["error", "drop", "left", "right", "split"])
def test_a_sample_that_fits_stays_as_it_is(policy):
    one = sample("..aa")
    for limit in (4, 5):
        fitted = fit(one, limit, policy)
        assert (fitted.samples, fitted.truncated, fitted.answers_cut) == ([one], 0, 0)
    with pytest.raises(RowLost) as caught:
        fit(sample("...."), 4, policy)
    assert caught.value.reason == "no_trained_token"


@pytest.mark.parametrize("policy", ["error", "drop"])
def test_error_and_drop_lose_the_row(policy):
    with pytest.raises(RowLost) as caught:
        fit(sample("..aa."), 4, policy)
    assert (caught.value.reason, caught.value.message) == ("too_long", "5 tokens, max_seq_length is 4")


@pytest.mark.parametrize(
    ("pattern", "limit", "kept", "truncated", "cut"),
    [
        # right: the first tokens
        ("..aaa", 4, "..aa", 1, 1),
        ("..aaa.", 5, "..aaa", 1, 0),
        (".aa..aaa", 5, ".aa..", 3, 0),
        (".aa.aaa", 5, ".aa.a", 2, 1),
        (".aaa", 2, ".a", 2, 1),
    ],
)
def test_right_keeps_the_first_tokens_and_counts_a_lost_end(pattern, limit, kept, truncated, cut):
    fitted = fit(sample(pattern), limit, "right")
    assert patterns(fitted) == [(list(range(10, 10 + limit)), kept)]
    assert (fitted.truncated, fitted.answers_cut) == (truncated, cut)


@pytest.mark.parametrize(
    ("pattern", "limit", "kept"),
    [("...aa", 4, "..aa"), (".aaaa", 3, ".aa"), (".aa...aa.", 4, ".aa."), (".aaa.aa", 6, ".aa.aa")],
)
def test_left_keeps_the_last_tokens_and_never_trains_the_first(pattern, limit, kept):
    fitted = fit(sample(pattern), limit, "left")
    end = 10 + len(pattern)
    assert patterns(fitted) == [(list(range(end - limit, end)), kept)]
    assert (fitted.truncated, fitted.answers_cut) == (len(pattern) - limit, 0)


@pytest.mark.parametrize(("pattern", "policy"), [("....a", "right"), (".aa...", "left"), (".aaa....", "left")])
def test_a_side_without_an_answer_loses_the_row(pattern, policy):
    with pytest.raises(RowLost) as caught:
        fit(sample(pattern), 3, policy)
    assert caught.value.reason == "no_trained_token"


@pytest.mark.parametrize(
    ("pattern", "limit", "kept", "truncated", "cut"),
    [
        ("..aaaa..", 4, [(0, "..aa"), (4, ".a..")], 0, 0),
        ("..aaa.", 4, [(0, "..aa")], 2, 1),  # the end token comes first in its window and loses its label
        (".a......aa", 4, [(0, ".a.."), (8, ".a")], 4, 0),
        (".aaaaaa", 3, [(0, ".aa"), (3, ".aa")], 1, 1),
        (".aa.aaa.", 4, [(0, ".aa."), (4, ".aa.")], 0, 0),
    ],
)
def test_split_makes_windows_and_skips_those_without_an_answer(pattern, limit, kept, truncated, cut):
    fitted = fit(sample(pattern), limit, "split")
    assert patterns(fitted) == [(list(range(10 + at, 10 + at + len(w))), w) for at, w in kept]
    assert (fitted.truncated, fitted.answers_cut) == (truncated, cut)


def test_a_split_without_an_answer_loses_the_row():
    with pytest.raises(RowLost) as caught:
        fit(sample("...a.."), 3, "split")
    assert caught.value.reason == "no_trained_token"


@given(st.text("a.", min_size=1, max_size=40), st.integers(2, 9), st.sampled_from(["left", "right", "split"]))
@settings(max_examples=200, deadline=None)
def test_kept_samples_fit_have_an_answer_and_add_up(pattern, limit, policy):
    one = sample("." + pattern)
    labels = one.labels.copy()
    try:
        fitted = fit(one, limit, policy)
    except RowLost as lost:
        reason = lost.reason
        assert reason == "no_trained_token"
        return
    assert sum(len(s.input_ids) for s in fitted.samples) + fitted.truncated == len(one.input_ids)
    kept = [i for s in fitted.samples for i in s.input_ids.tolist()]
    assert sorted(set(kept)) == kept
    for s in fitted.samples:
        assert len(s.input_ids) <= limit
        assert s.labels[0] == IGNORE_INDEX
        assert (s.labels != IGNORE_INDEX).any()
    assert (one.labels == labels).all()  # the sample itself is unchanged
    # Each answer's last token is trained, cut, or gone with its whole answer or window.
    runs = ("." + pattern + ".").split(".")
    assert fitted.answers_cut <= sum(map(bool, runs))
