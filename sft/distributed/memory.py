"""How much memory there is for this process, how much it holds, and how much it has needed at its peak."""

from __future__ import annotations

import os
import re
import resource
import sys
from pathlib import Path

import torch

_RSS_UNIT = 1 if sys.platform == "darwin" else 1024  # bytes in ru_maxrss' unit (getrusage(2))
_PROCESS = Path("/proc/self")
_CGROUPS = Path("/sys/fs/cgroup")


def peak_memory_gb(device: torch.device) -> float:
    """Peak in GiB: of the allocator's memory on a CUDA device, of the process's resident memory elsewhere."""
    return peak_bytes(device) / 2**30


def peak_bytes(device: torch.device) -> int:
    """The peak since the process began or `reset_peak` was called; as in `peak_memory_gb`."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    try:  # the kernel's own mark: ru_maxrss starts with that of the process which started this one
        mark = re.search(r"^VmHWM:\s+(\d+) kB", (_PROCESS / "status").read_text(), re.MULTILINE)
    except OSError:  # no /proc (macOS)
        mark = None
    if mark:
        return int(mark[1]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * _RSS_UNIT


def held_bytes(device: torch.device) -> int:
    """What is held now: tensors on a CUDA device, resident pages elsewhere."""
    if device.type == "cuda":
        return torch.cuda.memory_allocated(device)
    try:
        pages = int((_PROCESS / "statm").read_text().split()[1])
    except OSError:  # no /proc (macOS): what was held at the most
        return peak_bytes(device)
    return pages * resource.getpagesize()


def reset_peak(device: torch.device) -> None:
    """Lets the peak begin again at what is held now.

    Where the system has no way to do that for resident memory the peak of the past stands, so that what is read later
    is an upper bound. Linux takes "5" in `clear_refs` (proc_pid_clear_refs(5)).
    """
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        return
    try:
        (_PROCESS / "clear_refs").write_text("5")
    except OSError:
        return


def memory_limit(device: torch.device, processes: int = 1) -> int:
    """Bytes that one process may come to hold.

    On a CUDA device that is all of it, for each process has its own; less what other programs hold there now. On the
    CPU it is an equal share of what the machine, or the narrowest control group around this process, can still give
    together with what the processes hold already, and no more than the process's own address space limit allows.

    Args:
        processes: how many train on this machine.
    """
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return free + torch.cuda.memory_reserved(device)
    held = held_bytes(device)
    room = [limit - used for limit, used in _group_limits(_CGROUPS, _PROCESS / "cgroup")]
    room.append(_available())
    share = min(room) // processes + held
    address_space, _ = resource.getrlimit(resource.RLIMIT_AS)
    if address_space != resource.RLIM_INFINITY:
        share = min(share, held + max(0, address_space - _address_space()))
    return share


def _available() -> int:
    """What the system can give without swapping; page caches that it can drop count as free (proc_meminfo(5))."""
    try:
        found = re.search(r"^MemAvailable:\s+(\d+) kB", Path("/proc/meminfo").read_text(), re.MULTILINE)
    except OSError:
        found = None
    if found:
        return int(found[1]) * 1024
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def _address_space() -> int:
    return int((_PROCESS / "statm").read_text().split()[0]) * resource.getpagesize()


def _group_limits(root: Path, membership: Path) -> list[tuple[int, int]]:
    """The memory limits of the control groups around this process and what each has in use, in bytes.

    A group's limit binds the groups in it, so all up to the root are read. Of what is in use, page cache that was not
    touched of late is left out: the kernel drops it before it kills.

    Args:
        root: where the control groups are mounted.
        membership: the process's `cgroup` file: `0::/a/b` (version 2) or `4:memory:/a/b` (version 1).
    """
    try:
        lines = membership.read_text().splitlines()
    except OSError:
        return []
    found = []
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers == "":
            base, names = root, ("memory.max", "memory.current", "inactive_file")
        elif "memory" in controllers.split(","):
            base, names = root / "memory", ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
        else:
            continue
        group = base / path.lstrip("/")
        # Inside a container the path is the host's, and its own group is mounted as the root.
        for folder in [group, *group.parents]:
            if not folder.is_relative_to(base):
                break
            if (limit := _group_limit(folder, *names)) is not None:
                found.append(limit)
    return found


def _group_limit(folder: Path, limit: str, usage: str, cache: str) -> tuple[int, int] | None:
    try:
        allowed = (folder / limit).read_text().strip()
        used = int((folder / usage).read_text())
        inactive = re.search(rf"^{cache} (\d+)", (folder / "memory.stat").read_text(), re.MULTILINE)
    except OSError:
        return None
    if allowed == "max" or int(allowed) >= 2**60:  # version 1 writes a huge number for none
        return None
    return int(allowed), used - (int(inactive[1]) if inactive else 0)
