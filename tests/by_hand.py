"""Computes what a run should have computed, row by row in float64, without batches, padding or accumulation."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

import config_manager
import data_handler
import model_manager
from data_handler import PreparedData
from sft.config.schema import DataKeys, ModelKeys


def rows_of(run: Path) -> PreparedData:
    """Prepares the rows of the run whose `config.yaml` is in the folder `run`."""
    config = config_manager.load_config(run / "config.yaml")
    tokenizer = model_manager.load_tokenizer(config.section(ModelKeys))
    return data_handler.prepare_data(config.section(DataKeys), tokenizer, seed=config.seed)


def model_in(folder: Path) -> PreTrainedModel:
    """Loads the model in `folder` in float64 and evaluation mode."""
    model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64)
    return model.eval()


def token_log_probs(model: PreTrainedModel, row: dict[str, Any]) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns the log probabilities (T - 1, V) of the next token at each position of a row, and the labels (T - 1,)."""
    ids = torch.as_tensor(row["input_ids"]).long()
    labels = torch.as_tensor(row["labels"]).long()
    logits = model(input_ids=ids[None], use_cache=False).logits[0]
    return logits[:-1].log_softmax(-1), labels[1:]


def summed_nll(model: PreTrainedModel, row: dict[str, Any]) -> torch.Tensor:
    """Sums -log p over the supervised tokens of one row, with its graph."""
    log_probs, labels = token_log_probs(model, row)
    kept = (labels != -100).nonzero().squeeze(-1)
    return -log_probs[kept, labels[kept]].sum()


@dataclass(frozen=True)
class Measured:
    """Sums over the supervised tokens of some rows.

    Attributes:
        nll: -log p of the label.
        uniform: -log p averaged over the whole vocabulary.
    """

    nll: float = 0.0
    uniform: float = 0.0
    tokens: int = 0
    correct: int = 0
    answers: int = 0
    answers_correct: int = 0

    def __add__(self, other: Measured) -> Measured:
        return Measured(*(one + two for one, two in zip(vars(self).values(), vars(other).values(), strict=True)))

    def loss(self, smoothing: float = 0.0) -> float:
        """Returns the mean loss per token with label smoothing."""
        return ((1 - smoothing) * self.nll + smoothing * self.uniform) / self.tokens

    def token_accuracy(self) -> float:
        """Returns the share of tokens that are the model's first choice."""
        return self.correct / self.tokens

    def sequence_accuracy(self) -> float:
        """Returns the share of answers whose tokens all are."""
        return self.answers_correct / self.answers


@torch.no_grad()
def measure(model: PreTrainedModel, rows: Iterable[dict[str, Any]]) -> Measured:
    """Sums over the rows one by one."""
    total = Measured()
    for row in rows:
        log_probs, labels = token_log_probs(model, row)
        trained = [t for t in range(len(labels)) if labels[t] != -100]
        right = [bool(log_probs[t].argmax() == labels[t]) for t in trained]
        nll = -sum(float(log_probs[t, labels[t]]) for t in trained)
        uniform = -sum(float(log_probs[t].mean()) for t in trained)
        # Consecutive supervised tokens are one answer: position minus index is the same for all of them.
        numbered = ((t - i, is_right) for i, (t, is_right) in enumerate(zip(trained, right, strict=True)))
        answers = [all(is_right for _, is_right in answer) for _, answer in groupby(numbered, lambda pair: pair[0])]
        total += Measured(nll, uniform, len(trained), sum(right), len(answers), sum(answers))
    return total
