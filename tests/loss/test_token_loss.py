"""The loss and its counts against an independent float64 computation."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch

from sft.loss.token_loss import Objective, TokenLoss, token_loss, trained_positions

Batch = tuple[torch.Tensor, torch.Tensor]

OBJECTIVES = [
    Objective(),
    Objective(label_smoothing=0.1),
    Objective(z_loss=1e-2),
    Objective(loss_type="dft"),
    Objective(loss_type="dft", label_smoothing=0.2, z_loss=1e-3, entropy=True),
]


def by_hand(logits: torch.Tensor, labels: torch.Tensor, objective: Objective | None = None) -> dict[str, float]:
    """The sums, token by token in float64."""
    o = objective or Objective()
    sums = dict.fromkeys(("objective", "nll", "tokens", "correct", "entropy"), 0.0)
    for row, row_labels in zip(logits.detach().double().numpy(), labels.numpy(), strict=True):
        for t in range(1, len(row_labels)):
            if row_labels[t] == -100:
                continue
            scores = row[t - 1]
            log_z = scores.max() + np.log(np.exp(scores - scores.max()).sum())
            log_probs = scores - log_z
            nll = -log_probs[row_labels[t]]
            weight = np.exp(-nll) if o.loss_type == "dft" else 1.0
            smoothed = (1 - o.label_smoothing) * nll - o.label_smoothing * log_probs.mean()
            sums["objective"] += weight * smoothed + o.z_loss * log_z**2
            sums["nll"] += nll
            sums["tokens"] += 1
            sums["correct"] += int(log_probs.argmax() == row_labels[t])
            sums["entropy"] -= (np.exp(log_probs) * log_probs).sum()
    return sums


def random_batch(seed: int = 3) -> Batch:
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(3, 40, 50, generator=generator) * 3
    labels = torch.randint(0, 50, (3, 40), generator=generator)
    labels[torch.rand(3, 40, generator=generator) < 0.5] = -100
    labels[:, 1:4] = logits[:, 0:3].argmax(-1)  # some that are right
    return logits, labels


def assert_sums(loss: TokenLoss, expected: dict[str, float], objective: Objective) -> None:
    assert loss.objective.item() == pytest.approx(expected["objective"], rel=1e-6)
    assert loss.nll.item() == pytest.approx(expected["nll"], rel=1e-6)
    assert (loss.tokens.item(), loss.correct.item()) == (expected["tokens"], expected["correct"])
    if objective.entropy:
        assert loss.entropy is not None
        assert loss.entropy.item() == pytest.approx(expected["entropy"], rel=1e-6)
    else:
        assert loss.entropy is None


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_sums_equal_a_float64_computation(objective: Objective) -> None:
    logits, labels = random_batch()
    assert_sums(token_loss(logits, labels.clone(), objective), by_hand(logits, labels, objective), objective)


def test_given_positions_give_the_same_sums() -> None:
    logits, labels = random_batch()
    positions = trained_positions(labels)
    flat = labels.clone()
    flat[:, 0] = -100
    assert positions.tolist() == [i for i, label in enumerate(flat.flatten().tolist()) if label != -100]
    one, other = token_loss(logits, labels), token_loss(logits, labels, positions=positions)
    assert one.as_dict() == other.as_dict()


def summed_by_hand(logits: torch.Tensor, labels: torch.Tensor, weigh: Callable) -> torch.Tensor:
    predicted, targets = logits[:, :-1].flatten(0, 1).double(), labels[:, 1:].flatten()
    kept = targets != -100
    nll = -torch.log_softmax(predicted[kept], -1).gather(1, targets[kept, None]).squeeze(1)
    return (weigh(nll) * nll).sum()


def test_dft_weights_each_token_by_its_probability_without_differentiating_the_weight() -> None:
    logits, labels = random_batch()
    ours, theirs = logits.clone().requires_grad_(), logits.clone().requires_grad_()
    token_loss(ours, labels, Objective(loss_type="dft")).objective.backward()
    summed_by_hand(theirs, labels, lambda nll: torch.exp(-nll).detach()).backward()
    assert ours.grad is not None
    assert theirs.grad is not None
    torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-5, atol=1e-6)
    wrong = logits.clone().requires_grad_()
    summed_by_hand(wrong, labels, lambda nll: torch.exp(-nll)).backward()
    assert (ours.grad - wrong.grad).abs().max() > 1e-2  # type: ignore[operator]


def test_an_answer_is_a_run_of_supervised_tokens_and_correct_when_all_of_them_are() -> None:
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


def test_fully_supervised_documents_are_separate_answers_in_a_flattened_batch() -> None:
    """The label of a document's first token is -100, which separates it from the document before it."""
    labels = torch.tensor([[-100, 1, 1, -100, 1, -100, 1, 1, 1]])
    loss = token_loss(torch.zeros(1, 9, 5), labels)
    assert (loss.tokens.item(), loss.answers.item()) == (6, 3)


def test_runs_of_two_sequences_are_two_answers_even_where_they_touch() -> None:
    labels = torch.tensor([[1, 1, 1], [1, 1, 1]])  # column 0 is never supervised
    loss = token_loss(torch.zeros(2, 3, 5), labels)
    assert (loss.tokens.item(), loss.answers.item()) == (4, 2)


def test_a_batch_without_supervised_tokens_adds_nothing_and_keeps_its_graph() -> None:
    logits = torch.randn(2, 4, 8, requires_grad=True)
    loss = token_loss(logits, torch.full((2, 4), -100))
    assert (loss.objective.item(), loss.tokens.item(), loss.answers.item()) == (0.0, 0, 0)
    loss.objective.backward()
    assert logits.grad is not None
    assert logits.grad.abs().sum() == 0


def test_half_precision_logits_are_summed_in_float32() -> None:
    logits, labels = random_batch()
    loss = token_loss(logits.bfloat16(), labels.clone())
    assert loss.objective.dtype == torch.float32
    expected = by_hand(logits.bfloat16().float(), labels)
    assert loss.objective.item() == pytest.approx(expected["objective"], rel=1e-6)
