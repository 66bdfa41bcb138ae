"""What an earlier run left in the output folder makes room for the next one: moved aside, said aloud, never deleted.

Left there, its checkpoints would count for `save_total_limit`, a later `auto` would go on from them, and its model
would lie beside the next one: a folder with both an adapter and a whole model loads as the adapter.
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

# What alone makes a folder load as a model or an adapter.
_WEIGHTS = (
    "config.json",
    "model*.safetensors",
    "model*.safetensors.index.json",
    "pytorch_model*.bin",
    "pytorch_model*.bin.index.json",
    "adapter_config.json",
    "adapter_model.*",
)
# What lies beside them and would be read with the next model's: a tokenizer that has no chat template, say, does not
# overwrite an older one. The card, the state and the config belong to the model that they describe.
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
# What a run writes anew in its folder of logs. `training_log.txt` is the folder's own, which each run goes on in; what
# else lies there is not the pipeline's, as the output of the job that runs it.
_LOGS = ("metrics.jsonl", "eval_results.json", "data_report.json", "tensorboard")


def forbid_overlap(output_dir: Path, named: Mapping[str, Any]) -> None:
    """Makes sure that a run writes over nothing that it starts from, and moves nothing of it aside.

    Args:
        named: by key, what the config names the model and its parts with; values that are no text are passed over.

    Raises:
        UserError: one of them is the output folder, or a model's file or a checkpoint at its top level.
    """
    here = os.path.realpath(output_dir)
    problems = []
    for key, value in named.items():
        if not isinstance(value, str) or "\0" in value:
            continue
        place = os.path.realpath(value)
        folder, name = os.path.split(place)
        if place == here:
            message = f"is {key} too: the run would write over what it starts from"
        elif folder == here and (_is_any(name, _WEIGHTS + _COMPANIONS) or step_of(Path(name)) is not None):
            message = f"holds {key}, {name}: the run would move it aside or write over it"
        else:
            continue
        problems.append(Problem(message, "name another folder", "output_dir"))
    if problems:
        raise UserError(*problems)


def archive_previous_run(output_dir: Path, checkpoint: Path | None) -> None:
    """Moves what an earlier run left at the top of `output_dir` into a folder of its own, `earlier-run-N`.

    Args:
        checkpoint: the one that the run goes on from; None for a fresh start. Where it is one of this folder's, the
            older ones are the run's own past and stay. Newer ones are of a branch that it leaves, from which a later
            `auto` would go on: they make room with the model that the branch may have ended in. Of the logs, which
            both have in common up to the checkpoint, the branch gets a copy.
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
    was_run = output_dir / "logs" / "metrics.jsonl" in logs  # one that ended before it left a model, too
    if not (old or model or was_run):
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
        _hand_over(path, folder / "logs" / path.name, copied=bool(own))
    what = [*(["the model"] if model else []), *(path.name for path in old), *(["its logs"] if logs else [])]
    logger.warning("Left by an earlier run, and now in %s: %s", folder, ", ".join(what))


def _hand_over(path: Path, to: Path, *, copied: bool) -> None:
    if not copied:
        path.rename(to)
    elif path.is_dir():
        shutil.copytree(path, to)
    else:
        shutil.copy2(path, to)


def _is_any(name: str, patterns: tuple[str, ...]) -> bool:
    return any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)
