"""Activation checkpointing: keeps all activations, the costly ones, or each layer's input, and recomputes the rest.

Memory that one layer of a Llama in bfloat16 keeps for the backward pass, in bytes per token and column of the hidden
state (width 768, intermediate 2,048, sequences of 2,048 tokens), and the time of a step on two CPU cores:

    none       60    1.00    nothing is recomputed
    selective  34    1.06    matrix multiplications and attention are kept; norms, rotations, gates are recomputed
    full       11    1.28    the layer's input is kept; its whole forward pass is recomputed

All three give the same gradients to the last bit, dropout included.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, partial
from typing import Any, Literal

import torch
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts
from transformers.modeling_layers import GradientCheckpointingLayer

from sft.errors import Problem, UserError

Mode = Literal["none", "selective", "full"]

_COSTLY = {
    "aten": (
        "mm addmm bmm baddbmm linear mkldnn_linear _scaled_mm _grouped_mm _scaled_dot_product_flash_attention "
        "_scaled_dot_product_flash_attention_for_cpu _scaled_dot_product_efficient_attention "
        "_scaled_dot_product_cudnn_attention _scaled_dot_product_fused_attention_overrideable"
    ),
    "torch_attn": "_varlen_attn",
    "flash_attn": "_flash_attn_forward _flash_attn_varlen_forward",
    "bitsandbytes": "gemm_4bit gemv_4bit int8_scaled_mm int8_mixed_scaled_mm",
    "sft": "document_attention",
}
"""Operators whose results are kept, by library: those that do more than read their inputs once."""

_MIN_OFFLOAD_BYTES = 2**20  # copying a smaller tensor costs more than the memory that it frees is worth


def checkpoint_activations(
    model: torch.nn.Module, mode: Mode, *, offload: bool = False, device: torch.device | None = None
) -> None:
    """Sets how the decoder layers of `model` keep their activations while training.

    Args:
        model: of transformers, wrapped by peft or not; not yet by DDP. A meta model offloads nothing, as there is
            nothing to copy: a memory estimate counts the inputs of its layers as kept on the GPU.
        mode: see the module's table.
        offload: for a model that trains on a GPU: each layer's input is kept in page-locked main memory, copied on a
            stream of its own while the next layers run, and fetched one layer ahead in the backward pass.
        device: where the model will be trained, if it is not there yet.

    Raises:
        UserError: the model's layers cannot be checkpointed, or `offload` is set and there is no GPU.
    """
    layers = [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]
    key = "activation_checkpoint"
    if mode != "none" and not layers:
        raise UserError(Problem(f"the layers of {type(model).__name__} cannot be recomputed", "Use none.", key))
    current = next(model.parameters()).device
    device = device or current
    if offload and mode == "none":
        hint = "`mode: full` keeps the inputs of layers only, and these are moved"
        raise UserError(Problem("offload without checkpointing would move every activation", hint, f"{key}.offload"))
    if offload and device.type != "cuda":
        reason = f"the model is trained on the {device.type.upper()}: its activations are in main memory already"
        raise UserError(Problem(reason, "Remove it.", f"{key}.offload"))
    host = HostMemory(device) if offload and current.type != "meta" else None
    for layer in layers:
        settings: Any = layer
        # transformers calls this function in place of `forward` while the model is in training mode.
        settings.gradient_checkpointing = mode != "none"
        settings._gradient_checkpointing_func = partial(_checkpointed_forward, mode, host)


def _checkpointed_forward(mode: Mode, host: HostMemory | None, forward: Callable[..., Any], *args: Any) -> Any:
    contexts: Any = {"context_fn": _selective_contexts} if mode == "selective" else {}
    if host is None:
        return checkpoint(forward, *args, use_reentrant=False, **contexts)
    with saved_tensors_hooks(host.pack, host.unpack):  # for the inputs alone: inside, the checkpoint has its own
        return checkpoint(forward, *args, use_reentrant=False, **contexts)


def _selective_contexts() -> Any:
    return create_selective_checkpoint_contexts(costly_operators())


@cache
def costly_operators() -> list[Any]:
    """Returns the operators of `_COSTLY` that are loaded here, in all their overloads."""
    found: list[Any] = []
    for library, names in _COSTLY.items():
        namespace = getattr(torch.ops, library)
        for packet in (getattr(namespace, name, None) for name in names.split()):
            if packet is not None:
                found += [getattr(packet, overload) for overload in packet.overloads()]
    return found


@dataclass(eq=False)
class _Offloaded:
    """A tensor in main memory, the tensor that was offloaded before it, and its copy on the device while fetched."""

    host: torch.Tensor
    device: torch.device
    before: weakref.ref[_Offloaded] | None
    fetched: torch.Tensor | None = None


class HostMemory:
    """Offloads the saved tensors of `device` to main memory, with copies that overlap the computation."""

    def __init__(self, device: torch.device) -> None:
        self._streams: Any = torch.get_device_module(device)
        self._stream = self._streams.Stream() if device.type == "cpu" else self._streams.Stream(device)
        self._latest: weakref.ref[_Offloaded] | None = None  # weak: owned and freed by the graph

    def pack(self, tensor: torch.Tensor) -> torch.Tensor | _Offloaded:
        """Starts the copy to main memory; small tensors and parameters stay on the device."""
        if tensor.nbytes < _MIN_OFFLOAD_BYTES or isinstance(tensor, torch.nn.Parameter):
            return tensor
        self._stream.wait_stream(self._streams.current_stream())
        with self._streams.stream(self._stream):
            host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=tensor.is_cuda)
            host.copy_(tensor.detach(), non_blocking=True)
        if tensor.is_cuda:
            tensor.record_stream(self._stream)  # its memory is not reused before the copy is done
        offloaded = _Offloaded(host, tensor.device, self._latest)
        self._latest = weakref.ref(offloaded)
        return offloaded

    def unpack(self, offloaded: torch.Tensor | _Offloaded) -> torch.Tensor:
        """Returns the tensor on its device, and starts to fetch the one that the backward pass needs next."""
        if isinstance(offloaded, torch.Tensor):
            return offloaded
        self._fetch(offloaded)
        self._streams.current_stream().wait_stream(self._stream)
        tensor, offloaded.fetched = offloaded.fetched, None
        assert tensor is not None
        if tensor.is_cuda:
            tensor.record_stream(self._streams.current_stream())
        before = offloaded.before() if offloaded.before else None
        if before is not None:
            self._fetch(before)
        return tensor

    def _fetch(self, offloaded: _Offloaded) -> None:
        if offloaded.fetched is None:
            with self._streams.stream(self._stream):
                offloaded.fetched = offloaded.host.to(offloaded.device, non_blocking=True, copy=True)
