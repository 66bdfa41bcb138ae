"""How much memory a rank has needed at its peak."""

from __future__ import annotations

import resource
import sys

import torch

_RSS_UNIT = 1 if sys.platform == "darwin" else 1024  # bytes in ru_maxrss' unit (getrusage(2))


def peak_memory_gb(device: torch.device) -> float:
    """Peak in GiB: of the allocator's memory on a CUDA device, of the process's resident memory elsewhere."""
    if device.type == "cuda":
        peak = torch.cuda.max_memory_allocated(device)
    else:
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * _RSS_UNIT
    return peak / 2**30
