"""Whether documents that share a row are kept apart by this model as it is loaded: measured, not assumed.

Attention kernels, positions that are no rotary ones (ALiBi, learned offsets) and recurrent layers each have their own
way to let a document see the one before it, and none of them raises an error.
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
    """How much a document's logits differ from what they should be, relative to the largest of them.

    Attributes:
        from_neighbour: by what they change with the document in front.
        from_alone: by what they differ from those of the document alone in its row.
    """

    from_neighbour: float
    from_alone: float

    def exceeds(self, precise: bool) -> bool:
        """Whether it is more than rounding: that of float32 (1e-6), or of bf16 (a row alone takes other kernels)."""
        return self.from_neighbour > (1e-4 if precise else 1e-2) or self.from_alone > (1e-4 if precise else 5e-2)


def require_isolation(model: Any, collator: Collator) -> None:
    """Puts the same document behind two different ones and alone, and compares its logits.

    Raises:
        UserError: they differ, so that training would be on documents that see each other; or the model does not take
            boundaries at all.
    """
    kind, attention = model.config.model_type, model.config._attn_implementation
    hint = "set attn_implementation: sdpa" if collator.flatten else "set packing: false"
    key = "attn_implementation" if collator.flatten else "packing"
    try:
        leak = measure_leak(model, collator)
    except (DocumentsLost, TypeError, ValueError) as error:
        if not collator.flatten:
            raise
        message = f"this {kind} model cannot keep the documents of a row apart ({attention} attention): {error}"
        raise UserError(Problem(message, hint, key)) from error
    if leak.exceeds(_is_precise(model)):
        raise UserError(
            Problem(
                f"documents packed in one row see each other in this {kind} model ({attention} attention): the logits "
                f"of the second change by {leak.from_neighbour:.2g} of their size with the first, and differ by "
                f"{leak.from_alone:.2g} from those of the document alone",
                hint,
                key,
            )
        )


@torch.no_grad()
def measure_leak(model: Any, collator: Collator) -> Leak:
    """The largest differences over the logits of the second of three documents in a row of the collator's."""
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
    """Logits of the second document in the first of two rows, as they are made in training: (tokens, V)."""
    ids = np.concatenate(documents)
    row = {"input_ids": ids, "labels": ids, PACKED: np.array(_LENGTHS)}
    batch = collator([row, row])
    inputs = {name: batch[name].to(model.device) for name in ("input_ids", "position_ids")}
    if "documents" in batch:
        inputs |= attention_inputs(model.config, batch["documents"].to(model.device))
    logits = model(**inputs, use_cache=False).logits[0]
    return logits[_LENGTHS[0] : _LENGTHS[0] + _LENGTHS[1]].float()


def _is_precise(model: Any) -> bool:
    """Whether the model computes in float32, TF32 not counted."""
    weight = model.get_input_embeddings().weight
    # Not `allow_tf32`, which raises an error once `torch.backends.fp32_precision` was set (as `tf32: true` does).
    uses_tf32 = weight.device.type == "cuda" and torch.backends.cuda.matmul.fp32_precision == "tf32"
    return weight.dtype == torch.float32 and not uses_tf32
