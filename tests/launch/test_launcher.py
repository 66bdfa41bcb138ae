"""The launcher's decisions: options, environment, GPUs, SLURM, and the command that follows from them."""

from __future__ import annotations

import json
import logging
import os
import shlex
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest

from sft.distributed import gpus
from sft.errors import UserError
from sft.launch import launcher, slurm
from sft.launch.launcher import ENTRY, make_plan
from sft.launch.options import ENVIRONMENT, environment_overrides, override_keys, parse_arguments
from sft.launch.plan import Plan
from tests.runs import ROOT

Planner = Callable[..., Plan]


@pytest.fixture(autouse=True)
def _visible_log(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(logging.getLogger("sft.launch"), "level", logging.INFO)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)


@pytest.fixture
def config(tmp_path: Path) -> Path:
    path = tmp_path / "c.yaml"
    path.write_text("model_name_or_path: some/model\ntrain_file: train.jsonl\n")
    return path


@pytest.fixture
def plan(config: Path) -> Planner:
    """Plans for `config` with more words of the command line, in an environment of only these variables."""

    def planner(*words: str, env: Mapping[str, str] | None = None) -> Plan:
        return make_plan(parse_arguments(["--config", str(config), *words]), env or {})

    return planner


def pretend_gpus(monkeypatch: pytest.MonkeyPatch, count: int) -> None:
    """A machine with `count` GPUs, as far as the launcher can see."""
    for module in (gpus, launcher):
        monkeypatch.setattr(module, "visible_gpus", lambda: count)


def train(config: Path, *overrides: str) -> tuple[str, ...]:
    return (str(ENTRY), "train", "--config_file", str(config), *overrides)


def test_one_process_on_a_machine_without_gpus(plan: Planner, config: Path) -> None:
    assert plan() == Plan(train(config))
    assert plan().alone


@pytest.mark.parametrize(
    "words",
    [
        ["--learning_rate", "1e-5", "lora_config.r=4"],
        ["--", "--learning_rate", "1e-5", "lora_config.r=4"],
        ["--learning_rate", "1e-5", "--", "lora_config.r=4"],
    ],
)
def test_overrides_are_passed_on_as_typed(plan: Planner, config: Path, words: list[str]) -> None:
    assert plan(*words).command == train(config, "--learning_rate", "1e-5", "lora_config.r=4")


def test_options_after_overrides_are_the_launchers(plan: Planner, config: Path) -> None:
    result = plan("max_steps=3", "--nodes", "2", "--node-rank=1", "--master_addr", "h", "--bf16", "--master_port=7")
    assert result == Plan(train(config, "max_steps=3", "--bf16"), 1, 2, 1, "h", 7)
    assert not result.alone


def test_options_are_not_abbreviated(config: Path) -> None:
    arguments = parse_arguments(["--config", str(config), "--node", "2"])
    assert arguments.nodes is None
    assert arguments.overrides == ("--node", "2")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "the following arguments are required: --config/--config_file"),
        (["--config"], "argument --config/--config_file: expected one argument"),
        (["--config", "c", "--gpus", "two"], "argument --gpus: invalid whole number, 0 or more, value: 'two'"),
        (["--config", "c", "--gpus", "-1"], "argument --gpus: invalid whole number, 0 or more, value: '-1'"),
        (["--config", "c", "--nodes", "0"], "argument --nodes: invalid whole number, 1 or more, value: '0'"),
    ],
)
def test_wrong_options_are_errors_of_the_user(words: list[str], message: str) -> None:
    with pytest.raises(UserError) as raised:
        parse_arguments(words)
    (problem,) = raised.value.problems
    assert (problem.file, problem.message) == ("command line", message)


def test_keys_are_recognized_in_each_spelling() -> None:
    words = ["--learning-rate", "1e-5", "--lora_config.r=32", "max_steps=1", "--bf16", "--run_name", "a=b"]
    assert override_keys(words) == {"learning_rate", "lora_config.r", "max_steps", "bf16", "run_name"}


def test_every_variable_becomes_its_override(plan: Planner, config: Path) -> None:
    values = {
        "MODEL_NAME": "m",
        "TRAIN_FILE": "t.jsonl",
        "VAL_FILE": "v.jsonl",
        "OUTPUT_DIR": "o",
        "BATCH_SIZE": "2",
        "LEARNING_RATE": "1e-5",
        "EPOCHS": "3",
        "MAX_STEPS": "5",
        "LORA_RANK": "8",
        "LORA_ALPHA": "16",
    }
    assert values.keys() == ENVIRONMENT.keys()
    expected = (
        "model_name_or_path=m",
        "train_file=t.jsonl",
        "validation_file=v.jsonl",
        "output_dir=o",
        "per_device_train_batch_size=2",
        "learning_rate=1e-5",
        "num_train_epochs=3",
        "max_steps=5",
        "lora_config.r=8",
        "lora_config.lora_alpha=16",
    )
    assert plan(env=values).command == train(config, *expected)


