"""Running a plan: exit codes and signals of one process and of several, on one node and on two.

Tiny scripts take the place of the training.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from sft.launch.elastic_agent import INTERRUPT_SECONDS, GracePeriod
from sft.launch.exit_codes import combine_exit_codes, describe_exit
from tests.ranks import free_ports
from tests.runs import ROOT

LAUNCH = """
import sys; from pathlib import Path; from sft.launch.launcher import main
sys.exit(main(sys.argv[2:], entry=Path(sys.argv[1])))
"""


@pytest.mark.parametrize(
    ("codes", "code"),
    [
        ({0: 2}, 2),
        ({0: 1, 1: 3}, 3),
        ({0: 1, 1: 2}, 2),
        ({0: 143, 1: 143}, 143),
        ({0: -15, 1: 143}, 143),
        ({0: 143, 1: 1}, 1),
        ({0: 143, 1: -9}, 1),
        ({0: -11}, 1),
        ({1: 77}, 1),
        ({0: 130, 1: 130}, 130),
        ({0: 130, 1: 1}, 130),
        ({0: -15, 1: -2}, 130),
        ({0: 130, 1: 3}, 3),
    ],
)
def test_the_exit_code_of_the_run_follows_from_those_of_its_processes(codes: dict[int, int], code: int) -> None:
    assert combine_exit_codes(codes) == code


def test_how_a_process_ended_is_described() -> None:
    assert describe_exit(3) == "ended with exit code 3"
    assert describe_exit(-11) == "was killed by SIGSEGV"
    assert describe_exit(-9) == "was killed by SIGKILL; most likely the machine ran out of memory"


def start(entry: str, config: Path, *words: str, processes: int = 1, **env: str) -> subprocess.Popen[str]:
    """The launcher with a script of this text in place of `sft_main.py`, in the directory of the config."""
    script = config.parent / "entry.py"
    script.write_text(entry)
    # A process of torch that does not train needs no more than one thread.
    run_in = {**os.environ, "NPROC_PER_NODE": str(processes), "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), **env}
    return subprocess.Popen(
        [sys.executable, "-c", LAUNCH, str(script), "--config", str(config), *words],
        cwd=config.parent,
        env=run_in,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def end(process: subprocess.Popen[str], seconds: float = 60) -> tuple[int, str, str]:
    """Returns exit code, stdout and stderr; a process that runs for longer is killed and fails the test."""
    try:
        out, err = process.communicate(timeout=seconds)
    except subprocess.TimeoutExpired:
        process.kill()
        raise
    return process.returncode, out, err


SHOW = """
import json, os, sys
# In one write: two processes share the pipe.
sys.stdout.write(json.dumps([sys.argv[1:], {name: os.environ.get(name) for name in NAMES}]) + "\\n")
"""
GROUP = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR")


def test_one_process_replaces_the_launcher(config: Path) -> None:
    process = start("import os; print(os.getpid()); raise SystemExit(3)\n", config)
    code, out, err = end(process)
    assert (code, int(out)) == (3, process.pid)
    assert (
        err
        == "[launch] NPROC_PER_NODE=1 from the environment sets the number of processes\n[launch] starting 1 process\n"
    )


def test_one_process_has_no_group(config: Path) -> None:
    code, out, _ = end(start(f"NAMES = {GROUP}\n{SHOW}", config, "max_steps=2", MAX_STEPS="9", EPOCHS="2"))
    arguments, variables = json.loads(out)
    assert code == 0
    assert arguments == ["train", "--config_file", str(config), "num_train_epochs=2", "max_steps=2"]
    assert variables == dict.fromkeys(GROUP)


@pytest.mark.slow
def test_two_processes_are_one_group(config: Path) -> None:
    code, out, err = end(start(f"NAMES = {GROUP}\n{SHOW}", config, "max_steps=2", processes=2))
    assert code == 0, err
    results = sorted((json.loads(line) for line in out.splitlines()), key=lambda result: result[1]["RANK"])
    assert [result[0] for result in results] == [["train", "--config_file", str(config), "max_steps=2"]] * 2
    expected = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "localhost"}
    assert [result[1] for result in results] == [{"RANK": n, "LOCAL_RANK": n, **expected} for n in "01"]
    assert err.splitlines()[-1] == "[launch] starting 2 processes"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("entry", "code", "logged"),
    [
        ("raise SystemExit(2 * (os.environ['RANK'] == '1'))", 2, "[launch] process of rank 1 ended with exit code 2"),
        ("raise SystemExit(3)", 3, "ended with exit code 3"),
        ("os.kill(os.getpid(), 9)", 1, "was killed by SIGKILL; most likely the machine ran out of memory"),
    ],
)
def test_the_exit_code_of_a_failing_process_comes_through(config: Path, entry: str, code: int, logged: str) -> None:
    result, _, err = end(start(f"import os\n{entry}\n", config, processes=2))
    assert result == code
    assert logged in err
    assert "Traceback" not in err
    assert "elastic" not in err


SAVES = """\
import os, signal, subprocess, sys, time
rank = int(os.environ.get("RANK", "0"))
worker = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
def say(line):
    os.write(1, f"{line}\\n".encode())  # in one piece: the processes share the pipe
