"""Metrics are quotients of sums, never means of means."""

from __future__ import annotations

import math

import pytest
import torch

from sft.losses import TokenLoss
from sft.metrics import TokenCounts, TokenSums


def loss(objective: float, tokens: int, correct: int, answers: int, right: int) -> TokenLoss:
    values = (objective, objective, tokens, correct, answers, right)
    return TokenLoss(*(torch.tensor(v) for v in values))


def test_unequal_batches_are_weighted_by_their_tokens() -> None:
    sums = TokenSums(torch.device("cpu"))
    sums.add(loss(objective=10.0, tokens=10, correct=5, answers=2, right=1), torch.tensor(30))
    sums.add(loss(objective=6.0, tokens=2, correct=0, answers=1, right=0), torch.tensor(4))
    counts = sums.take()
    metrics = counts.metrics("eval_")
    assert metrics == {
        "eval_loss": pytest.approx(16 / 12),  # the mean of batch means would be 2.0
        "eval_perplexity": pytest.approx(math.exp(16 / 12)),
        "eval_token_accuracy": pytest.approx(5 / 12),
        "eval_sequence_accuracy": pytest.approx(1 / 3),
    }
    assert counts.input_tokens == 34


def test_taking_starts_anew() -> None:
    sums = TokenSums(torch.device("cpu"))
    sums.add(loss(1.0, 1, 1, 1, 1), torch.tensor(1))
    sums.take()
    assert sums.take() == TokenCounts.zero()


def test_nothing_trained_gives_no_metric_and_no_division_by_zero() -> None:
    assert TokenCounts.zero().metrics() == {}


def test_a_hopeless_loss_has_infinite_perplexity_and_no_overflow() -> None:
    assert TokenCounts(2000.0, 2000.0, 1, 0, 1, 0, 1).metrics()["perplexity"] == math.inf


def test_long_sums_lose_no_token() -> None:
    sums = TokenSums(torch.device("cpu"))
    big = 2**24 + 1  # float32 cannot hold this
    sums.add(loss(0.0, big, 0, 1, 0), torch.tensor(big))
    sums.add(loss(0.0, 1, 0, 1, 0), torch.tensor(1))
    assert sums.take().tokens == big + 1
