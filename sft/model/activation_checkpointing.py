"""What the forward pass keeps for the backward pass: everything, the costly results only, or each layer's input.

What one layer of a Llama in bfloat16 adds to the living tensors of a forward pass, in bytes for each token and column
of the hidden state (width 768, intermediate 2,048, rows of 2,048 tokens), and the time of a step on two CPU cores:

    none       60    1.00    nothing is computed twice
    selective  34    1.06    matrix products and attention are kept; norms, rotations, gates are computed again
    full       11    1.28    the layer's input is kept; its whole forward pass runs again

All three give the same gradients to the last bit, dropout included.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
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

_WORTH_MOVING = 2**20  # bytes; a smaller tensor costs more to send to the host than it frees


def checkpoint_activations(
    model: torch.nn.Module, mode: Mode, *, offload: bool = False, device: torch.device | None = None
) -> None:
    """Sets how the decoder layers of `model` keep their activations while training.

    Args:
        model: of transformers, wrapped by peft or not; not yet by DDP. On the meta device nothing is ever parked, for
            there is nothing to copy: what is then told of a pass on a GPU counts the inputs of its layers as kept.
        mode: see the module's table.
        offload: of a model that trains on a GPU: what is left of each layer's input waits in page-locked main memory,
            copied on a stream of its own while the next layers run, and fetched one layer ahead in the backward pass.
        device: where training will compute, if that is not where the model stands now.

    Raises:
        UserError: the model's layers cannot be checkpointed, or there is no GPU whose memory `offload` could spare.
    """
    layers = [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]
    key = "activation_checkpoint"
    if mode != "none" and not layers:
        raise UserError(Problem(f"the layers of {type(model).__name__} cannot be computed again", "Use none.", key))
    stands = next(model.parameters()).device
    device = device or stands
    if offload and mode == "none":
        hint = "`mode: full` keeps the inputs of layers, which are what is moved"
        raise UserError(Problem("offload without checkpointing would move every activation", hint, f"{key}.offload"))
    if offload and device.type != "cuda":
        reason = f"the model is trained on the {device.type.upper()}: its activations are in main memory already"
        raise UserError(Problem(reason, "Leave it out.", f"{key}.offload"))
    host = HostMemory(device) if offload and stands.type != "meta" else None
    for layer in layers:
        settings: Any = layer
        # transformers calls this function in place of `forward` while the model is in training mode.
        settings.gradient_checkpointing = mode != "none"
        settings._gradient_checkpointing_func = partial(_recomputed, mode, host)


def _recomputed(mode: Mode, host: HostMemory | None, forward: Callable[..., Any], *args: Any) -> Any:
    contexts: Any = {"context_fn": _keeping_costly} if mode == "selective" else {}
    if host is None:
        return checkpoint(forward, *args, use_reentrant=False, **contexts)
    with saved_tensors_hooks(host.pack, host.unpack):  # sees the inputs alone: what is inside has hooks of its own
        return checkpoint(forward, *args, use_reentrant=False, **contexts)


def _keeping_costly() -> Any:
    return create_selective_checkpoint_contexts(costly_operators())


@cache
def costly_operators() -> list[Any]:
    """The operators of `_COSTLY` that are loaded here, in all their overloads."""
    found: list[Any] = []
    for library, names in _COSTLY.items():
        namespace = getattr(torch.ops, library)
        for packet in (getattr(namespace, name, None) for name in names.split()):
            if packet is not None:
                found += [getattr(packet, overload) for overload in packet.overloads()]
    return found


class _Parked:
    """A tensor in main memory; on the way back also the copy on the device, and the one that was parked before it."""

    def __init__(self, host: torch.Tensor, device: torch.device, before: weakref.ref[_Parked] | None) -> None:
        self.host = host
        self.device = device
        self.before = before
        self.fetched: torch.Tensor | None = None


class HostMemory:
    """Parks saved tensors in main memory, with copies that overlap the computation.

    Args:
        device: where the tensors come from.
    """

    def __init__(self, device: torch.device) -> None:
        self._streams: Any = torch.get_device_module(device)
        self._stream = self._streams.Stream() if device.type == "cpu" else self._streams.Stream(device)
        self._latest: weakref.ref[_Parked] | None = None  # the graph owns what is parked; it dies with the graph

    def pack(self, tensor: torch.Tensor) -> torch.Tensor | _Parked:
        """Starts the copy to the host; small tensors and parameters stay where they are."""
        if tensor.nbytes < _WORTH_MOVING or isinstance(tensor, torch.nn.Parameter):
            return tensor
        self._stream.wait_stream(self._streams.current_stream())
        with self._streams.stream(self._stream):
            host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=tensor.is_cuda)
            host.copy_(tensor.detach(), non_blocking=True)
        if tensor.is_cuda:
            tensor.record_stream(self._stream)  # its memory is not given away before the copy is done
        parked = _Parked(host, tensor.device, self._latest)
        self._latest = weakref.ref(parked)
        return parked

    def unpack(self, parked: torch.Tensor | _Parked) -> torch.Tensor:
        """The tensor on its device again; begins to fetch the one that the backward pass needs next."""
        if isinstance(parked, torch.Tensor):
            return parked
        self._fetch(parked)
        self._streams.current_stream().wait_stream(self._stream)
        tensor, parked.fetched = parked.fetched, None
        assert tensor is not None
        if tensor.is_cuda:
            tensor.record_stream(self._streams.current_stream())
        before = parked.before() if parked.before else None
        if before is not None:
            self._fetch(before)
        return tensor

    def _fetch(self, parked: _Parked) -> None:
        if parked.fetched is None:
            with self._streams.stream(self._stream):
                parked.fetched = parked.host.to(parked.device, non_blocking=True, copy=True)
