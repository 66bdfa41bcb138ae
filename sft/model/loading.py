"""Loads a causal language model without an adapter: pretrained, randomly initialized, or as a meta model.

The attention implementation is chosen here, and logged.
"""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any

from sft.distributed.device import device_facts, training_device
from sft.errors import Problem, UserError, first_line
from sft.model.attention.selection import choose_attention
from sft.model.from_scratch import build_config
from sft.model.paths import LOAD_ERRORS, load_failure, require_model, require_weights, resolve_reference
from sft.model.precision import Precision
from sft.model.quantization import bits_and_bytes_config

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerFast

    from sft.config.schema import ModelKeys, QuantizationKeys

logger = logging.getLogger("sft")


def read_config(keys: ModelKeys) -> tuple[str, PreTrainedConfig]:
    """Returns the folder or hub name of the model, and its config.

    Raises:
        UserError: there is no such model, or it is unreadable, of an unknown type, or not a causal language model.
    """
    from transformers import AutoConfig

    key = "model_name_or_path"
    reference = resolve_reference(keys.model_name_or_path or "", key)
    require_model(reference, key)
    try:
        config: Any = AutoConfig.from_pretrained(
            reference, revision=keys.model_revision or "main", trust_remote_code=keys.trust_remote_code
        )
    except LOAD_ERRORS as error:
        if "trust_remote_code" in str(error):
            message = f"{reference!r} comes with Python code of its own"
            hint = "Read that code; to run it here set `trust_remote_code: true`."
            raise UserError(Problem(message, hint, key="trust_remote_code")) from error
        raise load_failure(reference, error, key, "model") from error
    hint = "Use a decoder, such as a Llama, Qwen, Mistral or GPT model."
    if model_class(config) is None and "AutoModelForCausalLM" not in (getattr(config, "auto_map", None) or {}):
        message = f"{reference!r} is a {config.model_type} model, which is not a causal language model"
        raise UserError(Problem(message, hint, key=key))
    if getattr(config, "is_decoder", None) is False and hasattr(config, "add_cross_attention"):
        message = f"{reference!r} is an encoder ({config.model_type}): each token sees the tokens after it"
        raise UserError(Problem(message, hint, key=key))
    return reference, config


def model_class(config: Any) -> type | None:
    """Returns the class that AutoModelForCausalLM makes for `config`, None if transformers has none."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

    mapping: Any = MODEL_FOR_CAUSAL_LM_MAPPING
    return mapping.get(type(config), None)  # type: ignore[no-any-return]


def _choose_attention(keys: ModelKeys, config: PreTrainedConfig, precision: Precision) -> str:
    from sft.model.attention import document_attention

    document_attention.register()
    half, device = precision.dtype != "float32", device_facts()
    name, reason = choose_attention(keys.attn_implementation, config, model_class(config), half, device)
    logger.info("Attention: %s%s", name, f" over padded rows: {reason}" if reason else "")
    return name


def load_pretrained(keys: ModelKeys, precision: Precision, quantization: QuantizationKeys | None) -> PreTrainedModel:
    """Loads the pretrained weights, and checks that none is missing.

    Raises:
        UserError: the weights cannot be read or are incomplete, or the attention implementation does not run here.
    """
    from transformers import AutoModelForCausalLM

    loader: Any = AutoModelForCausalLM
    reference, config = read_config(keys)
    require_weights(reference, "model_name_or_path")
    attention = _choose_attention(keys, config, precision)
    kwargs: dict[str, Any] = {}
    if quantization is not None:
        kwargs["quantization_config"] = bits_and_bytes_config(quantization, precision)
        kwargs["device_map"] = {"": training_device()}
    try:
        model, loading = loader.from_pretrained(
            reference,
            config=config,
            dtype=precision.torch_dtype(),
            attn_implementation=attention,
            revision=keys.model_revision or "main",
            trust_remote_code=keys.trust_remote_code,
            output_loading_info=True,
            **kwargs,
        )
    except LOAD_ERRORS as error:
        if "attention" in str(error).lower() or "attn" in str(error).lower():
            message = f"{attention!r} does not run here: {first_line(error)}"
            raise UserError(Problem(message, "Use auto.", key="attn_implementation")) from error
        raise load_failure(reference, error, "model_name_or_path", "weights") from error
    _check_loaded(loading, reference)
    return model  # type: ignore[no-any-return]


def _check_loaded(loading: dict[str, Any], reference: str) -> None:
    """Checks that the files held every tensor of the model, and warns of tensors that it does not use."""
    missing = sorted(loading["missing_keys"])
    if missing:
        message = (
            f"the weights in {reference!r} lack {len(missing)} of the model's tensors, which would be initialized "
            f"randomly: {', '.join(missing[:4])}{', ...' if len(missing) > 4 else ''}"
        )
        raise UserError(Problem(message, "Is it a whole causal language model?", key="model_name_or_path"))
    if unused := sorted(loading["unexpected_keys"]):
        logger.warning("%d tensors of %s are not used: %s", len(unused), reference, ", ".join(unused[:4]))


def init_random(keys: ModelKeys, tokenizer: PreTrainedTokenizerFast, precision: Precision) -> PreTrainedModel:
    """Initializes the weights randomly, from torch's generator as the caller seeded it."""
    from transformers import AutoModelForCausalLM

    config = build_config(keys.from_scratch or "", tokenizer)
    if model_class(config) is None:
        raise UserError(Problem(f"{config.model_type} is not a causal language model", key="from_scratch.model_type"))
    attention = _choose_attention(keys, config, precision)
    try:
        model: PreTrainedModel = AutoModelForCausalLM.from_config(
            config, dtype=precision.torch_dtype(), attn_implementation=attention
        )
    except (ValueError, RuntimeError, ImportError) as error:
        raise UserError(Problem(f"no model can be built from these settings: {error}", key="from_scratch")) from error
    logger.info("Random weights: %s from scratch", config.model_type)
    return model


def load_meta(keys: ModelKeys, precision: Precision) -> PreTrainedModel:
    """Builds the named model without reading its weights; call it under `torch.device("meta")`."""
    from transformers import AutoModelForCausalLM

    _, config = read_config(keys)
    attention = _choose_attention(keys, config, precision)
    options: dict[str, Any] = {"dtype": precision.torch_dtype(), "trust_remote_code": keys.trust_remote_code}
    model: PreTrainedModel = AutoModelForCausalLM.from_config(config, attn_implementation=attention, **options)
    return model
