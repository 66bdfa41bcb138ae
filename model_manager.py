"""The model stage: a tokenizer that can chat and pad, and a model that trains what the config names and nothing else.

    tokenizer = load_tokenizer(keys)
    precision = plan_precision(keys, lora, quantization, bf16=..., fp16=...)
    model = load_model(keys, tokenizer, precision=precision, lora=lora, quantization=quantization)
    save_final_model(model, tokenizer, output_dir, end_token_ids)
    model, tokenizer = load_trained(output_dir)

The number format, the attention kernel, the pad token, grown embeddings and the parameter counts are said aloud.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Any

from sft.config.section import located
from sft.distributed.device import device_facts, training_device
from sft.errors import Problem, UserError
from sft.model.attention.selection import choose_attention
from sft.model.embeddings import embedding_rows, resize_embeddings
from sft.model.from_scratch import build_config, check_settings
from sft.model.loading import init_random, load_meta, model_class, pretrained, read_config
from sft.model.lora import attach_adapter, count_parameters
from sft.model.merging import merge
from sft.model.paths import require_weights, resolve_reference
from sft.model.precision import Precision, choose_precision, keep_precision
from sft.model.quantization import (
    import_bitsandbytes,
    quantized_layers,
    require_trained_weights,
    require_trainer_takes,
    settle,
)
from sft.model.saving import save_companions, save_final_model
from sft.model.tokenizer import configure_tokenizer, load_tokenizer, read_tokenizer
from sft.model.trained import load_trained

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
    "save_companions",
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
    """The number formats of this run on this machine; the Trainer is to get `precision.bf16` and `precision.fp16`.

    Args:
        bf16, fp16: as the user set them, None where not.
        kept: the format of the weights in the checkpoint that the run goes on from; `dtype: auto` stays with it.

    Raises:
        UserError: the settings exclude each other, or the device cannot do it.
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
    """What can be told of the model without reading its weights.

    Raises:
        UserError: there is no model of that name, it is no causal language model, it has no weights, or quantized ones
            and no adapter to train.
    """
    with located(keys):
        if keys.from_scratch is not None:
            check_settings(keys.from_scratch)
        elif keys.model_name_or_path:
            reference = resolve_reference(keys.model_name_or_path, "model_name_or_path")
            require_trained_weights(read_config(reference, keys), lora)
            require_weights(reference, "model_name_or_path")


def obstacle_to_packing(keys: ModelKeys, tokenizer: PreTrainedTokenizerFast) -> str | None:
    """Why samples of the model that is named should not share a row; None: its attention keeps them apart at no cost.

    Raises:
        UserError: there is no such model.
    """
    with located(keys):
        if keys.from_scratch is not None:
            config: Any = build_config(keys.from_scratch, tokenizer)
        else:
            config = read_config(resolve_reference(keys.model_name_or_path or "", "model_name_or_path"), keys)
    name, reason = choose_attention(keys.attn_implementation, config, model_class(config), True, device_facts())
    if reason or "flash" in name or name == "sft_documents":
        return reason
    return f"{name} attention would compute all pairs of tokens in a row"


def router_aux_loss_coef(model: PreTrainedModel | PeftModel, asked: float | None) -> float:
    """The weight of the loss that balances a mixture of experts: `asked`, or the model's own where its config uses it.

    Raises:
        UserError: it is asked for and the model has no router.
    """
    from sft.loss.load_balancing import router_coefficient

    if asked is None:
        return router_coefficient(model.config)
    config: Any = model.config.get_text_config()
    if asked and getattr(config, "router_aux_loss_coef", None) is None:
        message = f"{config.model_type} is no mixture of experts: there is no router to balance"
        raise UserError(Problem(message, "Remove it.", key="router_aux_loss_coef"))
    return asked


def _untrained_tokens(keys: ModelKeys, tokenizer: PreTrainedTokenizerFast, rows_before: int) -> list[int]:
    """Ids whose embedding rows have never been trained: of tokens the user added, and beyond the model's rows.

    A model with spare rows (Qwen has hundreds) needs no new ones for an added token, whose row is untrained all the
    same. The pad token is never predicted nor attended to, so that its row does not matter.
    """
    first_new = rows_before
    if keys.special_tokens:
        first_new = min(first_new, len(read_tokenizer(keys)))
    return [token for token in range(first_new, len(tokenizer)) if token != tokenizer.pad_token_id]


