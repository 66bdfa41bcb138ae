"""Finds the checkpoint to resume from; one that is missing or incomplete is reported, never skipped silently."""

from __future__ import annotations

import json
import logging
import re
import zipfile
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from sft.errors import Problem, UserError

logger = logging.getLogger("sft")

_STATE_FILES = ("trainer_state.json", "optimizer.pt", "scheduler.pt")
RUN_SHAPE, STREAM_STATE = "run_shape.json", "stream_state.json"  # here because `check` must not import torch


def find_checkpoint(wanted: str | bool | None, output_dir: Path) -> Path | None:
    """Finds the checkpoint to resume from; None to start at step 0.

    Args:
        wanted: a path; `auto` or True for the newest complete one in `output_dir`; False or None for step 0.

    Raises:
        UserError: the path does not exist, or its checkpoint or all in `output_dir` are incomplete.
    """
    if not wanted:
        return None
    if wanted is not True and wanted != "auto":
        path = Path(wanted)
        if not path.is_dir():
            there = ", ".join(p.name for p in checkpoints(output_dir)) or "none"
            hint = f"checkpoints in {output_dir}: {there}; `auto` takes the newest complete one"
            raise UserError(Problem(f"no such checkpoint: {wanted!r}", hint, "resume_from_checkpoint"))
        if damage := find_damage(path):
            hint = "give an earlier checkpoint, or `auto` for the newest complete one"
            message = f"the checkpoint {wanted!r} is incomplete: {damage}"
            raise UserError(Problem(message, hint, "resume_from_checkpoint"))
        return path
    damaged = []
    for path in reversed(checkpoints(output_dir)):
        if not (damage := find_damage(path)):
            return path
        logger.warning("%s is incomplete (%s) and is skipped", path, damage)
        damaged.append(path.name)
    if damaged:
        hint = "to start from step 0, remove resume_from_checkpoint"
        message = f"none of the checkpoints in {output_dir} can be resumed: {', '.join(damaged)}"
        raise UserError(Problem(message, hint, "resume_from_checkpoint"))
    logger.info("resume_from_checkpoint: no checkpoint in %s yet: starting from step 0", output_dir)
    return None


def describe_resume(output_dir: Path) -> str:
    """Describes how to resume a run that is stopped: the checkpoint that `auto` will find.

    It is the newest with all files; `find_damage` reads them, which takes minutes where they are large.
    """
    for path in reversed(checkpoints(output_dir)):
        if all((path / name).is_file() for name in _STATE_FILES):
            return f"--resume_from_checkpoint auto resumes from {path}"
    return "no checkpoint was written yet"


def require_best(checkpoint: Path) -> Path:
    """Returns `checkpoint`, the best of a finished run; raises `UserError` where it is gone or incomplete."""
    damage = find_damage(checkpoint) if checkpoint.is_dir() else "it no longer exists"
    if damage:
        message = f"the run is finished, and its best checkpoint {str(checkpoint)!r} cannot be loaded: {damage}"
        raise UserError(Problem(message, "set it to false to keep the last weights", "load_best_model_at_end"))
    return checkpoint


def checkpoints(output_dir: Path) -> list[Path]:
    """Lists the `checkpoint-N` folders in `output_dir`, by N."""
    found = [p for p in output_dir.glob("checkpoint-*") if step_of(p) is not None and p.is_dir()]
    return sorted(found, key=lambda p: step_of(p) or 0)


def step_of(checkpoint: Path) -> int | None:
    """Returns the N of a folder named `checkpoint-N`; None for other names."""
    named = re.fullmatch(r"checkpoint-(\d+)", checkpoint.name)
    return int(named[1]) if named else None


def find_damage(checkpoint: Path) -> str | None:
    """Describes what is missing or truncated in a checkpoint; None where it is complete.

    Weights are checked by their file's length, the other files by their checksums: this finds every interrupted write.
    """
    for name in _STATE_FILES:
        if not (checkpoint / name).is_file():
            return f"{name} is missing"
    state = _read_json(checkpoint / "trainer_state.json")
    if not isinstance(state, dict) or "global_step" not in state:
        return "trainer_state.json has no step"
    weights = sorted(checkpoint.glob("*.safetensors"))
    if not weights:
        return "no weights (*.safetensors)"
    index = checkpoint / "model.safetensors.index.json"
    if index.is_file():
        content = _read_json(index)
        if not isinstance(content, dict) or "weight_map" not in content:
            return f"{index.name} has no list of shards"
        if missing := sorted({n for n in content["weight_map"].values() if not (checkpoint / n).is_file()}):
            return f"{missing[0]} is missing"
    if damage := _find_damage_of_records(checkpoint):
        return damage
    for file in weights:
        if not _is_complete_safetensors(file):
            return f"{file.name} is truncated"
    for file in sorted(checkpoint.glob("*.pt")) + sorted(checkpoint.glob("*.pth")):
        if not _is_complete_zip(file):
            return f"{file.name} is damaged"
    return None


def _find_damage_of_records(checkpoint: Path) -> str | None:
    """Describes what is wrong with this pipeline's own files, or which rank's random state is missing.

    A checkpoint of another trainer has no such files, and the number of its ranks is not known. The Trainer resumes
    without a random state and draws other numbers.
    """
    shape_file, stream_file = checkpoint / RUN_SHAPE, checkpoint / STREAM_STATE
    content = _read_json(shape_file) if shape_file.is_file() else {"shape": {}, "counts": {}}
    if not (isinstance(content, dict) and isinstance(content.get("shape"), dict) and "counts" in content):
        return f"{RUN_SHAPE} is damaged"
    if content["shape"].get("streamed_data") is not None:
        if not stream_file.is_file():
            return f"{STREAM_STATE} is missing"
        if not isinstance(_read_json(stream_file), dict):
            return f"{STREAM_STATE} is damaged"
    world_size = content["shape"].get("world_size")
    if world_size is None:
        return None if any(checkpoint.glob("rng_state*.pth")) else "rng_state.pth is missing"
    ranks = content.get("ranks", range(world_size))
    names = ["rng_state.pth"] if world_size == 1 else [f"rng_state_{rank}.pth" for rank in ranks]
    return next((f"{name} is missing" for name in names if not (checkpoint / name).is_file()), None)


def _read_json(file: Path) -> Any:
    """Returns the content, or None if it is not JSON."""
    try:
        return json.loads(file.read_text())
    except ValueError:
        return None


def _is_complete_zip(file: Path) -> bool:
    """Returns whether all parts of a file of torch.save, which is a zip archive, match their checksums."""
    try:
        with zipfile.ZipFile(file) as archive:
            return archive.testzip() is None
    except (zipfile.BadZipFile, OSError, EOFError):
        return False


def _is_complete_safetensors(file: Path) -> bool:
    """Returns whether the file is as long as its header says; the tensors are not read."""
    try:
        with safe_open(file, framework="numpy"):
            return True
    except SafetensorError:
        return False
