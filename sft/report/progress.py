"""Prints one line for each log, above progress bars for training and evaluation."""

from __future__ import annotations

import logging
import time
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

logger = logging.getLogger("sft")


class ConsoleProgress(TrainerCallback):
    """One readable line for each log, above bars for training and evaluation with the time that is left."""

    def __init__(self, console: Console, bars: bool = True) -> None:
        self._progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("eta"),
            TimeRemainingColumn(),
            console=console,
            transient=True,
            # A bar that is not on a terminal would leave an empty line behind each time that it is put up.
            disable=not bars or not console.is_terminal,
        )
        self._training: Any = None
        self._evaluation: Any = None
        self._started = (0.0, 0)

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Shows the training bar; on a resume it starts where the checkpoint stands."""
        if state.is_world_process_zero:
            self._started = (time.perf_counter(), state.global_step)
            self._training = self._progress.add_task("train", total=state.max_steps, completed=state.global_step)
            self._progress.start()

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Moves the training bar."""
        if self._training is not None:
            self._progress.update(self._training, completed=state.global_step)

    def on_prediction_step(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        eval_dataloader: Any = None,
        **kwargs: Any,
    ) -> None:
        """Moves the evaluation bar, which the first batch puts up."""
        if not state.is_world_process_zero:
            return
        if self._evaluation is None:
            total = len(eval_dataloader) if eval_dataloader is not None else None
            self._evaluation = self._progress.add_task("evaluate", total=total)
            self._progress.start()
        self._progress.advance(self._evaluation)

    def on_evaluate(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Takes the evaluation bar down."""
        if self._evaluation is not None:
            self._progress.remove_task(self._evaluation)
            self._evaluation = None
            if self._training is None:
                self._progress.stop()

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Takes the training bar down."""
        self.close()

    def close(self) -> None:
        """Takes everything down, also after an error."""
        if self._training is not None:
            self._progress.remove_task(self._training)
            self._training = None
        self._progress.stop()

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        """One line."""
        if state.is_world_process_zero and logs and (line := describe(logs)):
            done = state.global_step - self._started[1]
            left = (
                (time.perf_counter() - self._started[0]) / done * (state.max_steps - state.global_step) if done else 0
            )
            eta = f"  eta {_clock(left)}" if "loss" in logs and left else ""
            step = (
                f"step {state.global_step:>{len(str(state.max_steps))}}/{state.max_steps}  " if state.max_steps else ""
            )
            logger.info("%s%s%s", step, line, eta)


def describe(logs: dict[str, Any]) -> str:
    """The metrics of one log in a fixed order; empty for a log that has none of them (the Trainer's run summary)."""
    if "loss" in logs:
        return "  ".join(_shown(name, logs[name]) for name in _FORMATS if name in logs)
    prefixes = [name.removesuffix("_loss") for name in logs if name.endswith("_loss") and name != "train_loss"]
    return "  ".join(
        f"{prefix}: " + "  ".join(_shown(n, logs[f"{prefix}_{n}"]) for n in _FORMATS if f"{prefix}_{n}" in logs)
        for prefix in prefixes
    )


_FORMATS = {
    "epoch": "epoch {:.2f}",
    "loss": "loss {:.4f}",
    "perplexity": "ppl {:.4g}",
    "token_accuracy": "tokens right {:.1%}",
    "sequence_accuracy": "answers right {:.1%}",
    "learning_rate": "lr {:.2e}",
    "grad_norm": "grad {:.3g}",
    "tokens_per_second": "{:,.0f} tok/s",
    "mfu": "mfu {:.1%}",
    "memory_gb": "{:.1f} GiB",
}


def _shown(name: str, value: float) -> str:
    return _FORMATS[name].format(value)


def _clock(seconds: float) -> str:
    minutes, second = divmod(round(seconds), 60)
    hours, minute = divmod(minutes, 60)
    return f"{hours}:{minute:02}:{second:02}" if hours else f"{minute}:{second:02}"
