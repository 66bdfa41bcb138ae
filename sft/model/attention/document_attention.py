"""Computes attention within the documents of one flattened row, without a mask: `sft_documents` in transformers.

    position_ids  0 1 2 | 0 1 | 0 1 2 3        one row of N tokens, three documents
    attended      ◣     | ◣   | ◣              nothing between them is computed, and nothing of size N×N exists

`attention_inputs(...)` passes the document offsets to every layer as an ordinary keyword, so they survive DDP and the
recomputation of checkpointed layers, and no state is kept between calls. It adds a mask of shape (1, 1, 1, N) that
takes no memory: transformers passes a mask of four dimensions on as it is, and neither builds one nor searches
`position_ids` for documents (which would wait for the device for each mask). A call without offsets is sdpa's.
"""

from __future__ import annotations

import logging
from functools import lru_cache
from typing import Any, cast

import torch
from torch import Tensor

# Imported here, not where it is called: selective checkpointing lists the operators that it keeps before any layer
# runs, and torch has this one only after the import (20 ms).
from torch.nn.attention.varlen import varlen_attn

from sft.data.loading.document_offsets import DocumentOffsets
from sft.distributed.device import autocast_dtype
from sft.model.attention.kernel import attend

logger = logging.getLogger("sft")

NAME = "sft_documents"
_KNOWN_LAYERS = {"full_attention", "sliding_attention"}


class DocumentsLost(RuntimeError):
    """The document offsets given to a model did not reach its attention."""


def register() -> None:
    """Registers `attn_implementation="sft_documents"` with transformers; repeated calls change nothing."""
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import sdpa_mask

    AttentionInterface.register(NAME, document_attention)
    AttentionMaskInterface.register(NAME, sdpa_mask)


def takes_documents(config: Any) -> bool:
    """Returns whether a model of this config takes document offsets, and so needs no mask and no padding."""
    attention = _implementation(config)
    return attention == NAME or "flash" in attention


def attention_inputs(config: Any, documents: DocumentOffsets) -> dict[str, Any]:
    """Returns the inputs that separate documents, beside `input_ids` and `position_ids` (1, N).

    For `sft_documents` the offsets; for flash attention the same by its own names, so that no layer derives them; for
    any other implementation nothing: transformers then builds a mask of N×N from `position_ids`.
    """
    attention = _implementation(config)
    if attention == NAME:
        ones = torch.ones(1, dtype=torch.bool, device=documents.cu_seqlens.device)
        return {"documents": documents, "attention_mask": ones.expand(1, 1, 1, documents.tokens)}
    if "flash" in attention:
        offsets, longest = documents.cu_seqlens, documents.max_length
        return {"cu_seq_lens_q": offsets, "cu_seq_lens_k": offsets, "max_length_q": longest, "max_length_k": longest}
    return {}


def obstacle_to_documents(config: Any, model_class: Any) -> str | None:
    """Returns why `sft_documents` cannot separate documents in a model, None if it can.

    It is read from the config and the class alone, before there are weights or data; `isolation_check.measure_leak`
    measures it.

    Args:
        config: the model's.
        model_class: the class that it is loaded as; None if its code comes with it.
    """
    if model_class is None:
        return "its code comes with the model, and may attend in any way"
    name, text = model_class.__name__, config.get_text_config(decoder=True)
    if getattr(config, "is_encoder_decoder", False):
        return f"{name} has an encoder"
    if getattr(model_class, "_is_stateful", False):
        return f"{name} has recurrent layers, which carry their state from one document into the next"
    layers = set(getattr(text, "layer_types", None) or ())
    if layers - _KNOWN_LAYERS:
        return f"{name} has layers of the kind {', '.join(sorted(layers - _KNOWN_LAYERS))}"
    if not getattr(model_class, "_supports_attention_backend", False):
        return f"{name} does not attend through transformers' attention interface"
    # Layers pass their window to flash attention only; for the others it is in the mask.
    if "sliding_attention" in layers and not getattr(model_class, "_supports_flash_attn", False):
        return f"{name} does not pass the sliding window to its attention"
    if not getattr(text, "is_causal", True) or getattr(text, "use_bidirectional_attention", None) is True:
        return f"{name} as configured sees tokens that come later"
    return None


