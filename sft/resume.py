"""Which checkpoint a run goes on from; one that is missing or not whole is said, never stepped over in silence."""

from __future__ import annotations

import json
import logging
import re
import struct
import zipfile
from pathlib import Path

from sft.errors import Problem, UserError

logger = logging.getLogger("sft")

_STATE_FILES = ("trainer_state.json", "optimizer.pt", "scheduler.pt")


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
        path = Path(wanted).expanduser()
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
    for path in reversed(checkpoints(output_dir)):
        damage = find_damage(path)
        if damage is None:
            return path
        logger.warning("%s is not whole (%s) and is left alone", path, damage)
    logger.info("resume_from_checkpoint: %s found no checkpoint in %s: starting from step 0", wanted, output_dir)
    return None


def checkpoints(output_dir: Path) -> list[Path]:
    """The `checkpoint-N` folders in `output_dir`, by N."""
    found = [p for p in output_dir.glob("checkpoint-*") if re.fullmatch(r"checkpoint-\d+", p.name) and p.is_dir()]
    return sorted(found, key=lambda p: int(p.name.rpartition("-")[2]))


def find_damage(checkpoint: Path) -> str | None:
    """What is missing or cut short in a checkpoint; None when it is whole.

    Reads file tables and sizes, not the tensors: enough to find every interrupted write, in milliseconds.
    """
    for name in _STATE_FILES:
        if not (checkpoint / name).is_file():
            return f"{name} is missing"
    try:
        json.loads((checkpoint / "trainer_state.json").read_text())
    except ValueError:
        return "trainer_state.json is not JSON"
    weights = sorted(checkpoint.glob("*.safetensors"))
    if not weights:
        return "no weights (*.safetensors)"
    if missing := [name for name in _indexed_shards(checkpoint) if not (checkpoint / name).is_file()]:
        return f"{missing[0]} is missing"
    for file in weights:
        if not _safetensors_is_whole(file):
            return f"{file.name} is cut short"
    for file in sorted(checkpoint.glob("*.pt")) + sorted(checkpoint.glob("*.pth")):
        if not zipfile.is_zipfile(file):
            return f"{file.name} is cut short"
    return None


def _indexed_shards(checkpoint: Path) -> list[str]:
    index = checkpoint / "model.safetensors.index.json"
    if not index.is_file():
        return []
    return sorted(set(json.loads(index.read_text())["weight_map"].values()))


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
