"""The input embedding and the output head of a model: whether they share a matrix, and how they grow."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel

logger = logging.getLogger("sft")


def embedding_rows(model: PreTrainedModel) -> int:
    """Returns the rows of the input embedding: at least one per token, often more."""
    embedding: Any = model.get_input_embeddings()
    return int(embedding.weight.shape[0])


def is_tied(model: PreTrainedModel) -> bool:
    """Returns whether the input embedding and the output head share one matrix."""
    head: Any = model.get_output_embeddings()
    embedding: Any = model.get_input_embeddings()
    return head is not None and getattr(head, "weight", None) is embedding.weight


def resize_embeddings(model: PreTrainedModel, rows: int) -> int:
    """Grows the embeddings to `rows`, never shrinks them, and returns how many rows were added.

    New rows are the mean of the old ones: new tokens then hardly change any probability before they are trained
    (Hewitt, "Initializing New Word Embeddings for Pretrained Language Models", 2021), and a base that is loaded again
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
    if head is not None and not is_tied(model):
        matrices.append(head.weight)
        if getattr(head, "bias", None) is not None:
            matrices.append(head.bias)
    with torch.no_grad():
        for matrix in matrices:
            matrix[before:] = matrix[:before].float().mean(dim=0).to(matrix.dtype)
    return rows - before


def untie_adapted_embeddings(adapted: PeftModel) -> None:
    """Gives the head a matrix of its own where LoRA adapts the input embedding or the head and the two are tied.

    Merging an adapter into the shared matrix would change the other one too. Call this before the adapter is merged.
    """
    import torch
    from peft.tuners.lora import LoraLayer

    base: Any = adapted.get_base_model()
    kind: Any = LoraLayer
    head = base.get_output_embeddings()
    is_adapted = isinstance(head, kind) or isinstance(base.get_input_embeddings(), kind)
    if not (is_adapted and is_tied(base)):
        return
    plain = head.get_base_layer() if isinstance(head, kind) else head
    plain.weight = torch.nn.Parameter(plain.weight.detach().clone(), requires_grad=False)
    base.config.get_text_config().tie_word_embeddings = False
    base.config.tie_word_embeddings = False
    logger.info("The adapter changes one of two tied embeddings: the merged model has two matrices")
