"""Which checkpoint a run goes on from; one that is missing or not whole is said, never stepped over in silence."""

from __future__ import annotations

import json
import logging
import re
import struct
import zipfile
from pathlib import Path
from typing import Any

from sft.errors import Problem, UserError

logger = logging.getLogger("sft")

_STATE_FILES = ("trainer_state.json", "optimizer.pt", "scheduler.pt")
RUN_SHAPE, STREAM_STATE = "run_shape.json", "stream_state.json"  # their modules import torch; `check` does without


def find_checkpoint(wanted: str | bool | None, output_dir: Path) -> Path | None:
    """The checkpoint to resume from, or None to start fresh.

    Args:
        wanted: a path; `auto` or True for the newest whole one in `output_dir`; False or None for a fresh start.

    Raises:
        UserError: the path does not exist, or the checkpoint there is not whole.
    """
    if not wanted:
        return None
    if wanted is not True and wanted != "auto":
        path = Path(wanted)
        if not path.is_dir():
            there = ", ".join(p.name for p in checkpoints(output_dir)) or "none"
            hint = f"checkpoints in {output_dir}: {there}; `auto` takes the newest whole one"
            raise UserError(Problem(f"no such checkpoint: {wanted!r}", hint, "resume_from_checkpoint"))
        if damage := find_damage(path):
            hint = "give an earlier checkpoint, or `auto` for the newest whole one"
            raise UserError(
                Problem(f"the checkpoint {wanted!r} is not whole: {damage}", hint, "resume_from_checkpoint")
            )
        return path
    damaged = []
    for path in reversed(checkpoints(output_dir)):
        damage = find_damage(path)
        if damage is None:
            return path
        logger.warning("%s is not whole (%s) and is passed over", path, damage)
        damaged.append(path.name)
    if damaged:
        hint = "to start from step 0 all the same, remove resume_from_checkpoint"
        message = f"none of the checkpoints in {output_dir} can be resumed: {', '.join(damaged)}"
        raise UserError(Problem(message, hint, "resume_from_checkpoint"))
    logger.info("resume_from_checkpoint: no checkpoint in %s yet: starting from step 0", output_dir)
    return None


def where_to_go_on(output_dir: Path) -> str:
    """What to tell of a run that is stopped: which of its checkpoints `auto` will find.

    The newest with all files; `find_damage`, which reads them, would take minutes where they are large.
    """
    for path in reversed(checkpoints(output_dir)):
        if all((path / name).is_file() for name in _STATE_FILES):
            return f"--resume_from_checkpoint auto goes on from {path}"
    return "no checkpoint was written yet"


def require_best(checkpoint: Path) -> Path:
    """`checkpoint`, the best of a run that is finished. Raises `UserError` where it is gone or not whole."""
    damage = find_damage(checkpoint) if checkpoint.is_dir() else "it does not exist any more"
    if damage:
        message = f"the run is finished, and its best checkpoint {str(checkpoint)!r} cannot be loaded: {damage}"
        raise UserError(Problem(message, "set it to false to keep the last weights", "load_best_model_at_end"))
    return checkpoint


def checkpoints(output_dir: Path) -> list[Path]:
    """The `checkpoint-N` folders in `output_dir`, by N."""
    found = [p for p in output_dir.glob("checkpoint-*") if step_of(p) is not None and p.is_dir()]
    return sorted(found, key=lambda p: step_of(p) or 0)


def step_of(checkpoint: Path) -> int | None:
    """The N of a folder named `checkpoint-N`; None where it is named otherwise."""
    named = re.fullmatch(r"checkpoint-(\d+)", checkpoint.name)
    return int(named[1]) if named else None


def find_damage(checkpoint: Path) -> str | None:
    """What is missing or cut short in a checkpoint; None when it is whole.

    Weights are checked by their file's length, all else by its checksums: enough to find every interrupted write.
    """
    for name in _STATE_FILES:
        if not (checkpoint / name).is_file():
            return f"{name} is missing"
    state = _read_json(checkpoint / "trainer_state.json")
    if not isinstance(state, dict) or "global_step" not in state:
        return "trainer_state.json does not tell the step"
    weights = sorted(checkpoint.glob("*.safetensors"))
    if not weights:
        return "no weights (*.safetensors)"
    index = checkpoint / "model.safetensors.index.json"
    if index.is_file():
        content = _read_json(index)
        if not isinstance(content, dict) or "weight_map" not in content:
            return f"{index.name} does not name the shards"
        if missing := sorted({n for n in content["weight_map"].values() if not (checkpoint / n).is_file()}):
            return f"{missing[0]} is missing"
    if damage := _damage_of_records(checkpoint) or _missing_random_state(checkpoint):
        return damage
    for file in weights:
        if not _safetensors_is_whole(file):
            return f"{file.name} is cut short"
    for file in sorted(checkpoint.glob("*.pt")) + sorted(checkpoint.glob("*.pth")):
        if not _zip_is_whole(file):
            return f"{file.name} is damaged"
    return None


def _damage_of_records(checkpoint: Path) -> str | None:
    """What is wrong with the files that are ours; a checkpoint of another trainer has none of them."""
    if not (checkpoint / RUN_SHAPE).is_file():
        return None
    content = _read_json(checkpoint / RUN_SHAPE)
    if not (isinstance(content, dict) and isinstance(content.get("shape"), dict) and "counts" in content):
        return f"{RUN_SHAPE} is damaged"
    if content["shape"].get("streamed_data") is None:
        return None
    if not (checkpoint / STREAM_STATE).is_file():
        return f"{STREAM_STATE} is missing"
    return None if isinstance(_read_json(checkpoint / STREAM_STATE), dict) else f"{STREAM_STATE} is damaged"


def _missing_random_state(checkpoint: Path) -> str | None:
    """Which rank's random state is not there: each rank writes its own, and one that finds none goes on without."""
    content = _read_json(checkpoint / RUN_SHAPE) if (checkpoint / RUN_SHAPE).is_file() else {"shape": {}}
    world_size = content["shape"].get("world_size")
    if world_size is None:  # another trainer's: how many ranks it had is not told
        return None if any(checkpoint.glob("rng_state*.pth")) else "rng_state.pth is missing"
    ranks = content.get("ranks", range(world_size))
    names = ["rng_state.pth"] if world_size == 1 else [f"rng_state_{rank}.pth" for rank in ranks]
    return next((f"{name} is missing" for name in names if not (checkpoint / name).is_file()), None)


def _read_json(file: Path) -> Any:
    """The content, or None when it is not JSON."""
    try:
        return json.loads(file.read_text())
    except ValueError:
        return None


def _zip_is_whole(file: Path) -> bool:
    """Whether a file of torch.save, which is a zip, has every part with the checksum that it was written with."""
    try:
        with zipfile.ZipFile(file) as archive:
            return archive.testzip() is None
    except (zipfile.BadZipFile, OSError, EOFError):
        return False


def _safetensors_is_whole(file: Path) -> bool:
    """Whether the file is as long as its header says (8 bytes of header length, the header, the tensors)."""
    size = file.stat().st_size
    with file.open("rb") as stream:
        start = stream.read(8)
        if len(start) < 8:
            return False
        (header_length,) = struct.unpack("<Q", start)
        if 8 + header_length > size:
            return False
        try:
            header = json.loads(stream.read(header_length))
        except ValueError:
            return False
    end = max((tensor["data_offsets"][1] for name, tensor in header.items() if name != "__metadata__"), default=0)
    return 8 + header_length + end == size
