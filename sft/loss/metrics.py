"""Sums over tokens that become metrics when a log is due: exact over steps, accumulation and ranks alike."""

from __future__ import annotations

import math
from dataclasses import astuple, dataclass

import torch

from sft.distributed.collectives import sum_over_ranks
from sft.loss.token_loss import TokenLoss

_SUMMED = ("objective", "nll", "entropy", "router_aux")
_COUNTED = ("tokens", "correct", "answers", "answers_correct")
_MEASURED = ("entropy_tokens", "router_tokens")  # over which the sums that are not always there were taken


@dataclass(frozen=True, slots=True)
class TokenCounts:
    """The sums over all ranks, on the host.

    Attributes:
        objective, nll, tokens, correct, answers, answers_correct: as in `TokenLoss`.
        input_tokens: real tokens, trained or not, never padding.
        entropy: in nats, over `entropy_tokens`, the trained tokens of the batches where it was asked for.
        router_aux: the load balancing loss of each pass times its trained tokens, which are `router_tokens`.
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
        """What nothing adds up to."""
        return cls(0.0, 0.0, 0, 0, 0, 0, 0)

    def __add__(self, other: TokenCounts) -> TokenCounts:
        return TokenCounts(*(one + two for one, two in zip(astuple(self), astuple(other), strict=True)))

    def metrics(self, prefix: str = "") -> dict[str, float]:
        """`loss`, `perplexity`, `token_accuracy`, `sequence_accuracy`, and `entropy` and `router_aux_loss` if measured.

        Perplexity is that of the plain likelihood, whatever the objective. Empty when nothing was trained.
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
    """Adds up `TokenLoss`es on the device, in float64 so that long sums stay exact; reading them is one transfer."""

    def __init__(self, device: torch.device) -> None:
        names = (*_SUMMED, *_COUNTED, *_MEASURED, "input_tokens")
        self._sums = torch.zeros(len(names), dtype=torch.float64, device=device)
        self._names = names

    def add(self, loss: TokenLoss, input_tokens: torch.Tensor) -> None:
        """Adds one batch. `input_tokens` is the batch's number of real tokens."""
        zero = torch.zeros_like(loss.tokens)
        measured = [zero if value is None else loss.tokens for value in (loss.entropy, loss.router_aux)]
        values = [getattr(loss, name) for name in (*_SUMMED, *_COUNTED)]
        parts = [zero if value is None else value.detach() for value in values]
        self._sums += torch.stack([part.to(self._sums) for part in [*parts, *measured, input_tokens]])

    @property
    def objective_and_tokens(self) -> torch.Tensor:
        """(2,) this rank's summed objective and its trained tokens, on the device."""
        return torch.stack([self._sums[self._names.index(name)] for name in ("objective", "tokens")])

    def absorb(self, other: TokenSums) -> None:
        """Takes over what `other` added up, which starts anew; nothing is read from the device."""
        self._sums += other._sums
        other.clear()

    def copy(self) -> TokenSums:
        """The same sums, on their own from here on."""
        other = TokenSums(self._sums.device)
        other._sums.copy_(self._sums)
        return other

    def clear(self) -> None:
        """Starts anew."""
        self._sums.zero_()

    def clear_where(self, flag: torch.Tensor) -> None:
        """Starts anew where `flag`, a scalar on the device, is not 0; it is not read."""
        self._sums.masked_fill_(flag.bool(), 0)

    def reduce_and_reset(self) -> TokenCounts:
        """The sums over all ranks since the last call; every rank must call it."""
        counts = self.total()
        self.clear()
        return counts

    def total(self) -> TokenCounts:
        """The sums over all ranks; every rank must call it."""
        values = sum_over_ranks(self._sums).tolist()
        summed, counted = values[: len(_SUMMED)], map(round, values[len(_SUMMED) :])
        return TokenCounts(**dict(zip(self._names, [*summed, *counted], strict=True)))
