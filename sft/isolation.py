"""Whether documents packed into one row are kept apart by this model as it is loaded: measured, not assumed.

Attention kernels, positions that are no rotary ones (ALiBi, learned offsets) and recurrent layers each have their own
way to let a document see the one before it, and none of them raises an error.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from sft.collation import PACKED, Collator
from sft.errors import Problem, UserError

_TOLERANCE = 1e-3  # of the logits' size; rounding in bf16 stays below, a leak is far above


def require_isolation(model: Any, collator: Collator) -> None:
    """Packs the same document behind two different ones and compares its logits.

    Raises:
        UserError: they differ, so that packing would train on documents that see each other.
    """
    leak = measure_leak(model, collator)
    if leak > _TOLERANCE:
        kind, attention = model.config.model_type, model.config._attn_implementation
        raise UserError(
            Problem(
                f"documents packed in one row see each other in this {kind} model ({attention} attention): the logits "
                f"of the second change by {leak:.2g} of their size with the first",
                "set packing: false",
                "packing",
            )
        )


@torch.no_grad()
def measure_leak(model: Any, collator: Collator) -> float:
    """The largest change of a document's logits when the document in front of it changes, relative to their size."""
    vocab_size = model.get_input_embeddings().weight.shape[0]
    rng = np.random.default_rng(0)
    first, other, second = (rng.integers(0, vocab_size, n) for n in (7, 7, 9))
    was_training = model.training
    model.eval()
    try:
        seen = [_logits_of_second(model, collator, front, second) for front in (first, other)]
    finally:
        model.train(was_training)
    return float((seen[0] - seen[1]).abs().max() / seen[0].abs().max())


def _logits_of_second(model: Any, collator: Collator, front: np.ndarray, second: np.ndarray) -> torch.Tensor:
    """Logits of `second` behind `front`, in the first of two packed rows: (len(second), V)."""
    ids = np.concatenate([front, second])
    row = {"input_ids": ids, "labels": ids, PACKED: np.array([len(front), len(second)])}
    batch = collator([row, row])
    inputs = {name: batch[name].to(model.device) for name in ("input_ids", "position_ids")}
    logits = model(**inputs, use_cache=False).logits[0]
    return logits[len(front) : len(ids)].float()
