"""Who takes part in the GPU benchmark, and with what settings."""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Contestant:
    """Who trains: a worker, what it is told beyond what all are told, and the packages without which it stays away."""

    name: str
    worker: str
    needs: tuple[str, ...] = ()
    settings: dict[str, Any] = field(default_factory=dict)
    extra: dict[str, Any] = field(default_factory=dict)


def _attention() -> str:
    return "flash_attention_2" if importlib.util.find_spec("flash_attn") else "sdpa"


def contestants() -> list[Contestant]:
    """All that can take part, whether they are installed or not; those of the same settings stand together."""
    half = {
        "model_init_kwargs": {"dtype": "bfloat16", "attn_implementation": _attention()},
        "packing": True,
        "packing_strategy": "bfd",
    }
    fast = {**half, "gradient_checkpointing": False}
    return [
        Contestant("ours", "ours"),
        Contestant("bare loop", "bare"),
        Contestant("Trainer, bf16", "plain"),
        Contestant("Trainer, Liger", "plain", ("liger_kernel",), {"use_liger_kernel": True}),
        Contestant("Trainer, CCE", "plain", ("cut_cross_entropy",), extra={"cut_cross_entropy": True}),
        Contestant("TRL", "trl", ("trl",)),
        Contestant("TRL, packed", "trl", ("trl",), half),
        Contestant("TRL, packed, no checkpointing", "trl", ("trl",), fast),
        Contestant("TRL, packed, Liger", "trl", ("trl", "liger_kernel"), {**fast, "use_liger_kernel": True}),
    ]


HEAD_CONTESTANTS = {
    "ours": (),
    "torch_plain": (),
    "torch_compiled": (),
    "liger": ("liger_kernel",),
    "cut_cross_entropy": ("cut_cross_entropy",),
    "trl": ("trl",),
}


def is_installed(packages: tuple[str, ...]) -> bool:
    """Whether all of them can be imported."""
    return all(importlib.util.find_spec(package) for package in packages)
