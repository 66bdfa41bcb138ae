"""Sums over tokens that become metrics when a log is due: exact over steps, accumulation and ranks alike."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.distributed as dist

from sft.losses import TokenLoss

_FIELDS = ("objective", "nll", "tokens", "correct", "answers", "answers_correct", "input_tokens")


@dataclass(frozen=True, slots=True)
class TokenCounts:
    """The sums over all ranks, on the host. `nll` in nats; `input_tokens` counts real tokens, never padding."""

    objective: float
    nll: float
    tokens: int
    correct: int
    answers: int
    answers_correct: int
    input_tokens: int

    @classmethod
    def zero(cls) -> TokenCounts:
        """What nothing adds up to."""
        return cls(0.0, 0.0, 0, 0, 0, 0, 0)

    def __add__(self, other: TokenCounts) -> TokenCounts:
        return TokenCounts(*(getattr(self, name) + getattr(other, name) for name in _FIELDS))

    def metrics(self, prefix: str = "") -> dict[str, float]:
        """`loss`, `perplexity`, `token_accuracy` and `sequence_accuracy`; empty when nothing was trained."""
        if not self.tokens:
            return {}
        nll = self.nll / self.tokens
        return {
            f"{prefix}loss": self.objective / self.tokens,
            f"{prefix}perplexity": math.exp(nll) if nll < 700 else math.inf,
            f"{prefix}token_accuracy": self.correct / self.tokens,
            f"{prefix}sequence_accuracy": self.answers_correct / self.answers,
        }


class TokenSums:
    """Adds up `TokenLoss`es on the device, in float64 so that long sums stay exact; reading them is one transfer."""

    def __init__(self, device: torch.device) -> None:
        self._sums = torch.zeros(len(_FIELDS), dtype=torch.float64, device=device)

    def add(self, loss: TokenLoss, input_tokens: torch.Tensor) -> None:
        """Adds one batch. `input_tokens` is the batch's number of real tokens."""
        parts = [getattr(loss, name).detach() for name in _FIELDS[:-1]]
        self._sums += torch.stack([part.to(self._sums) for part in [*parts, input_tokens]])

    def take(self) -> TokenCounts:
        """The sums over all ranks since the last call; every rank must call it."""
        if dist.is_initialized() and dist.get_world_size() > 1:
            dist.all_reduce(self._sums)
        objective, nll, *counts = self._sums.tolist()
        self._sums.zero_()
        return TokenCounts(objective, nll, *(round(count) for count in counts))