def _attach(model: PreTrainedModel, lora: LoraKeys, new_ids: Sequence[int]) -> PeftModel:
    adapted, rows = attach_adapter(model, lora, new_ids)
    if rows:
        where = " and ".join(rows)
        logger.info("The adapter also trains the rows of %d new tokens in %s", len(new_ids), where)
    elif new_ids:
        logger.info("The rows of %d new tokens are trained as far as lora_config trains the embeddings", len(new_ids))
    return adapted


def _base(
    keys: ModelKeys,
    tokenizer: PreTrainedTokenizerFast,
    precision: Precision,
    quantization: QuantizationKeys | None,
    outline: bool,
) -> tuple[PreTrainedModel, int]:
    """The model without an adapter, with a row of its embeddings for each token, and how many rows it had before."""
    with _device(outline):
        if keys.from_scratch is not None:
            model = init_random(keys, tokenizer, precision)
        elif outline:
            model = load_meta(keys, precision)
        else:
            model = pretrained(keys, precision, quantization)
        rows_before = embedding_rows(model)
        grown = resize_embeddings(model, len(tokenizer))
    if grown:
        logger.info("Embeddings grown by %d rows to %d, one for each token", grown, rows_before + grown)
    if quantization is not None:
        bits = 4 if quantization.load_in_4bit else 8
        layers = _as_if_quantized(model, quantization, bits) if outline else settle(model)
        logger.info("Quantized to %d bits: %d linear layers", bits, layers)
    elif quantized_layers(model):
        logger.info("Quantized in its files: %d linear layers", settle(model))
    model.config.use_cache = False
    return model, rows_before


def _device(outline: bool) -> AbstractContextManager[Any]:
    import torch

    return torch.device("meta") if outline else nullcontext()


def _as_if_quantized(model: PreTrainedModel, keys: QuantizationKeys, bits: int) -> int:
    from sft.model.meta_quantization import fake_quantize

    skipped = tuple(keys.llm_int8_skip_modules or ())
    return fake_quantize(model.requires_grad_(False), bits, keys.bnb_4bit_use_double_quant, skipped)


def load_model(
    keys: ModelKeys,
    tokenizer: PreTrainedTokenizerFast,
    *,
    precision: Precision,
    lora: LoraKeys | None = None,
    quantization: QuantizationKeys | None = None,
    gradient_checkpointing: bool = False,
    activation_checkpoint: ActivationKeys | None = None,
    for_training: bool = True,
    outline: bool = False,
) -> PreTrainedModel | PeftModel:
    """Any causal language model, ready to train; quantized, frozen and adapted as the config says.

    Args:
        tokenizer: from `load_tokenizer`; the embeddings grow to hold all its tokens.
        precision: from `plan_precision`.
        gradient_checkpointing: recompute activations in the backward pass, without reentrance (which would need a
            gradient at the frozen embeddings, and hides a graph that never reaches the adapters).
        activation_checkpoint: the same with a choice of what is recomputed, and where the rest waits.
        for_training: false for evaluating the base as the config describes it.
        outline: the same model on the meta device, in a second: no weight is read; quantized layers compute nothing.

    Raises:
        UserError: the model cannot be had, is no causal language model, or a setting does not fit it.
    """
    with located(keys):
        if lora is not None or quantization is not None:
            import_bitsandbytes()
        model, rows_before = _base(keys, tokenizer, precision, quantization, outline)
        if gradient_checkpointing:
            model.activation_checkpointing_enable(activation_checkpointing_kwargs={"use_reentrant": False})
        if activation_checkpoint is not None:
            from sft.model.activation_checkpointing import checkpoint_activations

            checkpoint_activations(
                model,
                activation_checkpoint.mode,
                offload=activation_checkpoint.offload,
                device=training_device(),  # the Trainer moves the model there; an outline never goes
            )
        adapted: PreTrainedModel | PeftModel = model
        if lora is not None:
            with _device(outline):
                adapted = _attach(model, lora, _untrained_tokens(keys, tokenizer, rows_before))
        counts = count_parameters(adapted)
        logger.info("Parameters: %s", counts)
        if for_training:
            require_trainer_takes(adapted)
            if not counts.trainable:
                raise UserError(Problem("no weight of the model is trained", key="lora_config"))
    return adapted
