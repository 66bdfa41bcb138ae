"""Progress on the console: one line per log, above bars for training and evaluation."""

from __future__ import annotations

import logging
import time
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

logger = logging.getLogger("sft")


class ConsoleProgress(TrainerCallback):
    """Logs one line of metrics per log, and shows progress bars with the time that is left, until `close`."""

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
            # Without a terminal, each start of a bar would print an empty line.
            disable=not bars or not console.is_terminal,
        )
        self._training: Any = None
        self._evaluation: Any = None
        self._start_time, self._start_step = 0.0, 0

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Shows the training bar, which begins at the checkpoint's step on a resume."""
        if state.is_world_process_zero:
            self._start_time, self._start_step = time.perf_counter(), state.global_step
            self._training = self._progress.add_task("train", total=state.max_steps, completed=state.global_step)
            self._progress.start()

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Advances the training bar."""
        if self._training is not None:
            self._progress.update(self._training, completed=state.global_step)

    def on_prediction_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Advances the evaluation bar, which the first batch adds."""
        if not state.is_world_process_zero:
            return
        if self._evaluation is None:
            self._evaluation = self._progress.add_task("evaluate", total=len(kwargs["eval_dataloader"]))
            self._progress.start()
        self._progress.advance(self._evaluation)

    def on_evaluate(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Removes the evaluation bar."""
        if self._evaluation is not None:
            self._progress.remove_task(self._evaluation)
            self._evaluation = None
            if self._training is None:
                self._progress.stop()

    def close(self) -> None:
        """Removes all bars, also after an error."""
        if self._training is not None:
            self._progress.remove_task(self._training)
            self._training = None
        self._progress.stop()

    def on_log(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Logs the step, its metrics and the time that is left."""
        logs: dict[str, Any] = kwargs["logs"]
        if state.is_world_process_zero and logs and (metrics := describe(logs)):
            total = state.max_steps
            step = f"step {state.global_step:>{len(str(total))}}/{total}  " if total else ""
            left = self._seconds_left(state) if "loss" in logs else 0
            logger.info("%s%s%s", step, metrics, f"  eta {_clock(left)}" if left else "")

    def _seconds_left(self, state: TrainerState) -> float:
        done = state.global_step - self._start_step
        seconds = time.perf_counter() - self._start_time
        return seconds / done * (state.max_steps - state.global_step) if done else 0


def describe(logs: dict[str, Any]) -> str:
    """Formats the metrics of one log in a fixed order; empty for a log without any (the Trainer's run summary)."""
    if "loss" in logs:
        return _describe(logs, "")
    prefixes = [name.removesuffix("loss") for name in logs if name.endswith("_loss") and name != "train_loss"]
    return "  ".join(f"{prefix[:-1]}: {_describe(logs, prefix)}" for prefix in prefixes)


def _describe(logs: dict[str, Any], prefix: str) -> str:
    return "  ".join(text.format(logs[prefix + name]) for name, text in _FORMATS.items() if prefix + name in logs)


_FORMATS = {
    "epoch": "epoch {:.2f}",
    "loss": "loss {:.4f}",
    "perplexity": "ppl {:.4g}",
    "token_accuracy": "token acc {:.1%}",
    "sequence_accuracy": "seq acc {:.1%}",
    "learning_rate": "lr {:.2e}",
    "grad_norm": "grad {:.3g}",
    "tokens_per_second": "{:,.0f} tok/s",
    "mfu": "mfu {:.1%}",
    "memory_gb": "{:.1f} GiB",
}


def _clock(seconds: float) -> str:
    minutes, second = divmod(round(seconds), 60)
    hours, minute = divmod(minutes, 60)
    return f"{hours}:{minute:02}:{second:02}" if hours else f"{minute}:{second:02}"