def test_an_empty_variable_is_none(plan: Planner, config: Path) -> None:
    assert plan(env={"MODEL_NAME": "", "NPROC_PER_NODE": ""}) == Plan(train(config))


def test_the_command_line_wins_over_the_environment_and_both_are_said(caplog: pytest.LogCaptureFixture) -> None:
    env = {"MAX_STEPS": "5", "LORA_RANK": "8", "EPOCHS": "2"}
    with caplog.at_level(logging.INFO, logger="sft.launch"):
        assert environment_overrides(env, {"max_steps", "lora_config"}) == ["num_train_epochs=2"]
    assert caplog.messages == [
        "EPOCHS=2 from the environment sets num_train_epochs",
        "MAX_STEPS=5 from the environment is not used: the command line sets max_steps",
        "LORA_RANK=8 from the environment is not used: the command line sets lora_config.r",
    ]


def test_a_wrong_variable_is_an_error_of_the_config(plan: Planner) -> None:
    with pytest.raises(UserError, match=r"max_steps.*many"):
        plan(env={"MAX_STEPS": "many"})


def test_every_visible_gpu_by_default(plan: Planner, monkeypatch: pytest.MonkeyPatch) -> None:
    pretend_gpus(monkeypatch, 4)
    assert plan().processes == 4
    assert plan("use_cpu=true").processes == 1


@pytest.mark.parametrize("words", [["--gpus", "2"], ["num_gpus=2"]])
def test_fewer_gpus_than_there_are(plan: Planner, monkeypatch: pytest.MonkeyPatch, words: list[str]) -> None:
    pretend_gpus(monkeypatch, 4)
    result = plan(*words)
    assert result.processes == 2
    assert result.command[-1] == "num_gpus=2"


def test_zero_gpus_are_the_cpu(plan: Planner, config: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pretend_gpus(monkeypatch, 4)
    assert plan("--gpus", "0") == Plan(train(config, "num_gpus=0"))
    assert plan("--gpus", "0", env={"NPROC_PER_NODE": "8"}).processes == 8


@pytest.mark.parametrize(
    ("words", "where"),
    [(["--gpus", "2"], "command line: --gpus"), (["num_gpus=2"], "command line: num_gpus")],
)
def test_more_gpus_than_there_are(plan: Planner, words: list[str], where: str) -> None:
    with pytest.raises(UserError) as raised:
        plan(*words)
    (problem,) = raised.value.problems
    assert problem.where() == where
    assert problem.message == "2 GPUs asked for, and no GPU is visible here"
    assert problem.hint == "leave it out to train on the CPU"


def test_more_gpus_in_the_file_names_its_line(plan: Planner, config: Path) -> None:
    config.write_text(config.read_text() + "num_gpus: 3\n")
    with pytest.raises(UserError) as raised:
        plan()
    assert raised.value.problems[0].where() == f"{config}:3: num_gpus"


def test_gpus_twice_is_an_error(plan: Planner) -> None:
    with pytest.raises(UserError, match="--gpus and num_gpus are both given"):
        plan("--gpus", "1", "num_gpus=2")


def test_processes_on_the_cpu(plan: Planner, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launcher, "usable_cores", lambda: 8)
    assert plan(env={"NPROC_PER_NODE": "2"}).environment == {"OMP_NUM_THREADS": "4"}
    assert plan(env={"NPROC_PER_NODE": "20"}).environment == {"OMP_NUM_THREADS": "1"}
    assert plan(env={"NPROC_PER_NODE": "2", "OMP_NUM_THREADS": "3"}).environment == {}
    assert plan().environment == {}


def test_processes_win_over_num_gpus_but_not_over_gpus(plan: Planner, monkeypatch: pytest.MonkeyPatch) -> None:
    pretend_gpus(monkeypatch, 4)
    assert plan("num_gpus=2", env={"NPROC_PER_NODE": "3"}).processes == 3
    assert plan("--gpus", "2", env={"NPROC_PER_NODE": "3"}).processes == 2
    with pytest.raises(UserError, match="NPROC_PER_NODE: 5 GPUs asked for, and 4 GPUs are visible here"):
        plan(env={"NPROC_PER_NODE": "5"})


@pytest.mark.parametrize("text", ["gpu", "0", "-1", "1.5"])
def test_a_number_of_processes_that_is_none(plan: Planner, text: str) -> None:
    with pytest.raises(UserError, match=r"NPROC_PER_NODE: is .*, not a number of processes"):
        plan(env={"NPROC_PER_NODE": text})


def test_nodes_by_options(plan: Planner, config: Path) -> None:
    result = plan("--nodes", "3", "--node_rank", "2", "--master_addr", "10.0.0.1", env={"NPROC_PER_NODE": "4"})
    assert (result.nodes, result.node_rank, result.master_addr, result.master_port) == (3, 2, "10.0.0.1", 29500)
    assert result.processes == 4
    assert plan("--nodes", "1", "--node_rank", "0") == Plan(train(config))


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--nodes", "2"], "--nodes 2 needs --node_rank and --master_addr"),
        (["--nodes", "2", "--master_addr", "h"], "--nodes 2 needs --node_rank"),
        (["--nodes", "2", "--node_rank", "2", "--master_addr", "h"], "--node_rank 2 is not below --nodes 2"),
        (["--node_rank", "1", "--master_addr", "h"], "--node_rank, --master_addr without --nodes"),
    ],
)
def test_incomplete_nodes(plan: Planner, words: list[str], message: str) -> None:
    with pytest.raises(UserError, match=message):
        plan(*words)


