"""`launch_training.sh` as a user starts it: a dry run, a link, and mistakes."""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from sft.distributed import gpus
from sft.launch.plan import ENTRY
from tests.runs import ROOT


def launch(*words: str, cwd: Path, **env: str) -> subprocess.CompletedProcess[str]:
    """`launch_training.sh` in the environment that the tests run in."""
    run_in = {**os.environ, "SFT_VENV": sys.prefix, "PYTHON": sys.executable, **env}
    command = [str(ROOT / "launch_training.sh"), *words]
    return subprocess.run(command, cwd=cwd, env=run_in, capture_output=True, text=True, timeout=120, check=False)


def test_dry_run_through_the_script_from_another_directory(config: Path, tmp_path: Path) -> None:
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / "config_manager.py").write_text("raise SystemExit('imported from the working directory')\n")
    done = launch("--config", str(config), "--dry-run", cwd=elsewhere, NPROC_PER_NODE="2", OMP_NUM_THREADS="1")
    assert done.returncode == 0, done.stderr
    expected = ["torchrun", "--standalone", "--nproc_per_node=2", str(ENTRY), "train", "--config_file", str(config)]
    assert shlex.split(done.stdout) == expected
    assert "[launch] NPROC_PER_NODE=2 from the environment sets the number of processes" in done.stderr


def test_the_script_through_a_link(config: Path, tmp_path: Path) -> None:
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "absolute").symlink_to(ROOT / "launch_training.sh")
    (tmp_path / "relative").symlink_to("bin/absolute")
    env = {**os.environ, "SFT_VENV": sys.prefix}
    command = [str(tmp_path / "relative"), "--config", str(config), "--dry-run"]
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    assert shlex.split(done.stdout)[1] == str(ENTRY)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--config", "missing.yaml"], "error: missing.yaml: there is no such config file"),
        (["--config", "c.yaml", "--gpus", "64"], "error: command line: --gpus: 64 GPUs asked for"),
        (["--config", "c.yaml", "learning_rat=1"], "learning_rate"),
        (["--config", "empty.yaml"], "model_name_or_path"),
        (["--gpus", "1"], "error: command line: the following arguments are required: --config"),
    ],
)
def test_mistakes_end_with_2_and_no_traceback(config: Path, words: list[str], message: str) -> None:
    (config.parent / "empty.yaml").write_text("learning_rate: 1e-4\n")
    done = launch(*words, cwd=config.parent)
    assert done.returncode == 2
    assert message in done.stderr
    assert "Traceback" not in done.stderr
    assert done.stdout == ""


def test_mistakes_and_help_come_without_torch(config: Path) -> None:
    script = (
        "import json, sys\n"
        "from sft.launch.launcher import main\n"
        f"code = main(['--config', {str(config)!r}, '--gpus', '64'])\n"
        "heavy = sorted({'torch', 'transformers', 'datasets', 'peft'} & sys.modules.keys())\n"
        "print(json.dumps([code, heavy]))\n"
    )
    if gpus.has_gpu_driver():
        pytest.skip("on a machine with a GPU driver torch counts the devices")
    command = [sys.executable, "-c", script]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60, check=True)
    assert json.loads(done.stdout) == [2, []]
