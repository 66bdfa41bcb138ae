"""The loss and the accuracies of a batch, from one pass over the logits of its supervised tokens.

    loss of a step = sum of the losses of all supervised tokens of the step, on all ranks / number of those tokens

This module computes sums. The trainer divides by `num_items_in_batch`, the count over the whole optimizer step, so
that there is no mean of means.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F

from sft.data.documents import IGNORE_INDEX


@dataclass(frozen=True, slots=True)
class Objective:
    """What is summed over the supervised tokens. With p the model's distribution, x its logits and y the target:

        w · ((1 - e) · -log p(y) + e · mean over the vocabulary of -log p)  +  z · logsumexp(x)²

    Attributes:
        loss_type: `nll` has w = 1. `dft` has w = p(y), held constant, which undoes the 1/p(y) that the gradient of
            -log p(y) has as a policy gradient (Wu et al., 2025, arXiv:2508.05629, equation 9).
        label_smoothing: e, spread evenly over the vocabulary (Szegedy et al., 2016, arXiv:1512.00567, section 7).
        z_loss: z, keeps the softmax normalizer near 1 (Chowdhery et al., 2022, arXiv:2204.02311, section 5: 1e-4).
        router_aux: coefficient of a mixture of experts' load balancing loss (see `sft.loss.load_balancing`).
        entropy: also measure the entropy of p.
    """

    loss_type: Literal["nll", "dft"] = "nll"
    label_smoothing: float = 0.0
    z_loss: float = 0.0
    router_aux: float = 0.0
    entropy: bool = False


@dataclass(frozen=True, slots=True)
class LossSettings:
    """How the loss is computed.

    Attributes:
        objective: what training minimizes; evaluation measures the plain cross entropy.
        chunk_size: tokens whose logits are held at a time; None is chosen for the machine.
    """

    objective: Objective = Objective()
    chunk_size: int | None = None


@dataclass(frozen=True, slots=True)
class TokenLoss:
    """Sums over one batch; each a scalar tensor on the logits' device, which is not read until a log is due.

    Attributes:
        objective: the summed loss that is trained, with its graph, float32.
        nll: summed negative log likelihood in nats, detached.
        tokens: number of supervised tokens.
        correct: supervised tokens that are the model's first choice.
        answers: runs of consecutive supervised tokens, i.e. answers (or whole documents of text).
        answers_correct: answers of which every token is correct.
        entropy: summed entropy of the predictions in nats; None where it is not measured.
        router_aux: the load balancing loss times `tokens`, without its coefficient; None where there is none.
    """

    objective: torch.Tensor
    nll: torch.Tensor
    tokens: torch.Tensor
    correct: torch.Tensor
    answers: torch.Tensor
    answers_correct: torch.Tensor
    entropy: torch.Tensor | None = None
    router_aux: torch.Tensor | None = None

    def as_dict(self) -> dict[str, torch.Tensor]:
        """Returns its tensors by name, which pass through the wrappers of parallel training."""
        fields = {name: getattr(self, name) for name in self.__slots__}
        return {name: value for name, value in fields.items() if value is not None}


@dataclass(frozen=True, slots=True)
class TokenScores:
    """Values of each token, all (N,): `loss`, `nll` and `entropy` float32, `correct` bool."""

    loss: torch.Tensor
    nll: torch.Tensor
    correct: torch.Tensor
    entropy: torch.Tensor | None = None


def trained_positions(labels: torch.Tensor) -> torch.Tensor:
    """Finds the supervised tokens in the flattened labels: (N,) int64, ascending. Column 0 is never supervised.

    On a GPU this waits for the device, so a collator calls it while the labels are on the host.

    Args:
        labels: (B, T), aligned with the input: -100 where a token is masked.
    """
    supervised = labels != IGNORE_INDEX  # (B, T)
    supervised[:, 0] = False  # nothing predicts a sequence's first token; this also separates the runs of two sequences
    return supervised.flatten().nonzero().squeeze(-1)


def token_loss(
    logits: torch.Tensor,
    labels: torch.Tensor,
    objective: Objective | None = None,
    positions: torch.Tensor | None = None,
) -> TokenLoss:
    """Computes the summed loss of the supervised tokens and their accuracies, from the logits of a whole batch.

    Args:
        logits: (B, T, V) in any float dtype; position t predicts token t + 1.
        labels: (B, T), aligned with the input: -100 where a token is masked. Column 0 is never supervised.
        objective: the default is the plain negative log likelihood.
        positions: `trained_positions(labels)` where they are known.
    """
    objective = objective or Objective()
    positions = trained_positions(labels) if positions is None else positions  # (N,)
    targets = labels.flatten()[positions]  # (N,)
    predicted = logits.flatten(0, 1)[positions - 1].float()  # (N, V): only supervised tokens in float32
    scores = score(predicted, targets, objective)
    return add_up(scores, positions)


def score(logits: torch.Tensor, targets: torch.Tensor, objective: Objective) -> TokenScores:
    """Computes each token's loss, with its graph, and its measurements.

    Args:
        logits: (N, V) float32.
        targets: (N,) int64.
    """
    log_probs = F.log_softmax(logits, -1)  # (N, V)
    nll = -log_probs.gather(1, targets[:, None]).squeeze(1)  # (N,)
    loss = nll
    if objective.label_smoothing:
        loss = nll.lerp(-log_probs.mean(-1), objective.label_smoothing)
    if objective.loss_type == "dft":
        loss = loss * torch.exp(-nll.detach())
    if objective.z_loss:
        normalizer = nll + logits.gather(1, targets[:, None]).squeeze(1)  # (N,) logsumexp
        loss = loss + objective.z_loss * normalizer.square()
    with torch.no_grad():
        correct = logits.argmax(-1) == targets
        entropy = -(log_probs.exp() * log_probs).sum(-1) if objective.entropy else None
    return TokenScores(loss, nll.detach(), correct, entropy)


def add_up(scores: TokenScores, positions: torch.Tensor) -> TokenLoss:
    """Adds up the scores of the tokens at `positions`, (N,) from `trained_positions`; in float64."""
    correct = scores.correct
    starts = torch.ones_like(correct)
    starts[1:] = positions[1:] != positions[:-1] + 1
    answer = starts.cumsum(0) - 1  # (N,) the answer that a token belongs to
    wrong = torch.zeros(len(positions), dtype=torch.int64, device=correct.device)
    wrong.index_add_(0, answer, (~correct).long())
    answers = starts.sum()
    return TokenLoss(
        objective=scores.loss.sum(dtype=torch.float64).float(),
        nll=scores.nll.sum(dtype=torch.float64),
        tokens=torch.full_like(answers, len(positions)),
        correct=correct.sum(),
        answers=answers,
        answers_correct=answers - (wrong > 0).sum(),
        entropy=None if scores.entropy is None else scores.entropy.sum(dtype=torch.float64),
    )
