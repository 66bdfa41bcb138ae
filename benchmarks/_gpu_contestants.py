"""The contestants of the GPU benchmark and their settings."""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Contestant:
    """A worker of `_train_contestants`, its own settings and arguments, and the packages that it needs."""

    name: str
    worker: str
    needs: tuple[str, ...] = ()
    settings: dict[str, Any] = field(default_factory=dict)
    extra: dict[str, Any] = field(default_factory=dict)


def _attention() -> str:
    return "flash_attention_2" if importlib.util.find_spec("flash_attn") else "sdpa"


def list_contestants() -> list[Contestant]:
    """Returns all contestants, installed or not."""
    packed = {
        "model_init_kwargs": {"dtype": "bfloat16", "attn_implementation": _attention()},
        "packing": True,
        "packing_strategy": "bfd",
    }
    uncheckpointed = {**packed, "gradient_checkpointing": False}
    return [
        Contestant("ours", "ours"),
        Contestant("bare loop", "bare"),
        Contestant("Trainer, bf16", "plain"),
        Contestant("Trainer, Liger", "plain", ("liger_kernel",), {"use_liger_kernel": True}),
        Contestant("Trainer, CCE", "plain", ("cut_cross_entropy",), extra={"cut_cross_entropy": True}),
        Contestant("TRL", "trl", ("trl",)),
        Contestant("TRL, packed", "trl", ("trl",), packed),
        Contestant("TRL, packed, no checkpointing", "trl", ("trl",), uncheckpointed),
        Contestant("TRL, packed, Liger", "trl", ("trl", "liger_kernel"), {**uncheckpointed, "use_liger_kernel": True}),
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
    """Returns whether all packages can be imported."""
    return all(importlib.util.find_spec(package) for package in packages)
