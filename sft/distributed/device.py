"""The device of this process, and its properties that decide dtype and attention."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class DeviceFacts:
    """The properties of a device that decide the precision; a value, which tests can make up on any machine.

    Attributes:
        kind: `cuda` or `cpu`.
        bf16: whether the device can compute in bfloat16 (on a GPU: natively, not emulated).
        bf16_speedup: how many times faster a CPU multiplies matrices in bfloat16 than in float32.
    """

    kind: str
    bf16: bool
    bf16_speedup: float = 1.0


def device_facts(measured: bool = False) -> DeviceFacts:
    """Returns the properties of the device this process runs on.

    Args:
        measured: whether to time a CPU's matrix multiplications (50 ms, once in a process). The first rank's
            measurement then counts for all ranks, and all of them must call this.
    """
    import torch

    if torch.cuda.is_available():
        return DeviceFacts("cuda", torch.cuda.is_bf16_supported(including_emulation=False))
    if not measured:
        return DeviceFacts("cpu", bf16=True)
    from sft.distributed.cpu import bf16_speedup

    return DeviceFacts("cpu", bf16=True, bf16_speedup=bf16_speedup())


def training_device() -> torch.device:
    """Returns the GPU that this process has claimed (`distributed_utils.claim_devices`), or the CPU."""
    import torch

    return torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")


def autocast_dtype(device_type: str) -> torch.dtype | None:
    """Returns the dtype that autocast computes in on such devices, None while it is off."""
    import torch

    return torch.get_autocast_dtype(device_type) if torch.is_autocast_enabled(device_type) else None
