"""Moves what an earlier run left in the output folder aside before the next one; nothing is deleted.

Otherwise its checkpoints would count for `save_total_limit`, a later `auto` would resume from them, and its model would
lie beside the next one: a folder with both an adapter and a whole model loads as the adapter.
"""

from __future__ import annotations

import fnmatch
import logging
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from sft.checkpoint.discovery import checkpoints, step_of
from sft.errors import Problem, UserError

logger = logging.getLogger("sft")

# Files that make a folder load as a model or an adapter.
_WEIGHTS = (
    "config.json",
    "model*.safetensors",
    "model*.safetensors.index.json",
    "pytorch_model*.bin",
    "pytorch_model*.bin.index.json",
    "adapter_config.json",
    "adapter_model.*",
)
# Files beside them that would be read with the next model: a tokenizer without a chat template, for example, does not
# overwrite an older template. The card, the state and the config belong to the model that they describe.
_COMPANIONS = (
    "base_model.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "chat_template.jinja",
    "chat_template.json",
    "additional_chat_templates",
    "README.md",
    "trainer_state.json",
    "config.yaml",
)
# Logs that each run writes from the start. To `training_log.txt` all runs append; other files there are not the
# pipeline's, as the output of the job that runs it.
_LOGS = ("metrics.jsonl", "eval_results.json", "data_report.json", "tensorboard")


def forbid_overlap(output_dir: Path, named: Mapping[str, Any]) -> None:
    """Makes sure that a run neither overwrites nor moves aside what it starts from.

    Args:
        named: by config key, the paths of the model and its parts; values that are no text are ignored.

    Raises:
        UserError: one of them is the output folder, or a model's file or a checkpoint in it.
    """
    here = os.path.realpath(output_dir)
    problems = []
    for key, value in named.items():
        if not isinstance(value, str) or "\0" in value:
            continue
        place = os.path.realpath(value)
        folder, name = os.path.split(place)
        if place == here:
            message = f"is also {key}: the run would overwrite what it starts from"
        elif folder == here and (_is_any(name, _WEIGHTS + _COMPANIONS) or step_of(Path(name)) is not None):
            message = f"holds {key}, {name}: the run would move it aside or overwrite it"
        else:
            continue
        problems.append(Problem(message, "name another folder", "output_dir"))
    if problems:
        raise UserError(*problems)


def archive_previous_run(output_dir: Path, checkpoint: Path | None) -> None:
    """Moves what an earlier run left in `output_dir` into a folder of its own, `earlier-run-N`.

    Args:
        checkpoint: the one that the run resumes from; None for a start at step 0. Where it is in this folder, the
            older ones belong to the run and stay. Newer ones belong to the steps that are discarded, and a later
            `auto` would resume from them: they are moved, with the model that those steps may have ended in. The logs
            belong to both up to the checkpoint, so they are copied.
    """
    old = checkpoints(output_dir)
    own = [path for path in old if checkpoint is not None and checkpoint.samefile(path)]
    if own:
        old = old[old.index(own[0]) + 1 :]
        if not old:
            return
    entries = sorted(output_dir.iterdir())
    model = [path for path in entries if _is_any(path.name, _WEIGHTS)]
    logs = [path for name in _LOGS if (path := output_dir / "logs" / name).exists()]
    has_run = output_dir / "logs" / "metrics.jsonl" in logs  # also one that ended before it saved a model
    if not (old or model or has_run):
        return
    companions = [path for path in entries if _is_any(path.name, _COMPANIONS)]
    number = 1
    while (folder := output_dir / f"earlier-run-{number}").exists():
        number += 1
    folder.mkdir()
    for path in (*model, *companions, *old):
        path.rename(folder / path.name)
    if logs:
        (folder / "logs").mkdir()
    for path in logs:
        to = folder / "logs" / path.name
        if not own:
            path.rename(to)
        elif path.is_dir():
            shutil.copytree(path, to)
        else:
            shutil.copy2(path, to)
    what = [*(["the model"] if model else []), *(path.name for path in old), *(["its logs"] if logs else [])]
    logger.warning("Moved from an earlier run to %s: %s", folder, ", ".join(what))


def _is_any(name: str, patterns: tuple[str, ...]) -> bool:
    return any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)
