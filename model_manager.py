"""The model stage: loads the tokenizer and the model, quantizes and adapts it, saves and merges what was trained.

    tokenizer = load_tokenizer(keys)
    precision = plan_precision(keys, lora, quantization, bf16=..., fp16=...)
    model = load_model(keys, tokenizer, precision=precision, lora=lora, quantization=quantization)
    save_final_model(model, tokenizer, output_dir, end_token_ids)
    model, tokenizer = load_trained(output_dir)

Dtype, attention, pad token, grown embeddings and parameter counts are logged.
"""

from __future__ import annotations

import logging
from contextlib import nullcontext
from typing import TYPE_CHECKING, Any

from sft.config.section import located
from sft.distributed.device import device_facts, training_device
from sft.errors import Problem, UserError
from sft.model.attention.selection import choose_attention
from sft.model.embeddings import embedding_rows, resize_embeddings
from sft.model.from_scratch import build_config, check_settings
from sft.model.loading import init_random, load_meta, load_pretrained, model_class, read_config
from sft.model.lora import attach_adapter, count_parameters
from sft.model.merging import merge
from sft.model.paths import require_weights
from sft.model.precision import Precision, choose_precision, keep_precision
from sft.model.quantization import (
    import_bitsandbytes,
    prepare_quantized,
    quantized_layers,
    require_adapter_if_quantized,
    require_trainable_quantization,
)
from sft.model.saving import save_final_model
from sft.model.tokenizer import configure_tokenizer, load_tokenizer, read_tokenizer
from sft.model.trained_models import load_trained

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel, PreTrainedTokenizerFast

    from sft.config.schema import ActivationKeys, LoraKeys, ModelKeys, QuantizationKeys

__all__ = [
    "check_model",
    "configure_tokenizer",
    "load_model",
    "load_tokenizer",
    "load_trained",
    "merge",
    "obstacle_to_packing",
    "plan_precision",
    "router_aux_loss_coef",
    "save_final_model",
]
logger = logging.getLogger("sft")


def plan_precision(
    keys: ModelKeys,
    lora: LoraKeys | None,
    quantization: QuantizationKeys | None,
    *,
    bf16: bool | None = None,
    fp16: bool | None = None,
    kept: str | None = None,
) -> Precision:
    """Chooses the dtypes of this run on this machine; the Trainer gets `precision.bf16` and `precision.fp16`.

    Args:
        bf16, fp16: as the user set them, None if not set.
        kept: the dtype of the weights in the checkpoint that the run resumes from; `dtype: auto` keeps it.

    Raises:
        UserError: the settings exclude each other, or the device does not support them.
    """
    with located(keys):
        trains_everything = lora is None and quantization is None
        facts = device_facts(measured=keys.dtype == "auto")
        precision = choose_precision(keys.dtype, trains_everything, bf16, fp16, facts)
        if kept and (keys.dtype, bf16, fp16) == ("auto", None, None):
            precision = keep_precision(precision, kept, trains_everything, facts)
    logger.info("Precision: %s", precision.reason)
    if trains_everything and precision.dtype != "float32" and not precision.master_weights:
        logger.warning(
            "All weights are trained in %s: updates smaller than its rounding are lost; `dtype: float32` keeps them",
            precision.dtype,
        )
    return precision


def check_model(keys: ModelKeys, lora: LoraKeys | None = None) -> None:
    """Checks the model without reading its weights.

    Raises:
        UserError: there is no model of that name, it is not a causal language model, it has no weights, or quantized
            ones and no adapter to train.
    """
    with located(keys):
        if keys.from_scratch is not None:
            check_settings(keys.from_scratch)
        elif keys.model_name_or_path:
            reference, config = read_config(keys)
            require_adapter_if_quantized(config, lora)
            require_weights(reference, "model_name_or_path")


def obstacle_to_packing(keys: ModelKeys, tokenizer: PreTrainedTokenizerFast) -> str | None:
    """Returns why samples should not be packed for the named model; None if its attention isolates them at no cost.

    Raises:
        UserError: there is no such model.
    """
    with located(keys):
        from_scratch = keys.from_scratch
        config = read_config(keys)[1] if from_scratch is None else build_config(from_scratch, tokenizer)
    name, reason = choose_attention(keys.attn_implementation, config, model_class(config), True, device_facts())
    if reason or "flash" in name or name == "sft_documents":
        return reason
    return f"{name} attention would compute all pairs of tokens in a row"


def router_aux_loss_coef(model: PreTrainedModel | PeftModel, asked: float | None) -> float:
    """Returns the weight of the load balancing loss: `asked`, or the model's own if its config uses that loss.

    Raises:
        UserError: it is asked for and the model has no router.
    """
    from sft.loss.load_balancing import router_coefficient

    if asked is None:
        return router_coefficient(model.config)
    config: Any = model.config.get_text_config()
    if asked and getattr(config, "router_aux_loss_coef", None) is None:
        message = f"{config.model_type} is not a mixture of experts: there is no router to balance"
        raise UserError(Problem(message, "Remove it.", key="router_aux_loss_coef"))
    return asked


