"""`sft_documents`: attention over the documents of one flattened row, without a mask, in any model of transformers.

    position_ids  0 1 2 | 0 1 | 0 1 2 3        one row of N tokens, three documents
    attended      ◣     | ◣   | ◣              nothing between them is computed, and nothing of size N×N exists

A call with `attention_inputs(...)` hands the boundaries to every layer as an ordinary keyword, so they survive DDP and
the recomputation of checkpointed layers; there is no state beside the call. With them goes a mask of shape (1, 1, 1, N)
that takes no memory: transformers returns a mask of four dimensions as it is, and so neither builds one nor looks
for documents in `position_ids` (which would wait for the device once a mask). A call without boundaries is sdpa's.
"""

from __future__ import annotations

import logging
from functools import lru_cache
from typing import Any, cast

import torch
from torch import Tensor

# Here and not where it is called: selective checkpointing lists the operators that it keeps before any layer runs, and
# torch has this one only once it is imported (20 ms).
from torch.nn.attention.varlen import varlen_attn

from sft.data.loading.document_offsets import DocumentOffsets
from sft.model.attention.kernel import attend

logger = logging.getLogger("sft")

NAME = "sft_documents"
_KNOWN_LAYERS = {"full_attention", "sliding_attention"}


class DocumentsLost(RuntimeError):
    """The boundaries given to a model did not reach its attention."""


def register() -> None:
    """Makes `attn_implementation="sft_documents"` known to transformers; any number of times."""
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import sdpa_mask

    AttentionInterface.register(NAME, document_attention)
    AttentionMaskInterface.register(NAME, sdpa_mask)


def takes_documents(config: Any) -> bool:
    """Whether a model so configured takes the boundaries of a flattened row, and so needs no mask and no padding."""
    attention = _implementation(config)
    return attention == NAME or "flash" in attention


def attention_inputs(config: Any, boundaries: DocumentOffsets) -> dict[str, Any]:
    """What the model is called with beside `input_ids` and `position_ids` (1, N), so that documents stay apart.

    For `sft_documents` the boundaries; for flash attention its own names for them, so that no layer derives them; for
    any other implementation nothing: there transformers builds a mask of N×N from `position_ids`.
    """
    attention = _implementation(config)
    if attention == NAME:
        everything = torch.ones(1, dtype=torch.bool, device=boundaries.cu_seqlens.device)
        return {"documents": boundaries, "attention_mask": everything.expand(1, 1, 1, boundaries.tokens)}
    if "flash" in attention:
        offsets, longest = boundaries.cu_seqlens, boundaries.max_length
        return {"cu_seq_lens_q": offsets, "cu_seq_lens_k": offsets, "max_length_q": longest, "max_length_k": longest}
    return {}


