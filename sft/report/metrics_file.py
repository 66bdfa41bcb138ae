"""The metrics of a run, in `metrics.jsonl`."""

from __future__ import annotations

import json
import logging
import math
import time
from pathlib import Path
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

logger = logging.getLogger("sft")


class MetricsFile(TrainerCallback):
    """Appends every log to `metrics.jsonl`, one JSON object per line.

    A new run empties the file; a resumed run drops the lines after its checkpoint, whose steps are trained again.
    """

    def __init__(self, logs_dir: Path) -> None:
        self._file = logs_dir / "metrics.jsonl"

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Keeps the lines up to the step that the run resumes from, and no others."""
        if not state.is_world_process_zero:
            return
        kept = []
        if state.global_step and self._file.is_file():
            steps = [(_step_of(line), line) for line in self._file.read_text(errors="replace").splitlines()]
            kept = [line for step, line in steps if step is not None and step <= state.global_step]
            if cut := sum(step is None for step, _ in steps):
                logger.warning("%s: %d unreadable lines are dropped, probably cut off by a kill", self._file, cut)
        self._file.parent.mkdir(parents=True, exist_ok=True)
        self._file.write_text("".join(f"{line}\n" for line in kept))

    def on_log(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Appends one line; NaN and infinity, which JSON does not have, are written as text."""
        logs: dict[str, Any] = kwargs["logs"]
        if state.is_world_process_zero and logs:
            values = {k: str(v) if isinstance(v, float) and not math.isfinite(v) else v for k, v in logs.items()}
            with self._file.open("a") as stream:
                stream.write(json.dumps({"step": state.global_step, "time": time.time(), **values}) + "\n")


def _step_of(line: str) -> int | None:
    """Returns the step of a line; None for a line that cannot be read, e.g. one that a killed process left."""
    try:
        return int(json.loads(line)["step"])
    except (ValueError, KeyError, TypeError):
        return None
