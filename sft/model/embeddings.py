"""The two ends of a model, input embedding and output head: tied or not, and how they grow with a vocabulary."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel

logger = logging.getLogger("sft")


def embedding_rows(model: PreTrainedModel) -> int:
    """Rows of the input embedding: at least one for each token, often more."""
    embedding: Any = model.get_input_embeddings()
    return int(embedding.weight.shape[0])


def is_tied(model: PreTrainedModel) -> bool:
    """Whether the input embedding and the output head are one matrix."""
    head: Any = model.get_output_embeddings()
    embedding: Any = model.get_input_embeddings()
    return head is not None and head.weight is embedding.weight


def resize_embeddings(model: PreTrainedModel, rows: int) -> int:
    """Grow the embeddings to `rows`, never shrink them; returns how many rows were added.

    New rows are the mean of the old ones, so that the new tokens change no probability until they are trained (Hewitt,
    "Initializing New Word Embeddings for Pretrained Language Models", 2021), and so that a base which is loaded again
    gets the same rows.
    """
    import torch

    before = embedding_rows(model)
    if rows <= before:
        return 0
    model.resize_token_embeddings(rows, mean_resizing=False)
    embedding: Any = model.get_input_embeddings()
    matrices = [embedding.weight]
    head: Any = model.get_output_embeddings()
    if head is not None and head.weight is not matrices[0]:
        matrices.append(head.weight)
        if getattr(head, "bias", None) is not None:
            matrices.append(head.bias)
    with torch.no_grad():
        for matrix in matrices:
            matrix[before:] = matrix[:before].float().mean(dim=0).to(matrix.dtype)
    return rows - before


def untie_adapted_ends(adapted: PeftModel) -> None:
    """Give the head a matrix of its own where LoRA adapts one end of tied embeddings.

    Folding a change into the shared matrix would change the other end too. To be called before an adapter is merged.
    """
    import torch
    from peft.tuners.lora import LoraLayer

    base: Any = adapted.get_base_model()
    kind: Any = LoraLayer
    embedding, head = base.get_input_embeddings(), base.get_output_embeddings()
    if head is None or not (isinstance(embedding, kind) or isinstance(head, kind)):
        return
    if head.weight is not embedding.weight:
        return
    plain = head.get_base_layer() if isinstance(head, kind) else head
    plain.weight = torch.nn.Parameter(plain.weight.detach().clone(), requires_grad=False)
    base.config.get_text_config().tie_word_embeddings = False
    base.config.tie_word_embeddings = False
    logger.info("The adapter changes one end of tied embeddings: the merged model has two matrices")
