"""The loss and everything that is measured on the way, from one pass over the logits of the trained tokens.

    loss of a step = sum over all trained tokens of the step, on all ranks, of -log p(token | what stands before)
                     / number of those tokens

The sum is taken here; the division by `num_items_in_batch`, the count over the whole optimizer step, is the
trainer's. No mean of means anywhere.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F

from sft.documents import IGNORE_INDEX


@dataclass(frozen=True, slots=True)
class TokenLoss:
    """What one batch adds up to; each a scalar tensor on the logits' device, read by nobody until a log is due.

    Attributes:
        objective: the summed loss that is trained, with its graph (label smoothing included), float32.
        nll: summed negative log likelihood in nats, detached.
        tokens: trained tokens.
        correct: trained tokens that the model's first choice gets right.
        answers: runs of consecutive trained tokens, i.e. answers (or whole documents of text).
        answers_correct: answers of which every token is right.
    """

    objective: torch.Tensor
    nll: torch.Tensor
    tokens: torch.Tensor
    correct: torch.Tensor
    answers: torch.Tensor
    answers_correct: torch.Tensor


def token_loss(logits: torch.Tensor, labels: torch.Tensor, label_smoothing: float = 0.0) -> TokenLoss:
    """The summed cross entropy of the trained tokens and their accuracies.

    Args:
        logits: (B, T, V) in any float dtype; position t predicts token t + 1.
        labels: (B, T), aligned with the input: -100 where a token is not trained. Column 0 is never trained.
        label_smoothing: mass spread evenly over the vocabulary (Szegedy et al., 2016, arXiv:1512.00567, section 7).
    """
    vocab_size = logits.shape[-1]
    trained = labels != IGNORE_INDEX  # (B, T)
    trained[:, 0] = False  # nothing predicts a row's first token; this also keeps the runs of two rows apart
    positions = trained.flatten().nonzero().squeeze(-1)  # (N,)
    targets = labels.flatten()[positions]  # (N,)
    predicted = logits.reshape(-1, vocab_size)[positions - 1].float()  # (N, V): only trained tokens in float32

    objective = F.cross_entropy(predicted, targets, reduction="sum", label_smoothing=label_smoothing)
    with torch.no_grad():
        nll = F.cross_entropy(predicted, targets, reduction="sum") if label_smoothing else objective.detach()
        correct = predicted.argmax(-1) == targets  # (N,)
        starts = torch.ones_like(correct)
        starts[1:] = positions[1:] != positions[:-1] + 1
        answer = starts.cumsum(0) - 1  # (N,) which answer a token belongs to
        wrong = torch.zeros(len(positions), dtype=torch.int64, device=logits.device)
        wrong.index_add_(0, answer, (~correct).long())
        answers = starts.sum()
        answers_wrong = (wrong > 0).sum()
    return TokenLoss(
        objective=objective,
        nll=nll,
        tokens=torch.tensor(len(positions), device=logits.device),
        correct=correct.sum(),
        answers=answers,
        answers_correct=answers - answers_wrong,
    )