def load_model(
    keys: ModelKeys,
    tokenizer: PreTrainedTokenizerFast,
    *,
    precision: Precision,
    lora: LoraKeys | None = None,
    quantization: QuantizationKeys | None = None,
    gradient_checkpointing: bool = False,
    activation_checkpoint: ActivationKeys | None = None,
    meta: bool = False,
) -> PreTrainedModel | PeftModel:
    """Loads any causal language model, quantized, frozen and adapted as the config says.

    Args:
        tokenizer: from `load_tokenizer`; the embeddings grow to hold all its tokens.
        precision: from `plan_precision`.
        gradient_checkpointing: recompute activations in the backward pass. Never reentrant: that needs a gradient at
            the frozen embeddings, and hides a graph that does not reach the adapters.
        activation_checkpoint: the same with a choice of what is recomputed, and where the rest is kept.
        meta: build the same model on the meta device, in a second: no weight is read; quantized layers compute nothing.

    Raises:
        UserError: the model cannot be loaded, is not a causal language model, or a setting does not fit it.
    """
    import torch

    with located(keys):
        if lora is not None or quantization is not None:
            import_bitsandbytes()
        with torch.device("meta") if meta else nullcontext():
            if keys.from_scratch is not None:
                model = init_random(keys, tokenizer, precision)
            else:
                model = load_meta(keys, precision) if meta else load_pretrained(keys, precision, quantization)
            rows_before = embedding_rows(model)
            if added := resize_embeddings(model, len(tokenizer)):
                logger.info("Embeddings grown by %d rows to %d, one for each token", added, rows_before + added)
            _prepare_quantization(model, quantization, meta)
            model.config.use_cache = False
            if gradient_checkpointing:
                model.activation_checkpointing_enable(activation_checkpointing_kwargs={"use_reentrant": False})
            if activation_checkpoint is not None:
                _checkpoint_activations(model, activation_checkpoint)
            trained: PreTrainedModel | PeftModel = model
            if lora is not None:
                trained = _attach_adapter(model, lora, _untrained_tokens(keys, tokenizer, rows_before))
        counts = count_parameters(trained)
        logger.info("Parameters: %s", counts)
        require_trainable_quantization(trained)
        if not counts.trainable:
            raise UserError(Problem("no weight of the model is trained", key="lora_config"))
    return trained


def _prepare_quantization(model: PreTrainedModel, keys: QuantizationKeys | None, meta: bool) -> None:
    """Freezes and counts the layers that are quantized, by the config or in the model's files."""
    from sft.model.meta_quantization import fake_quantize

    if keys is not None:
        bits = 4 if keys.load_in_4bit else 8
        if meta:
            skipped = tuple(keys.llm_int8_skip_modules or ())
            layers = fake_quantize(model.requires_grad_(False), bits, keys.bnb_4bit_use_double_quant, skipped)
        else:
            layers = prepare_quantized(model)
        logger.info("Quantized to %d bits: %d linear layers", bits, layers)
    elif quantized_layers(model):
        logger.info("Quantized in its files: %d linear layers", prepare_quantized(model))


def _checkpoint_activations(model: PreTrainedModel, keys: ActivationKeys) -> None:
    from sft.model.activation_checkpointing import checkpoint_activations

    # The Trainer moves the model to the training device later; a meta model stays where it is.
    checkpoint_activations(model, keys.mode, offload=keys.offload, device=training_device())


def _untrained_tokens(keys: ModelKeys, tokenizer: PreTrainedTokenizerFast, rows_before: int) -> list[int]:
    """Returns the ids whose embedding rows have never been trained: of added tokens, and beyond the model's rows.

    An added token needs no new row if the model has spare ones (Qwen has hundreds), and its row is untrained all the
    same. The pad token is never predicted nor attended to: its row does not matter.
    """
    first_new = min(rows_before, len(read_tokenizer(keys))) if keys.special_tokens else rows_before
    return [token for token in range(first_new, len(tokenizer)) if token != tokenizer.pad_token_id]


def _attach_adapter(model: PreTrainedModel, lora: LoraKeys, new_ids: list[int]) -> PeftModel:
    """Attaches the adapter, and logs whether it trains the embedding rows of new tokens."""
    adapted, rows = attach_adapter(model, lora, new_ids)
    if rows:
        where = " and ".join(rows)
        logger.info("The adapter also trains the rows of %d new tokens in %s", len(new_ids), where)
    elif new_ids:
        logger.info("The rows of %d new tokens are trained as far as lora_config trains the embeddings", len(new_ids))
    return adapted
