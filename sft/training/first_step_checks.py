"""Checks at the first optimizer step whether a run makes sense, when a mistake costs a minute and not a day.

A sound run logs one line; each problem is a warning with what to look at. All ranks see the same numbers.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from sft.errors import Problem, TrainingStopped
from sft.loss.metrics import TokenCounts
from sft.loss.token_loss import TokenLoss
from sft.training.gradient_coverage import GradientCoverage, count_gradients
from sft.training.nonfinite_report import join_names

logger = logging.getLogger("sft")

# A uniform distribution over the vocabulary has a loss of ln(vocab). Randomly initialized models stay within 0.1 of it;
# pretrained ones are far below, at 0.5 to 0.7 of it even on unusual data.
_LIKE_RANDOM = 0.93
_WORSE_THAN_RANDOM = 1.1
# Difference between training and evaluation mode on one batch, as a share of the loss: with rounding only, with noise.
_ROUNDING = 0.02
_NOISE = 0.5
_PATIENCE = 3  # steps without a supervised token before the run is stopped
_SHOWN = 6  # names in a message


@dataclass(frozen=True)
class FirstStep:
    """What was measured at the first step.

    Attributes:
        step: number of optimizer steps made before it.
        loss: in nats per supervised token, over the whole step on all ranks.
        tokens, input_tokens: supervised tokens, and all tokens.
        vocab_size: number of tokens that the model can predict.
        from_scratch: whether the weights are randomly initialized on purpose.
        in_training, in_evaluation: loss of the first micro-batch in the two modes; None without a supervised token.
        noise: sources of randomness in training mode, e.g. `attention_dropout 0.1`.
        gradients: of the whole step.
    """

    step: int
    loss: float
    tokens: int
    input_tokens: int
    vocab_size: int
    from_scratch: bool
    in_training: float | None
    in_evaluation: float | None
    noise: tuple[str, ...]
    gradients: GradientCoverage

    def __str__(self) -> str:
        evaluated = "" if self.in_evaluation is None else f"; evaluation mode {self.in_evaluation:.4g}"
        if evaluated and self.in_training is not None and abs(self.in_training - self.loss) > 5e-4 * self.loss:
            evaluated += f", training mode {self.in_training:.4g} (on this rank's first micro-batch)"
        return (
            f"step {self.step}: loss {self.loss:.4g}, ln(vocab) {math.log(self.vocab_size):.4g}{evaluated}; "
            f"{self.tokens:,} of {self.input_tokens:,} tokens are trained; {self.gradients}"
        )


def find_warnings(first: FirstStep) -> list[str]:
    """Returns what is wrong, each with what to look at; empty for a sound run."""
    return [text for text in (_check_loss(first), _check_modes(first), *_check_gradients(first.gradients)) if text]


def _check_loss(first: FirstStep) -> str | None:
    """Compares the loss with that of a uniform distribution."""
    uniform = math.log(first.vocab_size)
    numbers = f"the first loss is {first.loss:.4g}, ln({first.vocab_size:,} tokens) is {uniform:.4g}"
    if first.loss > _WORSE_THAN_RANDOM * uniform:
        cause = "the scale of the initialization" if first.from_scratch else "whether the tokenizer is the model's own"
        return (
            f"{numbers}: the model is worse than a uniform guess; look at {cause}, and with `preview` at whether the "
            "labels are the next tokens and not shifted or mixed up"
        )
    if first.loss > _LIKE_RANDOM * uniform and not first.from_scratch:
        return (
            f"{numbers}: the model is no better than random weights; if it is pretrained, look at whether its weights "
            "were loaded (names that do not match, a missing lm_head or embedding) and whether the tokenizer is its own"
        )
    return None


def _check_modes(first: FirstStep) -> str | None:
    """Compares training mode with evaluation mode on the same batch."""
    training, evaluation = first.in_training, first.in_evaluation
    if training is None or evaluation is None:
        return None
    share = abs(training - evaluation) / max(evaluation, 1e-3)
    if share <= (_NOISE if first.noise else _ROUNDING):
        return None
    noise = f"{', '.join(first.noise)} is much" if first.noise else "no dropout or noise is set that could explain it"
    return (
        f"one batch has a loss of {training:.4g} in training mode and {evaluation:.4g} in evaluation mode: {noise}; "
        "look at what the model does only in training (dropout, noise, batch statistics, custom code)"
    )


def _check_gradients(gradients: GradientCoverage) -> list[str]:
    """Names parameters without a gradient or with a zero one."""
    found = []
    if gradients.missing:
        names = join_names(gradients.missing, _SHOWN)
        found.append(
            f"{len(gradients.missing)} trained parameters are not used by the forward pass and will never change: "
            f"{names}; freeze them, or look at why the model does not use them (with several processes, which wait for "
            "their gradients, set ddp_find_unused_parameters: true)"
        )
    if gradients.zero:
        names = join_names(gradients.zero, _SHOWN)
        found.append(
            f"the gradient of {len(gradients.zero)} trained parameters is zero: {names}; look for weights that are "
            "zero, a detach, or a dtype in which such small numbers underflow"
        )
    return found


class FirstStepChecks:
    """Checks the first step of a run, new or resumed, and the learning rate of the second.

    Args:
        model: wrapped with an adapter or not.
        vocab_size, from_scratch: see `FirstStep`.
        noise_alpha: of NEFTune; 0 means none.

    Attributes:
        is_open: whether the check is still due; the same on all ranks.
    """

    def __init__(
        self, model: torch.nn.Module, vocab_size: int, *, from_scratch: bool, noise_alpha: float = 0.0
    ) -> None:
        self._model, self._vocab_size, self._from_scratch = model, vocab_size, from_scratch
        self._noise = noise_sources(model) + ((f"neftune_noise_alpha {noise_alpha:g}",) if noise_alpha else ())
        self._evaluated: tuple[torch.Tensor, torch.Tensor] | None = None  # summed loss, tokens
        self._trained: tuple[torch.Tensor, torch.Tensor] | None = None
        self._steps = 0
        self.is_open = True
        self._rate_is_open = True

    def before_pass(self, evaluate: Callable[[], TokenLoss]) -> None:
        """Runs the first micro-batch in evaluation mode: one forward pass per run."""
        if self._evaluated is None:
            result = evaluate()
            self._evaluated = (result.nll, result.tokens)

    def forget_first_pass(self) -> None:
        """Forgets the first micro-batch: it is run again in smaller pieces, the first of which counts then."""
        self._evaluated = self._trained = None

    def after_pass(self, trained: TokenLoss) -> None:
        """Keeps the sums of the first micro-batch in training mode; nothing is read from the device yet."""
        if self._trained is None:
            self._trained = (trained.nll, trained.tokens)

    def look(self, step: int, counts: TokenCounts) -> None:
        """Checks the first step with a supervised token, before the optimizer makes it; every rank must call it.

        Args:
            step: optimizer steps made before it.
            counts: of this step, over all ranks.

        Raises:
            TrainingStopped: no parameter has a gradient, or the first steps have no supervised token.
        """
        self._steps += 1
        if not counts.tokens:
            problem = Problem(
                f"step {step}: none of its {counts.input_tokens:,} tokens is trained: all labels are masked",
                "look with `preview` at which tokens are trained: train_on, the format, the template's markers, "
                "max_seq_length",
            )
            if self._steps >= _PATIENCE:
                raise TrainingStopped(problem)
            logger.warning("%s", problem)
            return
        self.is_open = False
        first = FirstStep(
            step=step,
            loss=counts.nll / counts.tokens,
            tokens=counts.tokens,
            input_tokens=counts.input_tokens,
            vocab_size=self._vocab_size,
            from_scratch=self._from_scratch,
            in_training=_mean(self._trained),
            in_evaluation=_mean(self._evaluated),
            noise=self._noise,
            gradients=count_gradients(self._model),
        )
        if not first.gradients.reached:
            raise TrainingStopped(
                Problem(
                    f"step {step}: none of {first.gradients.total} trained parameters has a gradient",
                    "look for frozen or detached layers, gradient checkpointing with use_reentrant on frozen "
                    "embeddings, an adapter that is not active",
                )
            )
        logger.info("%s", first)
        for text in find_warnings(first):
            logger.warning("%s", text)

    def look_at_rates(self, made: int, left: int, rates: Sequence[float]) -> None:
        """Warns if the learning rate is 0. At the first step a warmup makes it so, so the second is checked.

        Args:
            made: optimizer steps made before.
            left: steps to make, including this one.
            rates: learning rates of the step that is about to be made.
        """
        if not self._rate_is_open or (made == 0 and left > 1):
            return
        self._rate_is_open = False
        if rates and not any(rates):
            when = "in the only step" if made == 0 else f"after {made} step" + ("s" if made > 1 else "")
            logger.warning(
                "the learning rate is 0 %s: nothing is learned; look at learning_rate, warmup_steps or warmup_ratio, "
                "lr_scheduler_type, and at whether max_steps has been reached",
                when,
            )


def noise_sources(model: torch.nn.Module) -> tuple[str, ...]:
    """Returns the sources of randomness in training mode, e.g. `lora_dropout 0.1`, from the layers and the config."""
    found: dict[str, float] = {}
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.modules.dropout._DropoutNd) and module.p:
            parts = [part for part in name.split(".") if "drop" in part] or ["dropout"]
            found.setdefault(parts[0], module.p)
    config: Any = getattr(model, "config", None)
    for name, value in (config.to_dict() if config is not None else {}).items():
        is_noise = any(word in name for word in ("dropout", "pdrop", "jitter", "layerdrop"))
        if is_noise and isinstance(value, (int, float)) and not isinstance(value, bool) and value > 0:
            found.setdefault(name, value)
    return tuple(f"{name} {value:g}" for name, value in found.items())


def _mean(sums: tuple[torch.Tensor, torch.Tensor] | None) -> float | None:
    if sums is None or not int(sums[1]):
        return None
    return float(sums[0]) / int(sums[1])
