"""Measures whether documents that share a row are isolated from each other in the model as it is loaded.

Attention kernels, positions other than rotary ones (ALiBi, learned offsets) and recurrent layers can each let a
document see the one before it, without any error.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import torch

from sft.data.loading.collator import PACKED, Collator
from sft.errors import Problem, UserError
from sft.model.attention.document_attention import DocumentsLost, attention_inputs

_LENGTHS = (7, 9, 5)


class Leak(NamedTuple):
    """The largest differences of a document's logits, relative to the largest logit.

    Attributes:
        from_neighbour: between rows with two different documents before it.
        from_alone: between a packed row and the document alone in its row.
    """

    from_neighbour: float
    from_alone: float

    def exceeds(self, precise: bool) -> bool:
        """Returns whether it is more than rounding in float32 (1e-6), or in bf16 (a row alone uses other kernels)."""
        return self.from_neighbour > (1e-4 if precise else 1e-2) or self.from_alone > (1e-4 if precise else 5e-2)


def require_isolation(model: Any, collator: Collator) -> None:
    """Computes the logits of a document after two different ones and alone, and compares them.

    Raises:
        UserError: they differ, so documents would see each other in training; or the model takes no document offsets.
    """
    kind, attention = model.config.model_type, model.config._attn_implementation
    key, value = ("attn_implementation", "sdpa") if collator.flatten else ("packing", "false")
    hint = f"set {key}: {value}"
    try:
        leak = measure_leak(model, collator)
    except (DocumentsLost, TypeError, ValueError) as error:
        if not collator.flatten:
            raise
        message = f"this {kind} model cannot isolate the documents of a row ({attention} attention): {error}"
        raise UserError(Problem(message, hint, key)) from error
    if leak.exceeds(computes_in_float32(model)):
        message = (
            f"documents packed in one row see each other in this {kind} model ({attention} attention): the logits of "
            f"the second change by {leak.from_neighbour:.2g} of their size with the first, and differ by "
            f"{leak.from_alone:.2g} from those of the document alone"
        )
        raise UserError(Problem(message, hint, key))


@torch.no_grad()
def measure_leak(model: Any, collator: Collator) -> Leak:
    """Measures the second of three documents in a row of the collator's."""
    vocab_size = model.get_input_embeddings().weight.shape[0]
    rng = np.random.default_rng(0)
    front, second, last = (rng.integers(0, vocab_size, n) for n in _LENGTHS)
    was_training = model.training
    model.eval()
    try:
        seen, changed = (
            _logits_of_second(model, collator, (first, second, last)) for first in (front, (front + 1) % vocab_size)
        )
        alone = model(torch.from_numpy(second[None]).to(model.device), use_cache=False).logits[0].float()
    finally:
        model.train(was_training)
    size = float(alone.abs().max())
    return Leak(float((seen - changed).abs().max()) / size, float((seen - alone).abs().max()) / size)


def _logits_of_second(model: Any, collator: Collator, documents: tuple[np.ndarray, ...]) -> torch.Tensor:
    """Returns (tokens, V) logits of the second document in the first of two rows, computed as in training."""
    ids = np.concatenate(documents)
    row = {"input_ids": ids, "labels": ids, PACKED: np.array(_LENGTHS)}
    batch = collator([row, row])
    inputs = {name: batch[name].to(model.device) for name in ("input_ids", "position_ids")}
    if "documents" in batch:
        inputs |= attention_inputs(model.config, batch["documents"].to(model.device))
    logits = model(**inputs, use_cache=False).logits[0]
    return logits[_LENGTHS[0] : _LENGTHS[0] + _LENGTHS[1]].float()


def computes_in_float32(model: Any) -> bool:
    """Returns whether the model computes in float32 proper, not in TF32."""
    weight = model.get_input_embeddings().weight
    # Not `allow_tf32`: it raises an error after `torch.backends.fp32_precision` was set (as `tf32: true` does).
    uses_tf32 = weight.device.type == "cuda" and torch.backends.cuda.matmul.fp32_precision == "tf32"
    return weight.dtype == torch.float32 and not uses_tf32
