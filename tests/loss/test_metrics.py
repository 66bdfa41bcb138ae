"""Metrics are quotients of sums, never means of means."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

from sft.loss.metrics import TokenCounts, TokenSums
from sft.loss.token_loss import TokenLoss


def loss(objective: float, tokens: int, correct: int, answers: int, right: int) -> TokenLoss:
    values = (objective, objective, tokens, correct, answers, right)
    return TokenLoss(*(torch.tensor(v) for v in values))


def test_unequal_batches_are_weighted_by_their_tokens() -> None:
    sums = TokenSums(torch.device("cpu"))
    sums.add(loss(objective=10.0, tokens=10, correct=5, answers=2, right=1), torch.tensor(30))
    sums.add(loss(objective=6.0, tokens=2, correct=0, answers=1, right=0), torch.tensor(4))
    counts = sums.reduce_and_reset()
    metrics = counts.metrics("eval_")
    assert metrics == {
        "eval_loss": pytest.approx(16 / 12),  # the mean of batch means would be 2.0
        "eval_perplexity": pytest.approx(math.exp(16 / 12)),
        "eval_token_accuracy": pytest.approx(5 / 12),
        "eval_sequence_accuracy": pytest.approx(1 / 3),
    }
    assert counts.input_tokens == 34


def test_reading_the_sums_clears_them() -> None:
    sums = TokenSums(torch.device("cpu"))
    sums.add(loss(1.0, 1, 1, 1, 1), torch.tensor(1))
    sums.reduce_and_reset()
    assert sums.reduce_and_reset() == TokenCounts.zero()


@pytest.mark.parametrize("objective", [1.0, math.nan])
def test_a_flag_clears_the_sums_of_a_skipped_step(objective: float) -> None:
    for flag, tokens in ((0.0, 3), (1.0, 0)):
        sums = TokenSums(torch.device("cpu"))
        sums.add(loss(objective, 3, 1, 1, 1), torch.tensor(9))
        sums.clear_where(torch.tensor(flag))
        counts = sums.reduce_and_reset()
        assert counts.tokens == tokens
        assert counts == TokenCounts.zero() or not flag


def test_no_supervised_token_gives_no_metric_and_no_division_by_zero() -> None:
    assert TokenCounts.zero().metrics() == {}


def test_a_very_large_loss_has_infinite_perplexity_and_no_overflow() -> None:
    assert TokenCounts(2000.0, 2000.0, 1, 0, 1, 0, 1).metrics()["perplexity"] == math.inf


def test_large_counts_stay_exact() -> None:
    sums = TokenSums(torch.device("cpu"))
    big = 2**24 + 1  # float32 cannot hold this
    sums.add(loss(0.0, big, 0, 1, 0), torch.tensor(big))
    sums.add(loss(0.0, 1, 0, 1, 0), torch.tensor(1))
    assert sums.reduce_and_reset().tokens == big + 1


def test_entropy_and_router_balance_are_means_over_the_tokens_they_were_measured_on() -> None:
    sums = TokenSums(torch.device("cpu"))
    measured = {"entropy": torch.tensor(12.0, dtype=torch.float64), "router_aux": torch.tensor(20.0)}
    sums.add(replace(loss(10.0, tokens=10, correct=5, answers=2, right=1), **measured), torch.tensor(30))
    sums.add(replace(loss(6.0, tokens=2, correct=0, answers=1, right=0), entropy=torch.tensor(0.0)), torch.tensor(4))
    sums.add(loss(6.0, tokens=8, correct=0, answers=1, right=0), torch.tensor(9))
    metrics = sums.reduce_and_reset().metrics()
    assert metrics["entropy"] == pytest.approx(12 / 12)
    assert metrics["router_aux_loss"] == pytest.approx(20 / 10)


def test_what_was_not_measured_is_not_reported() -> None:
    sums = TokenSums(torch.device("cpu"))
    sums.add(loss(1.0, 1, 1, 1, 1), torch.tensor(1))
    assert set(sums.reduce_and_reset().metrics()) == {"loss", "perplexity", "token_accuracy", "sequence_accuracy"}


def test_perplexity_is_that_of_the_likelihood_whatever_was_trained() -> None:
    counts = TokenCounts(objective=30.0, nll=20.0, tokens=10, correct=0, answers=1, answers_correct=0, input_tokens=10)
    assert counts.metrics()["loss"] == 3.0
    assert counts.metrics()["perplexity"] == pytest.approx(math.exp(2.0))


def test_counts_add_up_field_by_field() -> None:
    one = TokenCounts(*range(11))
    assert one + one == TokenCounts(*(2 * n for n in range(11)))