def document_attention(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    documents: DocumentOffsets | None = None,
    **options: Any,
) -> tuple[Tensor, None]:
    """Computes the attention of one layer; transformers calls it.

    Args:
        query, key, value: (B, H, T, D), (B, Hk, T, D), (B, Hk, T, Dv); with documents B is 1.
        attention_mask: ignored if documents are given.
        documents: from `attention_inputs`.
        options: `sliding_window`, `softcap`, `s_aux` (GPT-OSS's sinks) and others, as the layers pass them.

    Returns:
        The heads' outputs, (B, T, H, Dv), and None for the weights, which are not kept.

    Raises:
        ValueError: documents are combined with an input or option that they exclude.
        DocumentsLost: the call's offsets did not reach this layer.
    """
    softcap, sinks = options.get("softcap"), options.get("s_aux")
    if documents is None:
        if attention_mask is not None and attention_mask.shape[-2:-1] == (1,) != query.shape[-2:-1]:
            raise DocumentsLost(f"{type(module).__name__} does not get the offsets of the documents")
        return _without_documents(module, query, key, value, attention_mask, dropout, scaling, options)
    _check_supported(module, query, key, options)
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    window = options.get("sliding_window")
    q, k, v = query[0], key[0], value[0]
    fits = fits_varlen(_compute_dtype(query), q.shape[-1], v.shape[-1], softcap, sinks, dropout)
    if fits and query.is_cuda and capability(query.device.index) >= (8, 0):
        return flash_attention(q, k, v, documents, scale, window)[None], None
    if query.is_cuda and module.training and not torch.compiler.is_compiling():
        widths, has_sinks = (q.shape[-1], v.shape[-1]), sinks is not None
        warn_slow_heads(fits, str(_compute_dtype(query)), *widths, softcap, has_sinks, dropout)
    return attend(q, k, v, documents.offsets, scale, window, softcap, sinks, dropout)[None], None


def _implementation(config: Any) -> str:
    return str(config.get_text_config(decoder=True)._attn_implementation)


def fits_varlen(
    dtype: torch.dtype, width: int, value_width: int, softcap: float | None, sinks: Tensor | None, dropout: float
) -> bool:
    """Returns whether torch's flash attention supports these heads; `kernel.attend` computes all others."""
    half = dtype in (torch.float16, torch.bfloat16)
    plain = softcap is None and sinks is None and not dropout
    return half and plain and width == value_width and width <= 256 and width % 8 == 0


def config_fits_varlen(config: Any) -> bool:
    """Returns whether torch's flash attention supports the heads of a model of this config, trained in 16 bits."""
    text = config.get_text_config(decoder=True)
    width = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    softcap, dropout = getattr(text, "attn_logit_softcapping", None), getattr(text, "attention_dropout", 0.0)
    return fits_varlen(torch.bfloat16, width, width, softcap, None, dropout)


@lru_cache
def warn_slow_heads(
    fits: bool, dtype: str, width: int, value_width: int, softcap: float | None, has_sinks: bool, dropout: float
) -> None:
    """Warns, once for each kind of head, that torch's flash attention does not support it on this GPU."""
    if fits:
        reason = "torch's flash attention needs an Ampere or a later GPU"
    else:
        heads = f"{width} wide" if width == value_width else f"{width} wide with values of {value_width}"
        extras = [f"a soft cap of {softcap}"] * (softcap is not None) + ["sinks"] * has_sinks
        extras += [f"dropout {dropout}"] * bool(dropout)
        with_what = " and ".join(extras) or "no more"
        reason = f"torch's flash attention does not support heads in {dtype}, {heads}, with {with_what}"
    logger.warning(
        "Attention computes a block of queries at a time, and the GPU waits for the host: %s. Faster, if the model "
        "allows it: bf16: true, no attention dropout, or attn_implementation: flash_attention_2 (or sdpa, padded)",
        reason,
    )


