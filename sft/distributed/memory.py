"""Reads how much memory this process holds, what its peak was, and what it may use."""

from __future__ import annotations

import os
import re
import resource
import sys
from contextlib import suppress
from pathlib import Path

import torch

_RSS_UNIT = 1 if sys.platform == "darwin" else 1024  # bytes in ru_maxrss' unit (getrusage(2))
PROC = Path("/proc")
CGROUPS = Path("/sys/fs/cgroup")


def peak_memory_gb(device: torch.device) -> float:
    """Returns the peak in GiB: of the allocator's memory on a CUDA device, of resident memory elsewhere."""
    return peak_bytes(device) / 2**30


def peak_bytes(device: torch.device) -> int:
    """Returns the peak since the process began or `reset_peak` was called; as in `peak_memory_gb`."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    with suppress(OSError):  # no /proc (macOS)
        # Not ru_maxrss, which starts at that of the parent process.
        if mark := re.search(r"^VmHWM:\s+(\d+) kB", (PROC / "self/status").read_text(), re.MULTILINE):
            return int(mark[1]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * _RSS_UNIT


def held_bytes(device: torch.device) -> int:
    """Returns what is held now: tensors on a CUDA device, resident pages elsewhere."""
    if device.type == "cuda":
        return torch.cuda.memory_allocated(device)
    try:
        pages = int((PROC / "self/statm").read_text().split()[1])
    except OSError:  # no /proc (macOS): an upper bound
        return peak_bytes(device)
    return pages * resource.getpagesize()


def reset_peak(device: torch.device) -> None:
    """Resets the peak to what is held now.

    Linux takes "5" in `clear_refs` (proc_pid_clear_refs(5)). A system that cannot reset the peak of resident memory
    keeps the old one, and what is read later is an upper bound.
    """
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        return
    with suppress(OSError):
        (PROC / "self/clear_refs").write_text("5")


def memory_limit(device: torch.device, processes: int = 1) -> int:
    """Returns how many bytes one process may hold.

    On a CUDA device, which each process has to itself: all of it, less what other programs hold there now. On the CPU:
    what this process holds already, with an equal share of what the machine or its narrowest control group has free,
    within the process's address space limit.

    Args:
        processes: how many train on this machine.
    """
    if device.type == "cuda":
        unused, _ = torch.cuda.mem_get_info(device)
        return unused + torch.cuda.memory_reserved(device)
    held = held_bytes(device)
    free = [limit - used for limit, used in cgroup_limits(CGROUPS, PROC / "self/cgroup")]
    share = min([*free, _available()]) // processes + held
    address_space, _ = resource.getrlimit(resource.RLIMIT_AS)
    if address_space != resource.RLIM_INFINITY:
        used = int((PROC / "self/statm").read_text().split()[0]) * resource.getpagesize()
        share = min(share, held + max(0, address_space - used))
    return share


def _available() -> int:
    """Returns what is free without swapping; page caches that can be dropped count as free (proc_meminfo(5))."""
    with suppress(OSError):
        if found := re.search(r"^MemAvailable:\s+(\d+) kB", (PROC / "meminfo").read_text(), re.MULTILINE):
            return int(found[1]) * 1024
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def cgroup_limits(root: Path, membership: Path) -> list[tuple[int, int]]:
    """Returns the memory limit of each control group around this process and what it has in use, in bytes.

    A group's limit binds the groups in it, so all up to the root are read. Inactive page cache does not count as used:
    the kernel drops it before it kills.

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
            if (limit := _cgroup_limit(folder, *names)) is not None:
                found.append(limit)
    return found


def _cgroup_limit(folder: Path, limit: str, usage: str, cache: str) -> tuple[int, int] | None:
    try:
        allowed = (folder / limit).read_text().strip()
        used = int((folder / usage).read_text())
        inactive = re.search(rf"^{cache} (\d+)", (folder / "memory.stat").read_text(), re.MULTILINE)
    except OSError:
        return None
    if allowed == "max" or int(allowed) >= 2**60:  # version 1 writes a huge number for no limit
        return None
    return int(allowed), used - (int(inactive[1]) if inactive else 0)
