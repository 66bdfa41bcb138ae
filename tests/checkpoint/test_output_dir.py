"""Moving what an earlier run left in the output folder aside."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest

from sft.checkpoint.discovery import checkpoints
from sft.checkpoint.output_dir import archive_previous_run, forbid_overlap
from sft.errors import UserError
from sft.model.paths import is_adapter, is_model

ADAPTER = ["README.md", "adapter_config.json", "adapter_model.safetensors", "base_model.json"]
MODEL = ["config.json", "model-00001-of-00002.safetensors", "model.safetensors.index.json"]
BOTH = ["chat_template.jinja", "config.yaml", "generation_config.json", "tokenizer.json", "trainer_state.json"]
NOT_OF_A_MODEL = [".lock", "my_notes.txt", "train.jsonl"]


def leave(output_dir: Path, names: list[str], steps: tuple[int, ...] = ()) -> None:
    for name in names:
        (output_dir / name).write_text(f"{name} of {names[0]}")
    for step in steps:
        (output_dir / f"checkpoint-{step}").mkdir()


def names_in(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_a_new_run_moves_earlier_checkpoints_aside(tmp_path: Path) -> None:
    leave(tmp_path, [], steps=(8,))
    archive_previous_run(tmp_path, None)
    leave(tmp_path, [], steps=(4,))
    archive_previous_run(tmp_path, None)
    assert checkpoints(tmp_path) == []
    assert (tmp_path / "earlier-run-1" / "checkpoint-8").is_dir()
    assert (tmp_path / "earlier-run-2" / "checkpoint-4").is_dir()


@pytest.mark.parametrize("model", [ADAPTER + BOTH, MODEL + BOTH], ids=["adapter", "whole model"])
def test_a_new_run_moves_an_earlier_model_aside_with_its_checkpoints_and_logs_it(
    tmp_path: Path, model: list[str], caplog: pytest.LogCaptureFixture
) -> None:
    leave(tmp_path, model, steps=(8, 12))
    leave(tmp_path, NOT_OF_A_MODEL)
    keep_logs(tmp_path)
    with caplog.at_level(logging.WARNING, "sft"):
        archive_previous_run(tmp_path, None)
    assert names_in(tmp_path) == sorted([*NOT_OF_A_MODEL, "logs", "earlier-run-1"])
    earlier = tmp_path / "earlier-run-1"
    assert names_in(earlier) == sorted([*model, "checkpoint-8", "checkpoint-12", "logs"])
    assert all((earlier / name).read_text() == f"{name} of {model[0]}" for name in model), "moved as it was"
    assert is_adapter(earlier) == (model[0] == ADAPTER[0])
    assert is_model(earlier) == (model[0] == MODEL[0])
    assert caplog.messages == [
        f"Moved from an earlier run to {earlier}: the model, checkpoint-8, checkpoint-12, its logs"
    ]


LOGS = ["data_report.json", "eval_results.json", "metrics.jsonl", "tensorboard"]


def keep_logs(output_dir: Path) -> None:
    """All logs of a run, and the output of the job that it runs in."""
    (output_dir / "logs" / "tensorboard").mkdir(parents=True)
    (output_dir / "logs" / "tensorboard" / "events").write_text("events")
    leave(output_dir / "logs", [*LOGS[:3], "training_log.txt", "slurm-7.out"])


def test_a_new_run_moves_the_logs_that_it_would_overwrite(tmp_path: Path) -> None:
    """The text log is one for all runs; a run that was stopped early and left nothing else counts as well."""
    keep_logs(tmp_path)
    leave(tmp_path, ["config.yaml", "trainer_state.json"])
    archive_previous_run(tmp_path, None)
    assert names_in(tmp_path / "logs") == ["slurm-7.out", "training_log.txt"]
    earlier = tmp_path / "earlier-run-1"
    assert names_in(earlier) == ["config.yaml", "logs", "trainer_state.json"]
    assert names_in(earlier / "logs") == LOGS
    assert names_in(earlier / "logs" / "tensorboard") == ["events"]
    archive_previous_run(tmp_path, None)
    assert names_in(tmp_path) == ["earlier-run-1", "logs"], "nothing is left to move"


def test_a_resumed_run_keeps_its_logs_and_copies_them_for_the_discarded_steps(tmp_path: Path) -> None:
    keep_logs(tmp_path)
    leave(tmp_path, [], steps=(8, 12))
    archive_previous_run(tmp_path, tmp_path / "checkpoint-12")
    assert names_in(tmp_path / "logs") == sorted([*LOGS, "slurm-7.out", "training_log.txt"])
    archive_previous_run(tmp_path, tmp_path / "checkpoint-8")
    assert names_in(tmp_path / "logs") == sorted([*LOGS, "slurm-7.out", "training_log.txt"])
    assert names_in(tmp_path / "earlier-run-1") == ["checkpoint-12", "logs"]
    assert names_in(tmp_path / "earlier-run-1" / "logs") == LOGS
    assert names_in(tmp_path / "earlier-run-1" / "logs" / "tensorboard") == ["events"]


def test_a_folder_without_a_run_does_not_change(tmp_path: Path) -> None:
    leave(tmp_path, [*NOT_OF_A_MODEL, "README.md", "config.yaml"])
    before = names_in(tmp_path)
    archive_previous_run(tmp_path, None)
    assert names_in(tmp_path) == before


def test_resuming_from_an_older_checkpoint_moves_the_newer_ones_with_their_model(tmp_path: Path) -> None:
    """Otherwise a later `auto` would resume from the newest of them: from the discarded steps."""
    leave(tmp_path, ADAPTER, steps=(8, 12, 90, 100))
    archive_previous_run(tmp_path, tmp_path / "checkpoint-12")
    assert names_in(tmp_path) == ["checkpoint-12", "checkpoint-8", "earlier-run-1"]
    assert names_in(tmp_path / "earlier-run-1") == sorted([*ADAPTER, "checkpoint-90", "checkpoint-100"])


def test_resuming_from_the_newest_checkpoint_moves_nothing(tmp_path: Path) -> None:
    leave(tmp_path, ADAPTER, steps=(8, 12))
    (tmp_path / "link").symlink_to(tmp_path / "checkpoint-12")
    before = names_in(tmp_path)
    for newest in ("checkpoint-12", "link", "checkpoint-8/../checkpoint-12"):
        archive_previous_run(tmp_path, tmp_path / newest)
        assert names_in(tmp_path) == before


def test_resuming_from_another_folders_checkpoint_moves_this_folders_run(tmp_path: Path) -> None:
    there, here = tmp_path / "there", tmp_path / "here"
    for folder in (there, here):
        folder.mkdir()
        leave(folder, ADAPTER, steps=(4, 8))
    archive_previous_run(here, there / "checkpoint-8")
    assert names_in(here) == ["earlier-run-1"]
    archive_previous_run(here, here / "earlier-run-1" / "checkpoint-8")
    assert names_in(here / "earlier-run-1") == sorted([*ADAPTER, "checkpoint-4", "checkpoint-8"])


@pytest.mark.parametrize(
    ("inside", "refused"),
    [
        ("", "is also model_name_or_path"),
        ("checkpoint-8", "holds model_name_or_path, checkpoint-8"),
        ("config.json", "holds model_name_or_path, config.json"),
        ("earlier-run-1", None),
        ("earlier-run-1/checkpoint-8", None),
        ("../other", None),
    ],
)
def test_what_a_run_starts_from_is_neither_moved_nor_overwritten(
    tmp_path: Path, inside: str, refused: str | None
) -> None:
    output_dir, link = tmp_path / "out", tmp_path / "link"
    output_dir.mkdir()
    link.symlink_to(output_dir)
    for folder in (output_dir, link):
        named: dict[str, Any] = {
            "model_name_or_path": str(folder / inside),
            "tokenizer_name_or_path": None,
            "from_scratch": {},
        }
        if refused is None:
            forbid_overlap(output_dir, named)
        else:
            with pytest.raises(UserError, match=f"output_dir: {refused}"):
                forbid_overlap(output_dir, named)


def test_a_hub_name_and_a_template_written_in_the_config_are_no_paths(tmp_path: Path) -> None:
    template = "{% for m in messages %}" + "{{ m.content }}\n" * 400 + "{% endfor %}"
    forbid_overlap(tmp_path, {"model_name_or_path": "owner/name", "chat_template": template})
