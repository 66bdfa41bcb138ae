"""Chooses the attention implementation of a model on this machine."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from sft.distributed.device import DeviceFacts

if TYPE_CHECKING:
    pass


def choose_attention(
    key: str, config: Any, model_class: Any, half_weights: bool, device: DeviceFacts
) -> tuple[str, str | None]:
    """The `attn_implementation` for `auto`: ours, which on a GPU is torch's flash attention; else SDPA.

    The package flash-attn is taken where it is installed and torch's kernel does not take the model's heads, a soft
    cap's for one: transformers' way to it waits for the device in each pass.

    Args:
        config: the model's.
        model_class: the class of the model, or None where only transformers can tell (remote code).
        half_weights: whether they are held in 16 bits; the package takes no others, and under autocast some calls of
            a model stand outside of it.

    Returns:
        The implementation, and why it is one that needs padding and masks; None where it needs neither.
    """
    if key != "auto":
        return key, None
    from transformers.utils import is_flash_attn_2_available

    from sft.model.attention import document_attention

    reason = document_attention.supports_documents(config, model_class)
    can_flash = device.kind == "cuda" and device.bf16 and half_weights and is_flash_attn_2_available()
    takes_flash = can_flash and reason is None and getattr(model_class, "_supports_flash_attn", False)
    if takes_flash and not document_attention.varlen_takes(config):
        return "flash_attention_2", None
    if reason is None:
        return document_attention.NAME, None
    return "sdpa" if getattr(model_class, "_supports_sdpa", True) else "eager", reason