def flash_attention(
    query: Tensor, key: Tensor, value: Tensor, documents: DocumentOffsets, scale: float, window: int | None
) -> Tensor:
    """Computes `kernel.attend` by torch's flash attention: (N, H, D)."""
    dtype = _compute_dtype(query)
    q, k, v = (tensor.transpose(0, 1).to(dtype) for tensor in (query, key, value))
    offsets, longest = documents.cu_seqlens, documents.max_length
    # It counts the keys to the left of the query; a model's window also counts the query's own.
    reach = (-1 if window is None else window - 1, 0)
    grouped = q.shape[1] != k.shape[1]
    out = varlen_attn(q, k, v, offsets, offsets, longest, longest, scale=scale, window_size=reach, enable_gqa=grouped)
    return cast(Tensor, out)


def _compute_dtype(query: Tensor) -> torch.dtype:
    return autocast_dtype(query.device.type) or query.dtype


def capability(device: int) -> tuple[int, int]:
    """Returns the compute capability of a CUDA device; not cached itself: torch.compile traces what a cache wraps."""
    return _cached_capability(device)


@lru_cache
def _cached_capability(device: int) -> tuple[int, int]:
    return torch.cuda.get_device_capability(device)


def _check_supported(module: torch.nn.Module, query: Tensor, key: Tensor, options: dict[str, Any]) -> None:
    """Checks that attention within documents would be exact for these inputs and options."""
    if query.shape[0] != 1 or query.shape[2] != key.shape[2]:
        raise ValueError(
            f"documents need one row without a key cache: {query.shape[0]} rows of {query.shape[2]} queries were given "
            f"with {key.shape[2]} keys"
        )
    if options.get("position_bias") is not None:
        raise ValueError("attention with a position bias cannot be restricted to documents")
    is_causal = options.get("is_causal")
    if not (getattr(module, "is_causal", True) if is_causal is None else is_causal):
        raise ValueError("attention to later tokens cannot be restricted to documents")
    if "sliding_window" not in options and _has_window(module):
        raise ValueError(f"{type(module).__name__} has a sliding window and does not pass it to its attention")


def _has_window(module: torch.nn.Module) -> bool:
    """Returns whether the layer's config has a window, which for another attention would be in the mask."""
    config, layer = getattr(module, "config", None), getattr(module, "layer_idx", None)
    kinds = getattr(config, "layer_types", None)
    if kinds and layer is not None:
        return bool(kinds[layer] == "sliding_attention")
    return getattr(config, "sliding_window", None) is not None


def _without_documents(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    dropout: float,
    scaling: float | None,
    options: dict[str, Any],
) -> tuple[Tensor, None]:
    """Computes transformers' sdpa, or by explicit weights what it does not support: soft caps and sinks."""
    softcap, sinks = options.get("softcap"), options.get("s_aux")
    if softcap is None and sinks is None:
        from transformers.integrations.sdpa_attention import sdpa_attention_forward

        out: tuple[Tensor, None] = sdpa_attention_forward(
            module, query, key, value, mask, dropout=dropout, scaling=scaling, **options
        )
        return out
    queries = query.shape[2]
    if mask is None:  # the mask function returns none if plain causality is enough
        if queries > 1:
            key, value = key[:, :, :queries], value[:, :, :queries]
        mask = torch.ones(queries, key.shape[2], dtype=torch.bool, device=query.device)
        mask = mask.tril(key.shape[2] - queries)
    groups = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    scores = torch.matmul(query, key.transpose(2, 3)) * scale  # (B, H, T, keys)
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    scores = scores.masked_fill(~mask, torch.finfo(scores.dtype).min) if mask.dtype == torch.bool else scores + mask
    if sinks is not None:
        column = sinks.to(scores.dtype).view(1, -1, 1, 1).expand(scores.shape[0], -1, queries, 1)
        scores = torch.cat([scores, column], -1)
    weights = torch.softmax(scores, -1, dtype=torch.float32)[..., : key.shape[2]].to(value.dtype)
    weights = torch.nn.functional.dropout(weights, dropout)
    return torch.matmul(weights, value).transpose(1, 2).contiguous(), None
