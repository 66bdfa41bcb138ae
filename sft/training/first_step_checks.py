"""Whether a run can be trusted, asked at its first optimizer step, while it costs a minute and not a day.

Each rank looks at the same numbers; what is wrong is said with what to look at, and a sound run is one line.
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

logger = logging.getLogger("sft")

# A model that knows nothing gives every token of its vocabulary the same probability, a loss of ln(vocab). One with the
# usual random weights stays within 0.1 of that; a trained one is far below, on strange data too (0.5 to 0.7 of it).
_LIKE_RANDOM = 0.93
_WORSE_THAN_RANDOM = 1.1
# The two modes of one model on one batch, as a share of the loss: rounding alone, or noise that training draws.
_ROUNDING = 0.02
_NOISE = 0.5
_PATIENCE = 3  # steps without a trained token before it is no coincidence
_SHOWN = 6  # names in a message


@dataclass(frozen=True)
class FirstStep:
    """What was measured.

    Attributes:
        step: counted from 0, as the steps that were made before it.
        loss: nats a trained token, over the whole step on all ranks.
        tokens, input_tokens: trained ones, and all.
        vocab_size: tokens that the model can predict.
        from_scratch: whether its weights are random on purpose.
        in_training, in_evaluation: the loss of the first pass in the two modes; None where it trains no token.
        noise: what draws random numbers in training, e.g. `attention_dropout 0.1`.
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
            evaluated += f" where training mode gives {self.in_training:.4g} (of the step, this rank's first pass)"
        return (
            f"step {self.step}: loss {self.loss:.4g}, ln(vocab) {math.log(self.vocab_size):.4g}{evaluated}; "
            f"{self.tokens:,} of {self.input_tokens:,} tokens are trained; {self.gradients}"
        )


def find_warnings(first: FirstStep) -> list[str]:
    """What is wrong, each with what to look at; empty for a sound run."""
    return [text for text in (_level(first), _modes(first), *_gradients(first.gradients)) if text]


def _level(first: FirstStep) -> str | None:
    """The loss beside that of a model that knows nothing."""
    uniform = math.log(first.vocab_size)
    numbers = f"the first loss is {first.loss:.4g}, ln({first.vocab_size:,} tokens) is {uniform:.4g}"
    if first.loss > _WORSE_THAN_RANDOM * uniform:
        cause = "the scale of the initialisation" if first.from_scratch else "whether the tokenizer is the model's own"
        return (
            f"{numbers}: the model is worse than one that knows nothing; look at {cause}, and with `preview` at "
            "the labels, that they are what follows and not shifted or mixed up"
        )
    if first.loss > _LIKE_RANDOM * uniform and not first.from_scratch:
        return (
            f"{numbers}: the model knows no more than random weights; if it should, look at whether its weights were "
            "loaded (names that do not match, a lost lm_head or embedding), and whether the tokenizer is its own"
        )
    return None


def _modes(first: FirstStep) -> str | None:
    """Training mode beside evaluation mode on the same batch."""
    training, evaluation = first.in_training, first.in_evaluation
    if training is None or evaluation is None:
        return None
    share = abs(training - evaluation) / max(evaluation, 1e-3)
    if share <= (_NOISE if first.noise else _ROUNDING):
        return None
    drawn = f"{', '.join(first.noise)} is much" if first.noise else "no dropout or noise is set that could explain it"
    return (
        f"one batch has a loss of {training:.4g} in training mode and {evaluation:.4g} in evaluation mode: {drawn}; "
        "look at what the model does only in training (dropout, noise, batch statistics, custom code)"
    )


def _gradients(gradients: GradientCoverage) -> list[str]:
    found = []
    if gradients.missing:
        found.append(
            f"{len(gradients.missing)} trained parameters are not used by the forward pass and will never change: "
            f"{_some(gradients.missing)}; freeze them, or look at why the model leaves them out (under several "
            "processes, which wait for their gradients, set ddp_find_unused_parameters: true)"
        )
    if gradients.zero:
        found.append(
            f"the gradient of {len(gradients.zero)} trained parameters is zero: {_some(gradients.zero)}; look at what "
            "cuts them off (weights that are zero, a detach, a format too narrow for such small numbers)"
        )
    return found


class TrustChecks:
    """Asks at the first step of a run, fresh or resumed, and looks at the learning rate of the second.

    Args:
        model: wrapped with an adapter or not.
        vocab_size: tokens that it can predict.
        from_scratch: whether its weights are random on purpose.
        noise_alpha: of NEFTune; 0 for none.
    """

    def __init__(
        self, model: torch.nn.Module, vocab_size: int, *, from_scratch: bool, noise_alpha: float = 0.0
    ) -> None:
        self._model, self._vocab_size, self._from_scratch = model, vocab_size, from_scratch
        self._noise = noise_sources(model) + ((f"neftune_noise_alpha {noise_alpha:g}",) if noise_alpha else ())
        self._evaluated: tuple[torch.Tensor, torch.Tensor] | None = None  # summed loss and tokens of the first pass
        self._trained: tuple[torch.Tensor, torch.Tensor] | None = None
        self._steps = 0
        self._is_open = True
        self._rate_is_open = True

    def before_pass(self, evaluate: Callable[[], TokenLoss]) -> None:
        """Runs the first pass's batch in evaluation mode: one forward pass, once in a run."""
        if self._evaluated is None:
            result = evaluate()
            self._evaluated = (result.nll, result.tokens)

    def forget_first_pass(self) -> None:
        """It is made again, in smaller pieces, of which the first is then looked at."""
        self._evaluated = self._trained = None

    def after_pass(self, trained: TokenLoss) -> None:
        """Keeps what the first pass gave in training mode; nothing is read from the device yet."""
        if self._trained is None:
            self._trained = (trained.nll, trained.tokens)

    @property
    def is_open(self) -> bool:
        """Whether a step's sums are still asked for; it is the same on all ranks."""
        return self._is_open

    def look(self, step: int, counts: TokenCounts) -> None:
        """Judges the first step that trains a token, before the optimizer makes it; every rank must call it.

        Args:
            step: optimizer steps made before it.
            counts: of this step, over all ranks.

        Raises:
            TrainingStopped: training would be useless: no parameter has a gradient, or no token is trained.
        """
        self._steps += 1
        if not counts.tokens:
            problem = Problem(
                f"step {step}: none of its {counts.input_tokens:,} tokens is trained: all labels are masked",
                "look with `preview` at what is trained: train_on, the format, the template's markers, max_seq_length",
            )
            if self._steps >= _PATIENCE:
                raise TrainingStopped(problem)
            logger.warning("%s", problem)
            return
        self._is_open = False
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
                    "look at what cuts the loss off from them: frozen or detached layers, gradient checkpointing with "
                    "use_reentrant on frozen embeddings, an adapter that is not active",
                )
            )
        logger.info("%s", first)
        for text in find_warnings(first):
            logger.warning("%s", text)

    def look_at_rates(self, made: int, left: int, rates: Sequence[float]) -> None:
        """Says where the learning rate stays 0. In the first step it is, where it is warmed up.

        Args:
            made: optimizer steps that this process made.
            left: steps to make, this one included.
            rates: the learning rates of the step that is about to be made.
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
    """What draws random numbers in training mode, e.g. `lora_dropout 0.1`: from the layers and from the config."""
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


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:_SHOWN]) + (f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else "")
