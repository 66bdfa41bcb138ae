"""The job scripts under a real SLURM of one node, as a user submits them."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

import config_manager
from tests.builders import save_model_dir
from tests.runs import ROOT
from tests.slurm_cluster import Cluster, logs, one_node_cluster, why_not

SCRIPT = str(ROOT / "slurm" / "sft_training.slurm")
PEFT_SCRIPT = str(ROOT / "slurm" / "sft_peft.slurm")
# What a user exports before sbatch: the environment of the tests, and one thread.
EXPORTED = {"SFT_VENV": sys.prefix, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}

pytestmark = pytest.mark.xdist_group("slurm")  # one worker of pytest-xdist starts one cluster


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    reason = why_not()
    if reason:
        pytest.skip(reason)
    folder = Path(tempfile.mkdtemp(prefix="slurm-"))
    try:
        with one_node_cluster(folder) as running:
            yield running
    finally:
        shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A user's directory: a model, twelve rows, a config with relative paths."""
    folder = tmp_path_factory.mktemp("work")
    save_model_dir(folder / "model")
    rows = [{"question": f"What is {n} plus {n}?", "answer": str(n + n)} for n in range(12)]
    (folder / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = {
        "model_name_or_path": "model",
        "train_file": "train.jsonl",
        "output_dir": "out",
        "max_seq_length": 128,
        "per_device_train_batch_size": 2,
        "max_steps": 2,
        "logging_steps": 1,
        "save_steps": 2,
        "num_gpus": 0,
    }
    (folder / "my.yaml").write_text(yaml.safe_dump(config))
    return folder


def run_job(
    cluster: Cluster, work: Path, *words: str, seconds: float = 180, **exported: str
) -> tuple[dict[str, str], str]:
    """Submits a job, waits for its end, and returns its fields and its output."""
    number = cluster.submit(*words, cwd=work, extra={**EXPORTED, **exported})
    job = cluster.wait(number, seconds)
    return job, Path(job["StdOut"]).read_text()


def check_run(work: Path, output: str) -> dict[str, object]:
    """Checks the files of a run of two steps and returns its config."""
    folder = work / output
    state = json.loads((folder / "trainer_state.json").read_text())
    assert state["global_step"] == 2
    assert (folder / "tokenizer.json").exists()
    return yaml.safe_load((folder / "config.yaml").read_text())


@pytest.mark.slow
def test_two_processes_train_under_sbatch(cluster: Cluster, work: Path) -> None:
    job, output = run_job(cluster, work, SCRIPT, "my.yaml", "output_dir=full", NPROC_PER_NODE="2", LEARNING_RATE="3e-4")
    assert (job["JobState"], job["ExitCode"]) == ("COMPLETED", "0:0"), output + logs(cluster.folder)
    assert job["StdOut"] == f"{work}/slurm-sft-{job['JobId']}.out"
    assert "[launch] LEARNING_RATE=3e-4 from the environment sets learning_rate" in output
    assert "[launch] starting 2 processes\n" in output
    config = check_run(work, "full")
    assert (config["learning_rate"], config["max_steps"]) == (3e-4, 2)
    assert (work / "full" / "model.safetensors").exists()
    assert "Traceback" not in output


@pytest.mark.slow
def test_an_adapter_is_trained_under_sbatch(cluster: Cluster, work: Path) -> None:
    job, output = run_job(cluster, work, PEFT_SCRIPT, "my.yaml", OUTPUT_DIR="adapter", LORA_RANK="4")
    assert (job["JobState"], job["ExitCode"]) == ("COMPLETED", "0:0"), output + logs(cluster.folder)
    assert "[launch] starting 1 process\n" in output
    check_run(work, "adapter")
    adapter = json.loads((work / "adapter" / "adapter_config.json").read_text())
    assert (adapter["r"], adapter["lora_alpha"]) == (4, 32)
    assert not (work / "adapter" / "model.safetensors").exists()


@pytest.mark.slow
def test_mistakes_end_the_job_with_2(cluster: Cluster, work: Path) -> None:
    job, output = run_job(cluster, work, SCRIPT, "no.yaml")
    assert (job["JobState"], job["ExitCode"]) == ("FAILED", "2:0")
    assert "error: no.yaml: there is no such config file" in output
    job, output = run_job(cluster, work, SCRIPT)
    assert (job["JobState"], job["ExitCode"]) == ("FAILED", "2:0")
    assert "error: which config?" in output


@pytest.mark.slow
def test_without_the_repository_the_job_asks_for_sft_home(cluster: Cluster, work: Path) -> None:
    lonely = work / "lonely.slurm"
    shutil.copy(SCRIPT, lonely)
    job, output = run_job(cluster, work, str(lonely), "my.yaml", "--dry-run")
    assert job["ExitCode"] == "2:0"
    assert "error: launch_training.sh was not found; set SFT_HOME to the repository" in output
    job, output = run_job(cluster, work, str(lonely), "my.yaml", "--dry-run", SFT_HOME=str(ROOT))
    assert (job["JobState"], job["ExitCode"]) == ("COMPLETED", "0:0"), output
    assert f"{sys.prefix}/bin/python {ROOT}/sft_main.py train --config_file my.yaml\n" in output


@pytest.mark.slow
def test_a_lora_section_of_the_config_is_kept(cluster: Cluster, work: Path) -> None:
    own = yaml.safe_load((work / "my.yaml").read_text()) | {"lora_config": {"r": 64}}
    (work / "own.yaml").write_text(yaml.safe_dump(own))
    _, output = run_job(cluster, work, PEFT_SCRIPT, "own.yaml", "--dry-run")
    assert "train --config_file own.yaml\n" in output
    _, output = run_job(cluster, work, PEFT_SCRIPT, "my.yaml", "--dry-run")
    assert "train --config_file my.yaml lora_config.r=16 lora_config.lora_alpha=32\n" in output


@pytest.mark.slow
def test_a_requeued_job_resumes(cluster: Cluster, work: Path) -> None:
    resuming = yaml.safe_load((work / "my.yaml").read_text()) | {"resume_from_checkpoint": False}
    (work / "resuming.yaml").write_text(yaml.safe_dump(resuming))
    config_manager.write_config(config_manager.load_config(work / "my.yaml"), work / "config.yaml")
    assert "\nresume_from_checkpoint: null\n" in (work / "config.yaml").read_text()
    commands: dict[str, list[str]] = {}
    for words in ("my.yaml", "config.yaml", "my.yaml --resume_from_checkpoint auto", "resuming.yaml"):
        number = cluster.submit(SCRIPT, *words.split(), "--dry-run", cwd=work, extra=EXPORTED)
        cluster.wait(number, 60)
        cluster.command("scontrol", "requeue", number)
        cluster.command("scontrol", "update", f"JobId={number}", "StartTime=now")
        job = cluster.wait(number, 180)
        assert (job["Restarts"], job["ExitCode"]) == ("1", "0:0")
        lines = Path(job["StdOut"]).read_text().splitlines()
        commands[words] = [line.partition("--config_file ")[2] for line in lines if "--config_file" in line]
    assert commands == {
        "my.yaml": ["my.yaml", "my.yaml resume_from_checkpoint=auto"],
        "config.yaml": ["config.yaml", "config.yaml resume_from_checkpoint=auto"],
        "my.yaml --resume_from_checkpoint auto": ["my.yaml --resume_from_checkpoint auto"] * 2,
        "resuming.yaml": ["resuming.yaml"] * 2,
    }


@pytest.mark.parametrize(
    ("line", "resumes"),
    [
        ("", True),
        ("resume_from_checkpoint: null", True),
        ("resume_from_checkpoint: null\r", True),
        ("resume_from_checkpoint: ~   # from the start", True),
        ("resume_from_checkpoint:", True),
        ("resume_from_checkpoint: # none", True),
        ("# resume_from_checkpoint: out/checkpoint-2", True),
        ("resume_from_checkpoint: auto", False),
        ("resume_from_checkpoint: false  # null", False),
        ("resume_from_checkpoint: null/checkpoint-2", False),
        ("resume-from-checkpoint: out/checkpoint-2", False),
    ],
)
def test_a_requeued_job_resumes_unless_the_config_decides(tmp_path: Path, line: str, resumes: bool) -> None:
    """The script alone, in a requeued job; `srun` only prints the command it is given."""
    for name, does in (("srun", 'printf "%s\\n" "$@"'), ("scontrol", "exit 1")):
        (tmp_path / name).write_text(f"#!/bin/sh\n{does}\n")
        (tmp_path / name).chmod(0o755)
    (tmp_path / "my.yaml").write_text(f"max_steps: 2\n{line}\noutput_dir: out\n", newline="")
    job = {"SLURM_JOB_ID": "7", "SLURM_RESTART_COUNT": "1", "SFT_HOME": str(ROOT)}
    env = {**os.environ, **job, "PATH": f"{tmp_path}:{os.environ['PATH']}"}
    done = subprocess.run(
        ["bash", SCRIPT, "my.yaml", "seed=1"], cwd=tmp_path, env=env, capture_output=True, text=True, check=True
    )
    started = done.stdout.splitlines()
    assert started[-1 - resumes :] == ["seed=1", "resume_from_checkpoint=auto"][: 1 + resumes]


@pytest.mark.parametrize("script", [SCRIPT, PEFT_SCRIPT])
def test_outside_slurm_a_job_script_prints_what_to_do(script: str) -> None:
    env = {name: value for name, value in os.environ.items() if not name.startswith("SLURM_")}
    env["SFT_HOME"] = str(ROOT)
    done = subprocess.run(["bash", script, "my.yaml"], env=env, capture_output=True, text=True, timeout=30, check=False)
    assert done.returncode == 2
    assert done.stderr.splitlines() == [
        "error: this is a job script: sbatch slurm/sft_training.slurm my.yaml",
        "    Without SLURM: ./launch_training.sh --config my.yaml",
    ]
