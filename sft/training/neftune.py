"""NEFTune: adds noise to the embeddings in training (Jain et al., 2023, arXiv:2310.05914, algorithm 1).

    embeddings of a document + u · alpha / sqrt(L · d),    u uniform in (-1, 1), independent for each element

L is the document's own length. The tensor is longer if it is packed or padded; with its length the noise of a short
document would be far too small.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch

from sft.data.loading.document_offsets import DocumentOffsets


def noise_scale(
    input_ids: torch.Tensor,
    width: int,
    alpha: float,
    *,
    documents: DocumentOffsets | None = None,
    attention_mask: torch.Tensor | None = None,
    position_ids: torch.Tensor | None = None,
) -> torch.Tensor:
    """Returns the noise's bound for each token, alpha / sqrt(L · d), float32: (B, T, 1), or (B, 1, 1) if padded.

    Args:
        input_ids: (B, T); only the shape and device are used.
        width: d, the embedding dimension.
        alpha: NEFTune's scale; the paper uses 5 to 15.
        documents: of a flattened batch, B = 1.
        attention_mask: (B, T) of a padded batch with one document per sequence.
        position_ids: (B, T) of a padded batch with several documents per sequence; they restart from 0 at each.
    """
    if documents is not None:
        lengths = documents.cu_seqlens.diff()  # on the device already
        each = torch.repeat_interleave(lengths, lengths, output_size=input_ids.shape[1])[None]  # (1, T)
    elif attention_mask is not None:
        each = attention_mask.sum(-1, keepdim=True)  # (B, 1)
    elif position_ids is not None:
        each = _lengths_by_position(position_ids)  # (B, T)
    else:
        each = torch.full((len(input_ids), 1), input_ids.shape[1], device=input_ids.device)
    return (alpha / (each.float() * width).sqrt())[..., None]


def _lengths_by_position(position_ids: torch.Tensor) -> torch.Tensor:
    """Returns for each token the length of its document, (B, T); padding counts as documents of its own."""
    document = (position_ids == 0).flatten().cumsum(0) - 1  # (B · T,), counted from 0
    lengths = torch.zeros_like(document).index_add_(0, document, torch.ones_like(document))
    return lengths[document].view_as(position_ids)


class Neftune:
    """Adds noise to a model's input embeddings inside `training_pass`, and nowhere else.

    The noise depends on the seed, rank, step and micro-batch only, not on the global random state: a resumed run has
    the noise of an uninterrupted one, and each rank has its own.

    Args:
        model: wrapped with an adapter or not; the hook goes on the embeddings that it has now.
        alpha: see `noise_scale`.
        seed: of the run.
        rank: of this process among those that train on different data.
    """

    def __init__(self, model: Any, alpha: float, seed: int, rank: int = 0) -> None:
        self._alpha, self._seed, self._rank = alpha, seed, rank
        embeddings = model.get_input_embeddings()
        self._weight: torch.Tensor = embeddings.weight
        self._noise: torch.Tensor | None = None
        self._generator = torch.Generator(self._weight.device)
        embeddings.register_forward_hook(self._add)

    @contextmanager
    def training_pass(self, inputs: Mapping[str, Any], step: int, number: int) -> Iterator[None]:
        """Adds noise to the forward pass inside.

        The noise is drawn in advance: a compiled model then contains one addition and no generator.

        Args:
            inputs: the micro-batch from the collator.
            step: optimizer steps made before it.
            number: of the micro-batch in its step, counted from 0.
        """
        width = self._weight.shape[1]
        layout = {name: inputs.get(name) for name in ("documents", "attention_mask", "position_ids")}
        scale = noise_scale(inputs["input_ids"], width, self._alpha, **layout)
        seeds = np.random.SeedSequence([self._seed, self._rank, step, number]).generate_state(2)
        self._generator.manual_seed(int(seeds[0]) << 31 | int(seeds[1]) >> 1)
        shape = (*inputs["input_ids"].shape, width)
        noise = torch.empty(shape, dtype=self._weight.dtype, device=scale.device)
        self._noise = noise.uniform_(-1, 1, generator=self._generator).mul_(scale.to(noise.dtype))
        try:
            yield
        finally:
            self._noise = None

    def _add(self, module: torch.nn.Module, args: Any, output: torch.Tensor) -> torch.Tensor:
        return output if self._noise is None else output + self._noise.to(output.dtype)
