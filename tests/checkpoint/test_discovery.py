"""Finding the checkpoint that a run resumes from."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from sft.checkpoint import compatibility
from sft.checkpoint.compatibility import ResumeFingerprint
from sft.checkpoint.discovery import checkpoints, describe_resume, find_checkpoint, find_damage, require_best
from sft.errors import UserError
from sft.loss.metrics import TokenCounts


def make_checkpoint(output_dir: Path, step: int) -> Path:
    folder = output_dir / f"checkpoint-{step}"
    folder.mkdir(parents=True)
    save_file({"w": torch.ones(100)}, folder / "model.safetensors")
    torch.save({"state": {}}, folder / "optimizer.pt")
    torch.save({"last_epoch": step}, folder / "scheduler.pt")
    torch.save({"cpu": torch.get_rng_state()}, folder / "rng_state.pth")
    (folder / "trainer_state.json").write_text('{"global_step": 1}')
    write_shape(folder, world_size=1, streamed_data="3f")
    (folder / "stream_state.json").write_text('{"places": []}')
    return folder


def write_shape(folder: Path, **shape: Any) -> None:
    (folder / "run_shape.json").write_text(json.dumps({"shape": shape, "counts": {}, "skipped": 0}))


def cut(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-10])


def test_auto_takes_the_newest_by_number_not_by_name(tmp_path: Path) -> None:
    for step in (90, 100, 20):
        make_checkpoint(tmp_path, step)
    assert find_checkpoint("auto", tmp_path) == tmp_path / "checkpoint-100"
    assert find_checkpoint(True, tmp_path) == tmp_path / "checkpoint-100"
    assert [p.name for p in checkpoints(tmp_path)] == ["checkpoint-20", "checkpoint-90", "checkpoint-100"]


def test_a_stopped_run_names_its_newest_checkpoint(tmp_path: Path) -> None:
    assert describe_resume(tmp_path) == "no checkpoint was written yet"
    for step in (90, 100):
        make_checkpoint(tmp_path, step)
    (tmp_path / "checkpoint-100" / "trainer_state.json").unlink()  # which is written last
    assert describe_resume(tmp_path) == f"--resume_from_checkpoint auto resumes from {tmp_path / 'checkpoint-90'}"


def overwrite(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[64:128] = bytes(64)
    file.write_bytes(bytes(content))


DAMAGE = {
    "weights cut short": lambda c: cut(c / "model.safetensors"),
    "weights gone": lambda c: (c / "model.safetensors").unlink(),
    "weights empty": lambda c: (c / "model.safetensors").write_bytes(b""),
    "optimizer gone": lambda c: (c / "optimizer.pt").unlink(),
    "optimizer cut short": lambda c: cut(c / "optimizer.pt"),
    "state gone": lambda c: (c / "trainer_state.json").unlink(),
    "state cut short": lambda c: (c / "trainer_state.json").write_text('{"global_st'),
    "rng cut short": lambda c: cut(c / "rng_state.pth"),
    "rng gone": lambda c: (c / "rng_state.pth").unlink(),
    "state empty": lambda c: (c / "trainer_state.json").write_text("{}"),
    "optimizer overwritten": lambda c: overwrite(c / "optimizer.pt"),
    "index cut short": lambda c: (c / "model.safetensors.index.json").write_text('{"weight_m'),
    "shape cut short": lambda c: cut(c / "run_shape.json"),
    "shape empty": lambda c: (c / "run_shape.json").write_text(""),
    "shape of nothing": lambda c: (c / "run_shape.json").write_text("[]"),
    "stream cut short": lambda c: cut(c / "stream_state.json"),
    "stream gone": lambda c: (c / "stream_state.json").unlink(),
    "a shard gone": lambda c: (c / "model.safetensors.index.json").write_text(
        '{"weight_map": {"a": "gone.safetensors"}}'
    ),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_auto_skips_a_damaged_checkpoint_and_a_path_to_it_is_an_error(tmp_path: Path, damage: str) -> None:
    whole, broken = make_checkpoint(tmp_path, 10), make_checkpoint(tmp_path, 20)
    assert find_damage(broken) is None
    DAMAGE[damage](broken)
    assert find_damage(broken) is not None
    assert find_checkpoint("auto", tmp_path) == whole
    with pytest.raises(UserError, match="is incomplete"):
        find_checkpoint(str(broken), tmp_path)


def test_only_a_streaming_run_needs_the_state_of_a_stream(tmp_path: Path) -> None:
    plain, foreign = make_checkpoint(tmp_path, 10), make_checkpoint(tmp_path, 20)
    write_shape(plain, world_size=1, streamed_data=None)
    (plain / "stream_state.json").unlink()
    assert find_damage(plain) is None
    for name in ("run_shape.json", "stream_state.json"):
        (foreign / name).unlink()
    assert find_damage(foreign) is None, "another trainer's"


def test_a_checkpoint_needs_the_random_state_of_every_rank_that_wrote_into_it(tmp_path: Path) -> None:
    checkpoint = make_checkpoint(tmp_path, 10)
    state = checkpoint / "rng_state.pth"
    write_shape(checkpoint, world_size=3)
    assert find_damage(checkpoint) == "rng_state_0.pth is missing", (
        "the state of a single process does not count for three"
    )
    for rank in (0, 2):
        shutil.copy(state, checkpoint / f"rng_state_{rank}.pth")
    state.rename(tmp_path / "rng_state.pth")
    assert find_damage(checkpoint) == "rng_state_1.pth is missing"
    shutil.copy(tmp_path / "rng_state.pth", checkpoint / "rng_state_1.pth")
    assert find_damage(checkpoint) is None
    write_shape(checkpoint, world_size=1)
    assert find_damage(checkpoint) == "rng_state.pth is missing"
    (checkpoint / "run_shape.json").unlink()
    assert find_damage(checkpoint) is None, "the number of another trainer's ranks is not known"


def test_nodes_without_a_shared_disk_hold_the_random_states_of_their_own_ranks(tmp_path: Path) -> None:
    """As with `save_on_each_node`: the second of two nodes with two ranks each."""
    checkpoint = make_checkpoint(tmp_path, 10)
    shape = ResumeFingerprint(4, 2, 3, 40, "3f", 0, None, "random")
    compatibility.save(checkpoint, shape, TokenCounts.zero(), 0, range(2, 4), None)
    (checkpoint / "rng_state.pth").rename(checkpoint / "rng_state_2.pth")
    assert find_damage(checkpoint) == "rng_state_3.pth is missing"
    shutil.copy(checkpoint / "rng_state_2.pth", checkpoint / "rng_state_3.pth")
    assert find_damage(checkpoint) is None
    compatibility.save(checkpoint, shape, TokenCounts.zero(), 0, range(4), None)
    assert find_damage(checkpoint) == "rng_state_0.pth is missing"


def test_a_missing_path_is_an_error_that_names_the_checkpoints(tmp_path: Path) -> None:
    make_checkpoint(tmp_path, 10)
    with pytest.raises(UserError, match=r"no such checkpoint.*(\n.*)*checkpoint-10"):
        find_checkpoint(str(tmp_path / "checkpoint-11"), tmp_path)


def test_without_a_checkpoint_a_run_starts_at_step_0(tmp_path: Path) -> None:
    assert find_checkpoint("auto", tmp_path) is None
    assert find_checkpoint(False, tmp_path) is None
    shutil.rmtree(make_checkpoint(tmp_path, 5))
    assert find_checkpoint("auto", tmp_path) is None


def test_auto_with_only_damaged_checkpoints_is_an_error(tmp_path: Path) -> None:
    (make_checkpoint(tmp_path, 5) / "optimizer.pt").unlink()
    with pytest.raises(UserError, match="none of the checkpoints"):
        find_checkpoint("auto", tmp_path)


def test_a_best_checkpoint_that_is_missing_or_incomplete_is_an_error(tmp_path: Path) -> None:
    best = make_checkpoint(tmp_path, 5)
    assert require_best(best) == best
    cut(best / "model.safetensors")
    with pytest.raises(UserError, match=r"best checkpoint .*checkpoint-5.* model.safetensors is truncated"):
        require_best(best)
    shutil.rmtree(best)
    with pytest.raises(UserError, match=r"load_best_model_at_end: .* it no longer exists"):
        require_best(best)