def save(number, frame):
    time.sleep(0.2 + rank)  # torchrun's agent would see rank 0 end, and end rank 1 in its save
    lives = worker.poll() is None
    worker.kill()
    say(f"rank {rank} saved, its worker {'lives' if lives else 'died'}")
    sys.exit(143)
signal.signal(signal.SIGTERM, save)
say("ready")
time.sleep(60)
"""


@pytest.mark.slow
@pytest.mark.parametrize("processes", [1, 2])
def test_sigterm_reaches_every_process_and_none_of_their_workers(config: Path, processes: int) -> None:
    process = start(SAVES, config, processes=processes)
    assert process.stdout is not None
    for _ in range(processes):
        assert process.stdout.readline() == "ready\n"
    process.send_signal(signal.SIGTERM)
    code, out, err = end(process, 30)
    assert code == 143, err
    assert sorted(out.splitlines()) == [f"rank {rank} saved, its worker lives" for rank in range(processes)]


LEAVES = """\
import os, sys, time
rank = int(os.environ["RANK"])
try:
    os.write(1, b"ready\\n")
    time.sleep(60)
except KeyboardInterrupt:
    time.sleep(1 + rank)
    os.write(1, f"rank {rank} left\\n".encode())
    sys.exit(130)
"""


@pytest.mark.slow
def test_ctrl_c_lets_every_process_leave_and_comes_through(config: Path) -> None:
    process = start(LEAVES, config, processes=2)
    assert process.stdout is not None
    assert [process.stdout.readline() for _ in range(2)] == ["ready\n"] * 2
    process.send_signal(signal.SIGINT)
    code, out, err = end(process, 30)
    assert (code, sorted(out.splitlines())) == (130, ["rank 0 left", "rank 1 left"]), err


def test_after_ctrl_c_a_process_that_hangs_is_waited_for_a_while() -> None:
    """Rank 0 has left, rank 1 runs on: the agent waits for it, but only for so long."""
    now = 100.0
    grace = GracePeriod(lambda: now)
    assert grace.should_wait({None})
    now = 200.0
    assert grace.should_wait({130, None})
    now += INTERRUPT_SECONDS
    assert grace.should_wait({130, None})
    now += 0.1
    assert not grace.should_wait({130, None})


@pytest.mark.parametrize(
    ("exits", "waits"),
    [
        ({143, None}, True),
        ({-2, 143, None}, True),
        ({0, None}, False),
        ({1, None}, False),
        ({143, 1, None}, False),
        ({143}, False),
    ],
)
def test_the_agent_waits_for_a_save_and_after_no_failure(exits: set[int | None], waits: bool) -> None:
    assert GracePeriod().should_wait(exits) == waits


@pytest.mark.slow
def test_a_crash_while_saving_is_not_called_preempted(config: Path) -> None:
    entry = "import os, signal, time\nsignal.signal(15, lambda *_: 1 / 0)\nos.write(1, b'ready\\n')\ntime.sleep(60)\n"
    process = start(entry, config, processes=2)
    assert process.stdout is not None
    assert [process.stdout.readline() for _ in range(2)] == ["ready\n"] * 2
    process.send_signal(signal.SIGTERM)
    code, _, err = end(process, 30)
    assert code == 1
    assert "ZeroDivisionError" in err


@pytest.mark.slow
def test_sigterm_while_waiting_for_the_other_node(config: Path) -> None:
    """Node 0 is a socket that accepts and never answers, so node 1 is waiting in C++ once it has connected."""
    with socket.create_server(("127.0.0.1", 0)) as node_0:
        node_0.settimeout(60)
        words = ["--nodes", "2", "--node_rank", "1", "--master_addr", "127.0.0.1"]
        process = start("", config, *words, "--master_port", str(node_0.getsockname()[1]))
        connection, _ = node_0.accept()
        with connection:
            process.send_signal(signal.SIGTERM)
            assert end(process, 30)[0] == 143


@pytest.mark.slow
def test_two_nodes_meet_and_their_ranks_follow_the_nodes(config: Path) -> None:
    meet = "import torch.distributed as d\nd.init_process_group('gloo')\nd.barrier()\nsys.stdout.flush()\nos._exit(0)\n"
    entry = f"NAMES = {GROUP}\n{SHOW}{meet}"
    words = ["--nodes", "2", "--master_addr", "127.0.0.1", "--master_port", str(free_ports(1)[0])]
    # Node 1 starts first: it has to wait for node 0.
    nodes = [start(entry, config, *words, "--node_rank", str(node), processes=2) for node in (1, 0)]
    ends = [end(node, 120) for node in nodes]
    assert [code for code, _, _ in ends] == [0, 0], [err for _, _, err in ends]
    ranks = [sorted(json.loads(line)[1]["RANK"] for line in out.splitlines() if line[0] == "[") for _, out, _ in ends]
    assert ranks == [["2", "3"], ["0", "1"]]
    assert "TCPStore" not in ends[0][2], "a late node 0 is not reported"
