"""What to start on this node, and the exit codes that processes end with."""

from __future__ import annotations

import shlex
import signal
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field

from sft.launch.options import DEFAULT_PORT

PREEMPTED, INTERRUPTED = 128 + signal.SIGTERM, 128 + signal.SIGINT


@dataclass(frozen=True)
class Plan:
    """What to start on this node.

    Attributes:
        command: the entry script and its arguments, the same for every process.
        processes: on this node. Every node runs as many.
        nodes, node_rank, master_addr, master_port: the other nodes. One node needs neither address nor port.
        environment: variables to set for the processes.
    """

    command: tuple[str, ...]
    processes: int = 1
    nodes: int = 1
    node_rank: int = 0
    master_addr: str = "127.0.0.1"
    master_port: int = DEFAULT_PORT
    environment: Mapping[str, str] = field(default_factory=dict)

    @property
    def alone(self) -> bool:
        """One process in all: plain Python, no process group."""
        return self.nodes == 1 and self.processes == 1

    def shell(self) -> str:
        """The plan as a line for the shell."""
        words = [f"{name}={value}" for name, value in self.environment.items()]
        if self.alone:
            words.append(sys.executable)
        elif self.nodes == 1:
            words += ["torchrun", "--standalone", f"--nproc_per_node={self.processes}"]
        else:
            words += ["torchrun", f"--nnodes={self.nodes}", f"--node_rank={self.node_rank}"]
            words += [f"--master_addr={self.master_addr}", f"--master_port={self.master_port}"]
            words += [f"--nproc_per_node={self.processes}"]
        return shlex.join([*words, *self.command])
