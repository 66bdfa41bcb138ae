"""A real SLURM of one node: munged, slurmctld and slurmd on 127.0.0.1, as root, in a folder and on ports of its own."""

from __future__ import annotations

import os
import re
import shutil
import socket
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

from tests.ranks import free_ports

PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "srun", "scontrol", "scancel")
# More than the machine has: the job scripts ask for what a training node offers, and nothing here enforces it.
CPUS = 64
ENDED = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "OUT_OF_MEMORY", "BOOT_FAIL", "PREEMPTED")


def why_not() -> str | None:
    """Returns why a cluster cannot be started here; None when it can."""
    missing = [name for name in PROGRAMS if find_program(name) is None]
    if missing:
        return f"SLURM is not installed ({', '.join(missing)}); Debian: apt-get install slurm-wlm munge"
    if os.geteuid() != 0:
        return "slurmd starts jobs as other users: only root can run it"
    return None


def find_program(name: str) -> str | None:
    """Searches the folders of the daemons as well, which are not on everyone's PATH."""
    return shutil.which(name, path=os.environ.get("PATH", "") + ":/usr/local/sbin:/usr/sbin:/sbin")


@dataclass(frozen=True)
class Cluster:
    """A running cluster, with what a user's commands need to reach it."""

    folder: Path

    @property
    def environment(self) -> dict[str, str]:
        """This process's environment, without the variables of a job it may be part of."""
        own = {name: value for name, value in os.environ.items() if not name.startswith(("SLURM_", "SBATCH_"))}
        return {**own, "SLURM_CONF": str(self.folder / "slurm.conf")}

    def command(self, *words: str, cwd: Path | None = None, extra: Mapping[str, str] | None = None) -> str:
        """Runs one of SLURM's commands and returns its output."""
        environment = {**self.environment, **(extra or {})}
        run = subprocess.run(words, cwd=cwd, env=environment, capture_output=True, text=True, timeout=60, check=False)
        assert run.returncode == 0, f"{words}: {run.stdout}{run.stderr}"
        return run.stdout

    def submit(self, *words: str, cwd: Path, extra: Mapping[str, str] | None = None) -> str:
        """`sbatch` with these words, in `cwd`; returns the number of the job."""
        return self.command("sbatch", "--parsable", *words, cwd=cwd, extra=extra).strip()

    def job(self, number: str) -> dict[str, str]:
        """Returns the fields that `scontrol show job` prints about a job, by name."""
        return dict(re.findall(r"(\w+)=(\S*)", self.command("scontrol", "--oneliner", "show", "job", number)))

    def wait(self, number: str, seconds: float) -> dict[str, str]:
        """Returns the job once it has ended; an assertion fails when it has not in time."""
        end = time.monotonic() + seconds
        while (job := self.job(number))["JobState"] not in ENDED:
            assert time.monotonic() < end, f"job {number} is {job['JobState']} ({job['Reason']}) after {seconds} s"
            time.sleep(0.5)
        return job


@contextmanager
def one_node_cluster(folder: Path) -> Iterator[Cluster]:
    """Starts the three daemons, waits until the node takes jobs, and stops them on leaving."""
    # A socket's path has at most 107 characters, so the folder's must be short.
    cluster = Cluster(folder)
    (folder / "munge.key").write_bytes(os.urandom(1024))
    (folder / "munge.key").chmod(0o400)
    (folder / "slurm.conf").write_text(configuration(folder))
    # Nothing here uses cgroups, but slurmd loads a plugin for them, and only this one needs none of the machine's.
    (folder / "cgroup.conf").write_text(f"CgroupPlugin=cgroup/v1\nCgroupMountpoint={folder}/cgroup\n")
    for name in ("state", "spool"):
        (folder / name).mkdir()
    munge = ["--foreground", "--force", f"--key-file={folder}/munge.key", f"--socket={folder}/munge.sock"]
    munge += [f"--pid-file={folder}/munged.pid", f"--log-file={folder}/munged.log", f"--seed-file={folder}/munge.seed"]
    with ExitStack() as daemons:
        running = [daemons.enter_context(daemon(cluster, "munged", *munge))]
        _until((folder / "munge.sock").exists, "munged has no socket", folder, running)
        running.append(daemons.enter_context(daemon(cluster, "slurmctld", "-D", "-c")))
        running.append(daemons.enter_context(daemon(cluster, "slurmd", "-D", "-N", "node0")))
        _until(lambda: _is_idle(cluster), "the node takes no jobs", folder, running)
        try:
            yield cluster
        finally:
            _cancel_all(cluster)


def configuration(folder: Path) -> str:
    """Returns slurm.conf: everything inside `folder`, no accounting, no cgroups, free ports."""
    controller, node = free_ports(2)
    return f"""\
ClusterName=test
SlurmctldHost={socket.gethostname().split(".")[0]}(127.0.0.1)
SlurmctldPort={controller}
SlurmdPort={node}
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/munge.sock
CredType=cred/munge
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SwitchType=switch/none
MpiDefault=none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SlurmdParameters=config_overrides
ReturnToService=2
KillWait=5
NodeName=node0 NodeAddr=127.0.0.1 CPUs={CPUS} State=UNKNOWN
PartitionName=all Nodes=node0 Default=YES MaxTime=INFINITE State=UP
"""


@contextmanager
def daemon(cluster: Cluster, name: str, *options: str) -> Iterator[subprocess.Popen[bytes]]:
    """Runs a daemon in the foreground and stops it by its process number, whatever happens inside."""
    program = find_program(name)
    assert program is not None
    with open(cluster.folder / f"{name}.out", "wb") as out:
        process = subprocess.Popen([program, *options], env=cluster.environment, stdout=out, stderr=out)
    try:
        yield process
    finally:
        process.terminate()
        try:
            process.wait(timeout=15)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def _is_idle(cluster: Cluster) -> bool:
    show = subprocess.run(
        ["scontrol", "--oneliner", "show", "node", "node0"],
        env=cluster.environment,
        capture_output=True,
        text=True,
        check=False,
    )
    return "State=IDLE " in show.stdout


def _cancel_all(cluster: Cluster) -> None:
    """Cancels every job, for none may outlive its daemon."""
    cluster.command("scancel", "--user=root", "--full")
    _until(lambda: not cluster.command("squeue", "--noheader").strip(), "jobs are still running", cluster.folder)


def _until(
    holds: Callable[[], bool],
    message: str,
    folder: Path,
    daemons: Sequence[subprocess.Popen[bytes]] = (),
    seconds: float = 60,
) -> None:
    end = time.monotonic() + seconds
    while not holds():
        if time.monotonic() > end or any(process.poll() is not None for process in daemons):
            raise AssertionError(f"{message}\n{logs(folder)}")
        time.sleep(0.2)


def logs(folder: Path, names: Sequence[str] = ("munged", "slurmctld", "slurmd")) -> str:
    """Returns the ends of the daemons' logs, for a failure's message."""
    texts = []
    for name in names:
        for path in (folder / f"{name}.log", folder / f"{name}.out"):
            if path.exists():
                texts.append(f"--- {path.name}\n" + "\n".join(path.read_text(errors="replace").splitlines()[-25:]))
    return "\n".join(texts)