STEP = {
    "SLURM_JOB_ID": "12345",
    "SLURM_STEP_ID": "0",
    "SLURM_JOB_NUM_NODES": "4",
    "SLURM_STEP_NUM_NODES": "4",
    "SLURM_STEP_NUM_TASKS": "4",
    "SLURM_NODEID": "2",
    "SLURM_PROCID": "2",
    "SLURM_JOB_NODELIST": "gpu[03-05,9]",
    "SLURM_GPUS_ON_NODE": "2",
}


@pytest.fixture
def _no_scontrol(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/nowhere")


@pytest.mark.usefixtures("_no_scontrol")
def test_slurm_says_the_nodes(plan: Planner, monkeypatch: pytest.MonkeyPatch) -> None:
    pretend_gpus(monkeypatch, 8)
    result = plan(env=STEP)
    assert (result.nodes, result.node_rank, result.master_addr, result.master_port) == (4, 2, "gpu03", 22345)
    assert result.processes == 2, "the job holds 2 of the node's 8 GPUs"
    explicit = plan("--nodes", "2", "--node_rank", "0", "--master_addr", "h", env=STEP)
    assert (explicit.nodes, explicit.master_addr) == (2, "h")


@pytest.mark.usefixtures("_no_scontrol")
def test_gpus_of_the_job_that_are_not_visible(plan: Planner) -> None:
    with pytest.raises(UserError, match="SLURM gave this job 2 GPUs on this node, and none is visible"):
        plan(env=STEP)
    assert plan("num_gpus=0", env=STEP).processes == 1


def test_a_job_of_one_node_needs_no_network(plan: Planner, config: Path) -> None:
    assert plan(env={"SLURM_JOB_ID": "7", "SLURM_JOB_NUM_NODES": "1"}) == Plan(train(config))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"SLURM_STEP_ID": None}, "the SLURM job has 4 nodes and only the first runs this command"),
        ({"SLURM_STEP_NUM_TASKS": "8"}, "srun started 8 tasks on 4 nodes"),
        ({"SLURM_JOB_NODELIST": ""}, "SLURM's list of nodes is ''"),
    ],
)
@pytest.mark.usefixtures("_no_scontrol")
def test_jobs_that_would_hang(plan: Planner, changes: Mapping[str, str | None], message: str) -> None:
    env = {name: value for name, value in {**STEP, **changes}.items() if value is not None}
    with pytest.raises(UserError, match=message):
        plan(env=env)


@pytest.mark.parametrize(
    ("nodelist", "host"),
    [
        ("node1", "node1"),
        ("node1,node2", "node1"),
        ("gpu[03-05,9],login1", "gpu03"),
        ("gpu[7,3]", "gpu7"),
        ("rack[1-2]-n[04-08].site", "rack1-n04.site"),
        ("a-b-[0-3]", "a-b-0"),
    ],
)
def test_the_first_host_without_scontrol(nodelist: str, host: str) -> None:
    assert slurm.expand_first(nodelist) == host


def test_the_plan_as_a_line_for_the_shell() -> None:
    command = ("sft main.py", "train")
    assert shlex.split(Plan(command).shell()) == [sys.executable, "sft main.py", "train"]
    one_node = Plan(command, 2, environment={"OMP_NUM_THREADS": "1"}).shell()
    assert one_node == "OMP_NUM_THREADS=1 torchrun --standalone --nproc_per_node=2 'sft main.py' train"
    several = Plan(command, 8, 2, 1, "h", 77).shell()
    assert several.startswith("torchrun --nnodes=2 --node_rank=1 --master_addr=h --master_port=77 --nproc_per_node=8 ")


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
