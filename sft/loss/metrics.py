"""Sums over tokens that become metrics when a log is due: exact over steps, micro-batches and ranks."""

from __future__ import annotations

import math
from dataclasses import astuple, dataclass

import torch

from sft.distributed.collectives import sum_over_ranks
from sft.loss.token_loss import TokenLoss

_SUMMED = ("objective", "nll", "entropy", "router_aux")
_COUNTED = ("tokens", "correct", "answers", "answers_correct")
# The two in the middle count the tokens of the sums that not every batch has.
_NAMES = (*_SUMMED, *_COUNTED, "entropy_tokens", "router_tokens", "input_tokens")


@dataclass(frozen=True, slots=True)
class TokenCounts:
    """Sums over all ranks, on the host.

    Attributes:
        objective, nll, tokens, correct, answers, answers_correct: as in `TokenLoss`.
        input_tokens: all tokens but padding.
        entropy: in nats, over `entropy_tokens`, the supervised tokens of the batches that measured it.
        router_aux: the load balancing loss of each micro-batch times its supervised tokens, `router_tokens`.
    """

    objective: float
    nll: float
    tokens: int
    correct: int
    answers: int
    answers_correct: int
    input_tokens: int
    entropy: float = 0.0
    router_aux: float = 0.0
    entropy_tokens: int = 0
    router_tokens: int = 0

    @classmethod
    def zero(cls) -> TokenCounts:
        """Returns counts of nothing."""
        return cls(0.0, 0.0, 0, 0, 0, 0, 0)

    def __add__(self, other: TokenCounts) -> TokenCounts:
        return TokenCounts(*(one + two for one, two in zip(astuple(self), astuple(other), strict=True)))

    def metrics(self, prefix: str = "") -> dict[str, float]:
        """Returns the loss, perplexity and accuracies, and entropy and router loss where they were measured.

        The perplexity is that of the plain likelihood, whatever the objective. Empty without supervised tokens.
        """
        if not self.tokens:
            return {}
        nll = self.nll / self.tokens
        metrics = {
            "loss": self.objective / self.tokens,
            "perplexity": math.exp(nll) if nll < 700 else math.inf,
            "token_accuracy": self.correct / self.tokens,
            "sequence_accuracy": self.answers_correct / self.answers,
        }
        if self.entropy_tokens:
            metrics["entropy"] = self.entropy / self.entropy_tokens
        if self.router_tokens:
            metrics["router_aux_loss"] = self.router_aux / self.router_tokens
        return {f"{prefix}{name}": value for name, value in metrics.items()}


class TokenSums:
    """Adds up `TokenLoss`es on the device, in float64 to keep long sums exact; reading them is one transfer."""

    def __init__(self, device: torch.device) -> None:
        self._sums = torch.zeros(len(_NAMES), dtype=torch.float64, device=device)

    def add(self, loss: TokenLoss, input_tokens: torch.Tensor) -> None:
        """Adds one batch. `input_tokens` is its number of tokens without padding."""
        zero = torch.zeros_like(loss.tokens)
        measured = [zero if value is None else loss.tokens for value in (loss.entropy, loss.router_aux)]
        values = [getattr(loss, name) for name in (*_SUMMED, *_COUNTED)]
        parts = [zero if value is None else value.detach() for value in values]
        self._sums += torch.stack([part.to(self._sums) for part in [*parts, *measured, input_tokens]])

    @property
    def objective_and_tokens(self) -> torch.Tensor:
        """(2,) this rank's summed objective and number of supervised tokens, on the device."""
        return torch.stack([self._sums[_NAMES.index(name)] for name in ("objective", "tokens")])

    def absorb(self, other: TokenSums) -> None:
        """Adds the sums of `other` and clears it; nothing is read from the device."""
        self._sums += other._sums
        other.clear()

    def copy(self) -> TokenSums:
        """Returns an independent copy."""
        other = TokenSums(self._sums.device)
        other._sums.copy_(self._sums)
        return other

    def clear(self) -> None:
        """Sets all sums to 0."""
        self._sums.zero_()

    def clear_where(self, flag: torch.Tensor) -> None:
        """Sets all sums to 0 if `flag`, a scalar on the device, is not 0; it is not read by the host."""
        self._sums.masked_fill_(flag.bool(), 0)

    def reduce_and_reset(self) -> TokenCounts:
        """Returns the sums over all ranks since the last call; every rank must call it."""
        counts = self.total()
        self.clear()
        return counts

    def total(self) -> TokenCounts:
        """Returns the sums over all ranks; every rank must call it."""
        values = sum_over_ranks(self._sums).tolist()
        summed, counted = values[: len(_SUMMED)], map(round, values[len(_SUMMED) :])
        return TokenCounts(**dict(zip(_NAMES, [*summed, *counted], strict=True)))
