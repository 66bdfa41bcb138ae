"""The loss and its counts against an independent float64 computation."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from sft.losses import token_loss

Batch = tuple[torch.Tensor, torch.Tensor]


def by_hand(logits: torch.Tensor, labels: torch.Tensor, smoothing: float = 0.0) -> tuple[float, float, int, int]:
    """Summed objective and nll, trained tokens and right ones, token by token in float64."""
    objective = nll = 0.0
    tokens = right = 0
    for row, row_labels in zip(logits.double().numpy(), labels.numpy(), strict=True):
        for t in range(1, len(row_labels)):
            if row_labels[t] == -100:
                continue
            scores = row[t - 1] - row[t - 1].max()
            log_probs = scores - np.log(np.exp(scores).sum())
            nll -= log_probs[row_labels[t]]
            objective -= (1 - smoothing) * log_probs[row_labels[t]] + smoothing * log_probs.mean()
            right += int(log_probs.argmax() == row_labels[t])
            tokens += 1
    return objective, nll, tokens, right


@pytest.fixture
def batch() -> Batch:
    generator = torch.Generator().manual_seed(3)
    logits = torch.randn(3, 40, 50, generator=generator) * 3
    labels = torch.randint(0, 50, (3, 40), generator=generator)
    labels[torch.rand(3, 40, generator=generator) < 0.5] = -100
    labels[:, 1:4] = logits[:, 0:3].argmax(-1)  # some that are right
    return logits, labels


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_sums_equal_a_float64_computation(batch: Batch, smoothing: float) -> None:
    logits, labels = batch
    objective, nll, tokens, right = by_hand(logits, labels, smoothing)
    loss = token_loss(logits, labels.clone(), smoothing)
    assert loss.objective.item() == pytest.approx(objective, rel=1e-6)
    assert loss.nll.item() == pytest.approx(nll, rel=1e-6)
    assert (loss.tokens.item(), loss.correct.item()) == (tokens, right)


def test_an_answer_is_a_run_of_trained_tokens_and_is_right_when_all_of_it_is() -> None:
    #                    two answers, the second wrong | one answer, right
    labels = torch.tensor([[-100, 1, 2, -100, 3, 4], [-100, -100, 5, 6, 7, -100]])
    logits = torch.zeros(2, 6, 10)
    for row in range(2):
        for t in range(1, 6):
            if labels[row, t] != -100:
                logits[row, t - 1, labels[row, t]] = 5.0
    logits[0, 4, 9] = 9.0  # the last token of row 0 goes wrong
    loss = token_loss(logits, labels)
    assert (loss.tokens.item(), loss.correct.item()) == (7, 6)
    assert (loss.answers.item(), loss.answers_correct.item()) == (3, 2)


def test_runs_of_two_rows_are_two_answers_even_where_they_touch() -> None:
    labels = torch.tensor([[1, 1, 1], [1, 1, 1]])  # column 0 is never trained
    loss = token_loss(torch.zeros(2, 3, 5), labels)
    assert (loss.tokens.item(), loss.answers.item()) == (4, 2)


def test_a_batch_without_a_trained_token_adds_nothing_and_keeps_its_graph() -> None:
    logits = torch.randn(2, 4, 8, requires_grad=True)
    loss = token_loss(logits, torch.full((2, 4), -100))
    assert (loss.objective.item(), loss.tokens.item(), loss.answers.item()) == (0.0, 0, 0)
    loss.objective.backward()
    assert logits.grad is not None
    assert logits.grad.abs().sum() == 0


def test_half_precision_logits_are_summed_in_float32(batch: Batch) -> None:
    logits, labels = batch
    loss = token_loss(logits.bfloat16(), labels.clone())
    assert loss.objective.dtype == torch.float32
    objective, *_ = by_hand(logits.bfloat16().float(), labels)
    assert loss.objective.item() == pytest.approx(objective, rel=1e-6)
