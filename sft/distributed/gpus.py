"""Counts the GPUs that this process may use, without torch where there are none, and checks what a run asks of them."""

from __future__ import annotations

import os
from pathlib import Path

from sft.config.schema import TrainingKeys
from sft.errors import Problem, UserError

DEVICES = Path("/dev")
# Device files of the kernel drivers: NVIDIA's, AMD's, and the one in Windows' Linux subsystem.
DRIVER_FILES = ("nvidia[0-9]*", "kfd", "dxg")


def has_gpu_driver() -> bool:
    """Returns whether a GPU's kernel driver is loaded. Machines without one need not import torch (1.6 s) to know."""
    return any(next(DEVICES.glob(name), None) is not None for name in DRIVER_FILES)


def visible_gpus() -> int:
    """Returns how many GPUs CUDA_VISIBLE_DEVICES leaves to this process; creates no CUDA context."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if (visible is not None and visible.strip() in ("", "-1")) or not has_gpu_driver():
        return 0
    import torch

    return torch.cuda.device_count()


def require_gpus(wanted: int, key: str = "num_gpus", file: str | None = None, line: int | None = None) -> None:
    """Checks that `wanted` GPUs are visible.

    Raises:
        UserError: there are fewer; with the reason where it is known.
    """
    found = visible_gpus()
    if wanted <= found:
        return
    hint = f"ask for {found} at the most" if found else "leave it out to train on the CPU"
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None:
        hint += f"; CUDA_VISIBLE_DEVICES={visible!r} limits what is seen"
    elif has_gpu_driver() and not found:
        hint = f"a GPU driver is loaded, but {_torch_build()}"
    seen = {0: "no GPU is", 1: "1 GPU is"}.get(found, f"{found} GPUs are")
    message = f"{wanted} GPU{'s' * (wanted != 1)} asked for, and {seen} visible here"
    raise UserError(Problem(message, hint, key, file, line))


def require_tf32(keys: TrainingKeys, *, on_cpu: bool = False) -> None:
    """Checks that the GPU can compute in TF32 if the config has `tf32: true`.

    Args:
        on_cpu: whether the run uses no GPU, even where there are some.

    Raises:
        UserError: there is no GPU, or an older one than NVIDIA's Ampere.
    """
    if not keys.tf32:
        return
    if not on_cpu and visible_gpus():
        from transformers.utils import is_torch_tf32_available

        if is_torch_tf32_available():
            return
    message = "needs a GPU of NVIDIA's Ampere or a later kind, and there is none here"
    raise UserError(keys.problem("tf32", message, "Remove it: it changes nothing elsewhere."))


def _torch_build() -> str:
    import torch

    if torch.version.cuda is None and torch.version.hip is None:
        return f"torch {torch.__version__} is a build without GPU support: install another build of it"
    return f"torch {torch.__version__} finds no device that it can use: see `nvidia-smi` or `rocm-smi`"
