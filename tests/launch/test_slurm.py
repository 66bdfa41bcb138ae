"""What a plan takes from the variables of a SLURM job step."""

from __future__ import annotations

from collections.abc import Mapping

import pytest

from sft.errors import UserError
from sft.launch import slurm
from sft.launch.plan import Plan
from tests.launch.conftest import Planner
from tests.ranks import pretend_gpus

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
def test_nodes_come_from_slurm(plan: Planner, monkeypatch: pytest.MonkeyPatch) -> None:
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


def test_a_job_of_one_node_needs_no_network(plan: Planner) -> None:
    assert plan(env={"SLURM_JOB_ID": "7", "SLURM_JOB_NUM_NODES": "1"}) == Plan(plan.command())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"SLURM_STEP_ID": None}, "the SLURM job has 4 nodes and only the first runs this command"),
        ({"SLURM_STEP_NUM_TASKS": "8"}, "srun started 8 tasks on 4 nodes"),
        ({"SLURM_JOB_NODELIST": ""}, "SLURM's list of nodes is ''"),
    ],
)
@pytest.mark.usefixtures("_no_scontrol")
def test_a_job_that_would_hang_is_an_error(plan: Planner, changes: Mapping[str, str | None], message: str) -> None:
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
    assert slurm.expand_first_host(nodelist) == host