def supports_documents(config: Any, model_class: Any) -> str | None:
    """Why a model's documents cannot be kept apart by `sft_documents`, or None: they can.

    Told from the config and the class alone, before there are weights or data; `isolation.measure_leak` measures it.

    Args:
        config: the model's.
        model_class: the class that it is loaded as; None for one whose code comes with the model.
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
    # Only flash attention is told a layer's window; for the others it is in the mask.
    if "sliding_attention" in layers and not getattr(model_class, "_supports_flash_attn", False):
        return f"{name} does not tell its attention the sliding window"
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
    """What transformers calls in each layer.

    Args:
        query, key, value: (B, H, T, D), (B, Hk, T, D), (B, Hk, T, Dv); with documents B is 1.
        attention_mask: of a call without documents; with them it says nothing.
        documents: from `attention_inputs`.
        options: `sliding_window`, `softcap`, `s_aux` (GPT-OSS's sinks) and others, as the layers pass them.

    Returns:
        The heads' outputs, (B, T, H, Dv), and None for the weights, which are not kept.

    Raises:
        ValueError: documents are given together with what cannot be combined with them.
        DocumentsLost: the call's boundaries did not come through to this layer.
    """
    softcap, sinks = options.get("softcap"), options.get("s_aux")
    if documents is None:
        if attention_mask is not None and attention_mask.shape[-2:-1] == (1,) != query.shape[-2:-1]:
            raise DocumentsLost(f"{type(module).__name__} is not told where documents begin")
        return _without_documents(module, query, key, value, attention_mask, dropout, scaling, options)
    _refuse_what_is_not_exact(module, query, key, options)
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    window = options.get("sliding_window")
    q, k, v = query[0], key[0], value[0]
    fits = fits_varlen(_compute_dtype(query), q.shape[-1], v.shape[-1], softcap, sinks, dropout)
    if fits and query.is_cuda and capability(query.device.index) >= (8, 0):
        return _varlen(q, k, v, documents, scale, window)[None], None
    if query.is_cuda and module.training and not torch.compiler.is_compiling():
        widths, has_sinks = (q.shape[-1], v.shape[-1]), sinks is not None
        _say_what_is_slow(fits, str(_compute_dtype(query)), *widths, softcap, has_sinks, dropout)
    return attend(q, k, v, documents.offsets, scale, window, softcap, sinks, dropout)[None], None


def _implementation(config: Any) -> str:
    return str(config.get_text_config(decoder=True)._attn_implementation)


def fits_varlen(
    dtype: torch.dtype, width: int, value_width: int, softcap: float | None, sinks: Tensor | None, dropout: float
) -> bool:
    """Whether torch's flash attention takes these heads; what it does not take goes through `document_kernel`."""
    half = dtype in (torch.float16, torch.bfloat16)
    plain = softcap is None and sinks is None and not dropout
    return half and plain and width == value_width and width <= 256 and width % 8 == 0


def varlen_takes(config: Any) -> bool:
    """The same of a model that trains in 16 bits, told from its config."""
    text = config.get_text_config(decoder=True)
    width = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    softcap, dropout = getattr(text, "attn_logit_softcapping", None), getattr(text, "attention_dropout", 0.0)
    return fits_varlen(torch.bfloat16, width, width, softcap, None, dropout)


@lru_cache
def _say_what_is_slow(
    fits: bool, dtype: str, width: int, value_width: int, softcap: float | None, has_sinks: bool, dropout: float
) -> None:
    """Once for each kind of head: that torch's flash attention does not take it on this GPU, and what is faster."""
    if fits:
        reason = "GPUs older than Ampere have none of torch's flash attention"
    else:
        heads = f"{width} wide" if width == value_width else f"{width} wide with values of {value_width}"
        extras = [f"a soft cap of {softcap}"] * (softcap is not None) + ["sinks"] * has_sinks
        extras += [f"dropout {dropout}"] * bool(dropout)
        with_what = " and ".join(extras) or "no more"
        reason = f"torch's flash attention does not take heads in {dtype}, {heads}, with {with_what}"
    logger.warning(
        "Attention computes a block of queries at a time, and the GPU waits for the host: %s. Faster where the model "
        "allows it: bf16: true, no attention dropout, or attn_implementation: flash_attention_2 (or sdpa, padded)",
        reason,
    )


def _varlen(
    query: Tensor, key: Tensor, value: Tensor, documents: DocumentOffsets, scale: float, window: int | None
) -> Tensor:
    """The same on a GPU by torch's own flash attention: (N, H, D)."""
    dtype = _compute_dtype(query)
    q, k, v = (tensor.transpose(0, 1).to(dtype) for tensor in (query, key, value))
    offsets, longest = documents.cu_seqlens, documents.max_length
    # It counts the keys to the left of the query, a model's window counts the query's own as well.
    reach = (-1 if window is None else window - 1, 0)
    grouped = q.shape[1] != k.shape[1]
    out = varlen_attn(q, k, v, offsets, offsets, longest, longest, scale=scale, window_size=reach, enable_gqa=grouped)
    return cast(Tensor, out)


def _compute_dtype(query: Tensor) -> torch.dtype:
    kind = query.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else query.dtype


def capability(device: int) -> tuple[int, int]:
    """The compute capability of a CUDA device; not cached itself: torch.compile looks into what a cache wraps."""
    return _asked_capability(device)


@lru_cache
def _asked_capability(device: int) -> tuple[int, int]:
    return torch.cuda.get_device_capability(device)


def _refuse_what_is_not_exact(module: torch.nn.Module, query: Tensor, key: Tensor, options: dict[str, Any]) -> None:
    if query.shape[0] != 1 or query.shape[2] != key.shape[2]:
        raise ValueError(
            f"documents stand in one row without a past: {query.shape[0]} rows of {query.shape[2]} queries were given "
            f"with {key.shape[2]} keys"
        )
    if options.get("position_bias") is not None:
        raise ValueError("attention with a position bias cannot be restricted to documents")
    is_causal = options.get("is_causal")
    if not (getattr(module, "is_causal", True) if is_causal is None else is_causal):
        raise ValueError("attention to later tokens cannot be restricted to documents")
    if "sliding_window" not in options and _has_window(module):
        raise ValueError(f"{type(module).__name__} has a sliding window and does not tell its attention")


def _has_window(module: torch.nn.Module) -> bool:
    """Whether the layer's config speaks of a window, which with another attention would be in the mask."""
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
    """sdpa as transformers has it; where that refuses (soft caps) or ignores (sinks) an option, the weights in full."""
    softcap, sinks = options.get("softcap"), options.get("s_aux")
    if softcap is None and sinks is None:
        from transformers.integrations.sdpa_attention import sdpa_attention_forward

        out: tuple[Tensor, None] = sdpa_attention_forward(
            module, query, key, value, mask, dropout=dropout, scaling=scaling, **options
        )
        return out
    queries = query.shape[2]
    if mask is None:  # the mask function leaves it out where it is plainly causal
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
