"""Chooses the attention implementation of a model on this machine."""

from __future__ import annotations

from typing import Any

from sft.distributed.device import DeviceFacts


def choose_attention(
    key: str, config: Any, model_class: Any, half_weights: bool, device: DeviceFacts
) -> tuple[str, str | None]:
    """Returns the implementation, and why it needs padding and masks (None if it does not).

    `auto` is `sft_documents`, which on a GPU is torch's flash attention, else SDPA. The package flash-attn is used
    where it is installed and torch's kernel does not support the model's heads, as with a soft cap: transformers'
    calls to it wait for the device in each forward pass.

    Args:
        key: the `attn_implementation` setting; all but `auto` is honoured.
        config: the model's.
        model_class: the class of the model, None if its code comes with it (remote code).
        half_weights: whether they are in 16 bits. flash-attn supports no others, and autocast does not cover all of
            its calls in a model.
    """
    if key != "auto":
        return key, None
    from transformers.utils import is_flash_attn_2_available

    from sft.model.attention import document_attention

    reason = document_attention.obstacle_to_documents(config, model_class)
    can_flash = device.kind == "cuda" and device.bf16 and half_weights and is_flash_attn_2_available()
    takes_flash = can_flash and reason is None and getattr(model_class, "_supports_flash_attn", False)
    if takes_flash and not document_attention.config_fits_varlen(config):
        return "flash_attention_2", None
    if reason is None:
        return document_attention.NAME, None
    return "sdpa" if getattr(model_class, "_supports_sdpa", True) else "eager", reason
