"""Loads a saved model or adapter with its tokenizer, ready to generate or to be evaluated."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sft.distributed.device import device_facts, training_device
from sft.errors import Problem, UserError
from sft.model.attention.selection import choose_attention
from sft.model.embeddings import resize_embeddings, untie_adapted_embeddings
from sft.model.lora import attach_saved_adapter, without_adapter
from sft.model.paths import (
    ADAPTER_CONFIG,
    LOAD_ERRORS,
    is_adapter,
    load_failure,
    require_model,
    require_trained,
    resolve_reference,
)
from sft.model.quantization import import_bitsandbytes, prepare_quantized
from sft.model.saving import BASE_FACTS

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel, PreTrainedTokenizerFast


def load_trained(
    model_dir: str | Path,
    *,
    merge_for_speed: bool = False,
    dtype: str = "auto",
    trust_remote_code: bool = False,
    attn_implementation: str | None = None,
) -> tuple[PreTrainedModel | PeftModel, PreTrainedTokenizerFast]:
    """Loads a whole model or an adapter on its base, in evaluation mode, on the GPU if there is one.

    Args:
        merge_for_speed: merge an adapter into the weights in memory: one matrix multiplication per layer instead of
            three. A quantized base keeps its adapter apart: merging would round the weights again.
        dtype: of the weights; `auto` is the dtype that they were trained or saved in.
        attn_implementation: as for training, if whole batches are evaluated; None is transformers' choice.

    Raises:
        UserError: the folder holds no model, or its base is gone.
    """
    from transformers import AutoModelForCausalLM

    folder = Path(model_dir).expanduser()
    require_trained(folder)
    tokenizer = load_saved_tokenizer(folder, trust_remote_code)
    model: Any
    if is_adapter(folder):
        reference, facts = find_base(folder)
        facts.setdefault("embedding_rows", len(tokenizer))
        model = attach_saved_adapter(load_base(reference, facts, dtype, trust_remote_code), str(folder))
        if merge_for_speed and not facts.get("quantization_config"):
            untie_adapted_embeddings(model)
            model = model.merge_and_unload()
        restore_generation_config(model, folder)
    else:
        try:
            model = AutoModelForCausalLM.from_pretrained(str(folder), dtype=dtype, trust_remote_code=trust_remote_code)
        except LOAD_ERRORS as error:
            raise load_failure(str(folder), error, "--model", "model") from error
    if not getattr(model, "is_quantized", False):
        model.to(training_device())
    if attn_implementation is not None:
        _set_attention(model, attn_implementation)
    model.eval()
    return model, tokenizer


def load_saved_tokenizer(folder: Path, trust_remote_code: bool = False) -> PreTrainedTokenizerFast:
    """Loads the tokenizer that was saved with a model; `trust_remote_code` lets it run code of its own.

    Raises:
        UserError: there is none that loads.
    """
    from transformers import AutoTokenizer

    try:
        tokenizer: Any = AutoTokenizer.from_pretrained(str(folder), trust_remote_code=trust_remote_code)
    except Exception as error:  # a broken file makes the loader raise almost anything
        raise load_failure(str(folder), error, "--model", "tokenizer") from error
    return tokenizer  # type: ignore[no-any-return]


def find_base(folder: Path) -> tuple[str, dict[str, Any]]:
    """Returns the base model of the adapter in `folder`, and how it was held in training (empty if peft saved it).

    Raises:
        UserError: the adapter names no base, or the base is not where it was.
    """
    adapter = _read_json(folder / ADAPTER_CONFIG)
    facts = _read_json(folder / BASE_FACTS) if (folder / BASE_FACTS).is_file() else {}
    name = adapter.get("base_model_name_or_path")
    file = str(folder / ADAPTER_CONFIG)
    if not name:
        raise UserError(Problem("names no base model", file=file, key="base_model_name_or_path"))
    relative = facts.get("path_from_here")
    if relative and not Path(name).is_dir() and (folder / relative).is_dir():
        name = str((folder / relative).resolve())
    try:
        reference = resolve_reference(name, "base_model_name_or_path")
    except UserError as error:
        message = f"the base model of this adapter is not at {name!r} any more"
        hint = f"Write where it is now. {error.problems[0].hint}"
        raise UserError(Problem(message, hint, "base_model_name_or_path", file)) from error
    return reference, {"revision": adapter.get("revision"), **facts}


def load_base(
    reference: str, facts: dict[str, Any], dtype: str = "auto", trust_remote_code: bool = False
) -> PreTrainedModel:
    """Loads a base model as it was held in training: quantized if it was, with as many embedding rows.

    Args:
        facts: from `find_base`.
        trust_remote_code: the user's word of this call; a file in the adapter's folder cannot grant it.

    Raises:
        UserError: it cannot be read.
    """
    import_bitsandbytes()
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    require_model(reference, "base_model_name_or_path")
    kwargs: dict[str, Any] = {
        "dtype": facts.get("dtype", "auto") if dtype == "auto" else dtype,
        "revision": facts.get("revision") or "main",
        "trust_remote_code": trust_remote_code,
    }
    quantization = facts.get("quantization_config")
    if quantization:
        kwargs["quantization_config"] = BitsAndBytesConfig.from_dict(quantization)
        kwargs["device_map"] = {"": training_device()}
    try:
        model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(reference, **kwargs)
    except LOAD_ERRORS as error:
        raise load_failure(reference, error, "base_model_name_or_path", "base model") from error
    resize_embeddings(model, int(facts.get("embedding_rows") or 0))
    if quantization:
        prepare_quantized(model)
    return model


def restore_generation_config(model: Any, folder: Path) -> None:
    """Gives a model the generation config that was saved with its adapter, if there is one."""
    from transformers import GenerationConfig

    if (folder / "generation_config.json").is_file():
        saved = GenerationConfig.from_pretrained(str(folder))
        model.generation_config = without_adapter(model).generation_config = saved


def _read_json(path: Path) -> dict[str, Any]:
    try:
        loaded = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(Problem(f"cannot read it: {error}", file=str(path))) from error
    if not isinstance(loaded, dict):
        raise UserError(Problem("not a JSON object", file=str(path)))
    return loaded


def _set_attention(model: Any, attn_implementation: str) -> None:
    import torch

    from sft.model.attention import document_attention

    causal_lm = without_adapter(model)
    half_weights = causal_lm.dtype != torch.float32
    document_attention.register()
    name, _ = choose_attention(attn_implementation, causal_lm.config, type(causal_lm), half_weights, device_facts())
    causal_lm.set_attn_implementation(name)
