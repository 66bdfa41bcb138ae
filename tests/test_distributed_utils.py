"""Ranks, devices and process groups."""

from __future__ import annotations

import json
import logging
import os
import subprocess
import sys
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

import distributed_utils as du
from sft.config.schema import TrainingKeys
from sft.distributed import gpus
from sft.errors import UserError
from tests.ranks import pretend_gpus
from tests.runs import ROOT

TORCHRUN = {"RANK": "5", "WORLD_SIZE": "8", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "4"}


@pytest.fixture(autouse=True)
def _no_group(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in (*TORCHRUN, "CUDA_VISIBLE_DEVICES"):
        monkeypatch.delenv(name, raising=False)


def pretend_torchrun(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in TORCHRUN.items():
        monkeypatch.setenv(name, value)


def test_a_single_process() -> None:
    assert not du.is_launched()
    assert (du.rank(), du.local_rank(), du.world_size(), du.local_world_size()) == (0, 0, 1, 1)
    assert du.is_main_process()


def test_a_process_of_a_group(monkeypatch: pytest.MonkeyPatch) -> None:
    pretend_torchrun(monkeypatch)
    assert du.is_launched()
    assert (du.rank(), du.local_rank(), du.world_size(), du.local_world_size()) == (5, 1, 8, 4)
    assert not du.is_main_process()
    monkeypatch.setenv("LOCAL_RANK", "0")
    assert not du.is_main_process()


@pytest.mark.parametrize("visible", ["", "-1", " "])
def test_hidden_gpus_are_none(monkeypatch: pytest.MonkeyPatch, visible: str) -> None:
    monkeypatch.setattr(gpus, "has_gpu_driver", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    assert gpus.visible_gpus() == 4
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    assert gpus.visible_gpus() == 0


def test_a_driver_is_seen_by_its_device_node(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(gpus, "DEVICES", tmp_path)
    (tmp_path / "nvidiactl").touch()
    assert not gpus.has_gpu_driver()
    (tmp_path / "nvidia0").touch()
    assert gpus.has_gpu_driver()


def test_enough_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    pretend_gpus(monkeypatch, 2)
    gpus.require_gpus(2)
    gpus.require_gpus(0)


@pytest.mark.parametrize(
    ("found", "wanted", "visible", "message", "hint"),
    [
        (0, 1, None, "1 GPU asked for, and no GPU is visible here", "leave it out to train on the CPU"),
        (1, 2, None, "2 GPUs asked for, and 1 GPU is visible here", "ask for 1 at the most"),
        (
            *(2, 8, "0,1"),
            "8 GPUs asked for, and 2 GPUs are visible here",
            "ask for 2 at the most; CUDA_VISIBLE_DEVICES='0,1' limits what is seen",
        ),
    ],
)
def test_too_few_gpus(
    monkeypatch: pytest.MonkeyPatch, found: int, wanted: int, visible: str | None, message: str, hint: str
) -> None:
    pretend_gpus(monkeypatch, found)
    if visible:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    with pytest.raises(UserError) as raised:
        du.claim_devices(wanted)
    (problem,) = raised.value.problems
    assert (problem.key, problem.message, problem.hint) == ("num_gpus", message, hint)


def test_a_torch_without_gpu_support_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpus, "has_gpu_driver", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    monkeypatch.setattr(torch.version, "cuda", None)
    with pytest.raises(UserError, match="is a build without GPU support"):
        gpus.require_gpus(1)


@pytest.mark.parametrize("has_units", [True, False])
def test_tf32_needs_a_gpu_that_has_it(monkeypatch: pytest.MonkeyPatch, has_units: bool) -> None:
    pretend_gpus(monkeypatch, 1)
    monkeypatch.setattr("transformers.utils.is_torch_tf32_available", lambda: has_units)
    wanted, unwanted = (TrainingKeys.model_validate({"tf32": value}) for value in (True, False))
    with nullcontext() if has_units else pytest.raises(UserError, match="tf32: needs a GPU"):
        gpus.require_tf32(wanted)
    with pytest.raises(UserError, match="tf32: needs a GPU"):
        gpus.require_tf32(wanted, on_cpu=True)
    gpus.require_tf32(unwanted, on_cpu=True)


def test_one_process_keeps_the_first_of_several_gpus(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    pretend_gpus(monkeypatch, 3)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,6,7")
    with caplog.at_level(logging.WARNING, logger="sft"):
        assert du.claim_devices() == 1
    assert os.environ["CUDA_VISIBLE_DEVICES"] == "4"
    assert caplog.messages == [
        "3 GPUs are visible and this is one process: it uses GPU 4; to use 3: ./launch_training.sh --gpus 3"
    ]


def test_one_gpu_stays_visible(monkeypatch: pytest.MonkeyPatch) -> None:
    pretend_gpus(monkeypatch, 1)
    assert du.claim_devices() == 1
    assert "CUDA_VISIBLE_DEVICES" not in os.environ


@pytest.mark.parametrize(("num_gpus", "use_cpu"), [(0, False), (None, True), (2, True)])
def test_the_cpu_by_choice_hides_the_gpus(monkeypatch: pytest.MonkeyPatch, num_gpus: int | None, use_cpu: bool) -> None:
    pretend_gpus(monkeypatch, 2)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1")
    assert du.claim_devices(num_gpus, use_cpu=use_cpu) == 0
    assert os.environ["CUDA_VISIBLE_DEVICES"] == ""


def test_a_process_of_a_group_takes_its_own_gpu(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    taken: list[int] = []
    monkeypatch.setattr(torch.cuda, "set_device", taken.append)
    pretend_torchrun(monkeypatch)
    pretend_gpus(monkeypatch, 4)
    with caplog.at_level(logging.WARNING, logger="sft"):
        assert du.claim_devices(4) == 4
        assert (taken, caplog.messages) == ([1], [])
        du.claim_devices(2)
    assert caplog.messages == ["num_gpus is 2, but 4 processes were started on this node"]


def test_more_processes_than_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    pretend_torchrun(monkeypatch)
    pretend_gpus(monkeypatch, 3)
    with pytest.raises(UserError, match="--nproc_per_node: 4 GPUs asked for, and 3 GPUs are visible here"):
        du.claim_devices()


def test_the_backend_follows_the_hardware(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dist, "is_nccl_available", lambda: True)
    pretend_gpus(monkeypatch, 0)
    assert du.choose_backend() == "gloo"
    assert du.choose_backend("gloo") == "gloo"
    pretend_gpus(monkeypatch, 2)
    assert du.choose_backend() == "nccl"
    assert du.choose_backend(use_cpu=True) == "gloo"
    assert du.choose_backend("gloo") == "gloo"
    monkeypatch.setattr(dist, "is_nccl_available", lambda: False)
    assert du.choose_backend() == "gloo"


@pytest.mark.parametrize(
    ("backend", "message"),
    [
        ("nccl", "ddp_backend: 'nccl' works between GPUs, and this run has none"),
        ("ncl", "ddp_backend: 'ncl' is not in this build of torch\n    it has gloo"),
    ],
)
def test_an_impossible_backend_is_an_error(monkeypatch: pytest.MonkeyPatch, backend: str, message: str) -> None:
    pretend_gpus(monkeypatch, 0)
    with pytest.raises(UserError) as raised:
        du.choose_backend(backend)
    assert str(raised.value).startswith(message)


def test_a_single_process_has_no_group() -> None:
    du.init_process_group("gloo")
    assert not dist.is_initialized()
    du.require_agreement({"rows": 7})
    du.destroy_process_group()


GROUP = """\
import json, sys
import torch.distributed as dist
import distributed_utils as du
assert du.claim_devices() == 0
du.init_process_group(du.choose_backend(), 60)
group = dist.group.WORLD
du.init_process_group("gloo", 60)
assert dist.group.WORLD is group
du.require_agreement({"rows": 7})
from sft.errors import UserError
try:
    du.require_agreement({"rows": 7, "checkpoint": ["checkpoint-5", None][du.rank()]})
    raise SystemExit("nobody noticed")
except UserError as error:
    assert "checkpoint: 'checkpoint-5' on rank 0, None on rank 1" in str(error)
from transformers import TrainingArguments
arguments = TrainingArguments("unused", report_to="none", use_cpu=True)
seen = [arguments.world_size, arguments.process_index, arguments.n_gpu]
sys.stdout.write(json.dumps([du.rank(), dist.get_backend(), seen]) + "\\n")
du.destroy_process_group()
assert not dist.is_initialized()
du.end_process(0)
"""


@pytest.mark.slow
def test_two_processes_of_torchrun_are_a_group_that_trainer_uses(tmp_path: Path) -> None:
    script = tmp_path / "group.py"
    script.write_text(GROUP)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", str(script)]
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(command, env=env, cwd=tmp_path, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    results = sorted(json.loads(line) for line in done.stdout.splitlines())
    assert results == [[rank, "gloo", [2, rank, 0]] for rank in range(2)]


@pytest.mark.parametrize("world_size", [1, 2])
def test_a_process_ends_with_its_code_after_its_exit_handlers(world_size: int) -> None:
    """One of several exits before the interpreter is finalized, where gloo's threads may abort it."""
    code = """
import atexit, distributed_utils
class Late:
    def __del__(self): print("the interpreter ended")
late = Late()
atexit.register(print, "what was registered ran")
print("what was printed is there")
distributed_utils.end_process(3)
"""
    env = {**os.environ, "WORLD_SIZE": str(world_size)}
    ended = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=env, capture_output=True, text=True)
    assert ended.returncode == 3, ended.stderr
    expected = ["what was printed is there", "what was registered ran"]
    assert ended.stdout.splitlines() == ([*expected, "the interpreter ended"] if world_size == 1 else expected)
