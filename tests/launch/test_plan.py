"""How many processes train on which nodes, and the command that follows."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path

import pytest

from sft.errors import UserError
from sft.launch import plan as planning
from sft.launch.plan import Plan
from tests.launch.conftest import Planner
from tests.ranks import pretend_gpus


def test_one_process_on_a_machine_without_gpus(plan: Planner) -> None:
    assert plan() == Plan(plan.command())
    assert plan().is_single_process


def test_every_visible_gpu_is_used_by_default(plan: Planner, monkeypatch: pytest.MonkeyPatch) -> None:
    pretend_gpus(monkeypatch, 4)
    assert plan().processes == 4
    assert plan("use_cpu=true").processes == 1


@pytest.mark.parametrize("words", [["--gpus", "2"], ["num_gpus=2"]])
def test_fewer_gpus_than_there_are(plan: Planner, monkeypatch: pytest.MonkeyPatch, words: list[str]) -> None:
    pretend_gpus(monkeypatch, 4)
    result = plan(*words)
    assert result.processes == 2
    assert result.command[-1] == "num_gpus=2"


def test_zero_gpus_are_the_cpu(plan: Planner, monkeypatch: pytest.MonkeyPatch) -> None:
    pretend_gpus(monkeypatch, 4)
    assert plan("--gpus", "0") == Plan(plan.command("num_gpus=0"))
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
    monkeypatch.setattr(planning, "usable_cores", lambda: 8)
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
def test_a_wrong_number_of_processes_is_an_error(plan: Planner, text: str) -> None:
    with pytest.raises(UserError, match=r"NPROC_PER_NODE: is .*, not a number of processes"):
        plan(env={"NPROC_PER_NODE": text})


def test_nodes_by_options(plan: Planner) -> None:
    result = plan("--nodes", "3", "--node_rank", "2", "--master_addr", "10.0.0.1", env={"NPROC_PER_NODE": "4"})
    assert (result.nodes, result.node_rank, result.master_addr, result.master_port) == (3, 2, "10.0.0.1", 29500)
    assert result.processes == 4
    assert plan("--nodes", "1", "--node_rank", "0") == Plan(plan.command())


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


def test_the_plan_becomes_a_line_for_the_shell() -> None:
    command = ("sft main.py", "train")
    assert shlex.split(Plan(command).shell()) == [sys.executable, "sft main.py", "train"]
    one_node = Plan(command, 2, environment={"OMP_NUM_THREADS": "1"}).shell()
    assert one_node == "OMP_NUM_THREADS=1 torchrun --standalone --nproc_per_node=2 'sft main.py' train"
    several = Plan(command, 8, 2, 1, "h", 77).shell()
    assert several.startswith("torchrun --nnodes=2 --node_rank=1 --master_addr=h --master_port=77 --nproc_per_node=8 ")
