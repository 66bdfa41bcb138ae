"""Loads a model or adapter that was saved, with its tokenizer, ready to answer or to be measured."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sft.errors import Problem, UserError
from sft.model.embeddings import resize_embeddings, untie_adapted_ends
from sft.model.lora import attach_saved_adapter, without_adapter
from sft.model.paths import (
    ADAPTER_CONFIG,
    LOAD_ERRORS,
    is_adapter,
    require_model,
    require_trained,
    resolve_reference,
    unavailable,
)
from sft.model.quantization import import_bitsandbytes, settle
from sft.model.saving import BASE_FACTS

if TYPE_CHECKING:
    import torch
    from peft import PeftModel
    from transformers import PreTrainedModel, PreTrainedTokenizerFast


def _read_json(path: Path) -> dict[str, Any]:
    try:
        loaded = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(Problem(f"cannot read it: {error}", file=str(path))) from error
    if not isinstance(loaded, dict):
        raise UserError(Problem("not a JSON object", file=str(path)))
    return loaded


def find_base(folder: Path) -> tuple[str, dict[str, Any]]:
    """The base model of the adapter in `folder`, and the facts about how it was held (empty if peft alone saved it).

    Raises:
        UserError: the adapter names no base, or the base is not where it was.
    """
    adapter = _read_json(folder / ADAPTER_CONFIG)
    facts = _read_json(folder / BASE_FACTS) if (folder / BASE_FACTS).is_file() else {}
    name = adapter.get("base_model_name_or_path")
    file = str(folder / ADAPTER_CONFIG)
    if not name:
        raise UserError(Problem("names no base model", file=file, key="base_model_name_or_path"))
    way = facts.get("path_from_here")
    if way and not Path(name).is_dir() and (folder / way).is_dir():
        name = str((folder / way).resolve())
    try:
        reference = resolve_reference(name, "base_model_name_or_path")
    except UserError as error:
        raise UserError(
            Problem(
                f"the base model of this adapter is not at {name!r} any more",
                f"Write where it is now. {error.problems[0].hint}",
                key="base_model_name_or_path",
                file=file,
            )
        ) from error
    return reference, {"revision": adapter.get("revision"), **facts}


def load_base(
    reference: str, facts: dict[str, Any], dtype: str = "auto", trust_remote_code: bool = False
) -> PreTrainedModel:
    """The base model as it was held in training: quantized if it was, with as many embedding rows.

    Args:
        trust_remote_code: asked of the user each time; a file beside an adapter cannot grant it.

    Raises:
        UserError: it cannot be read.
    """
    import_bitsandbytes()
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    require_model(reference, "base_model_name_or_path")
    wanted = facts.get("dtype", "auto") if dtype == "auto" else dtype
    kwargs: dict[str, Any] = {
        "dtype": wanted,
        "revision": facts.get("revision") or "main",
        "trust_remote_code": trust_remote_code,
    }
    quantization = facts.get("quantization_config")
    if quantization:
        kwargs["quantization_config"] = BitsAndBytesConfig.from_dict(quantization)
        kwargs["device_map"] = {"": inference_device()}
    try:
        model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(reference, **kwargs)
    except LOAD_ERRORS as error:
        raise unavailable(reference, error, "base_model_name_or_path", "base model") from error
    resize_embeddings(model, int(facts.get("embedding_rows") or 0))
    if quantization:
        settle(model)
    return model


def inference_device() -> torch.device:
    """The GPU of this process, or the CPU."""
    import torch

    if torch.cuda.is_available():
        return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
    return torch.device("cpu")


def load_saved_tokenizer(folder: Path, trust_remote_code: bool = False) -> PreTrainedTokenizerFast:
    """The tokenizer that was saved beside a model; `trust_remote_code` lets it run code of its own.

    Raises:
        UserError: there is none that loads.
    """
    from transformers import AutoTokenizer

    try:
        tokenizer: Any = AutoTokenizer.from_pretrained(str(folder), trust_remote_code=trust_remote_code)
    except Exception as error:  # the loader raises whatever the broken file makes it stumble on
        raise unavailable(str(folder), error, "--model", "tokenizer") from error
    return tokenizer  # type: ignore[no-any-return]


def load_trained(
    model_dir: str | Path,
    *,
    merge_for_speed: bool = False,
    dtype: str = "auto",
    trust_remote_code: bool = False,
    attn_implementation: str | None = None,
) -> tuple[PreTrainedModel | PeftModel, PreTrainedTokenizerFast]:
    """A trained model from its folder, whole or adapter, in evaluation mode on the GPU if there is one.

    Args:
        merge_for_speed: fold an adapter into the weights in memory: one matrix product a layer instead of three. A
            quantized base stays quantized with its adapter beside it, for folding would round it again.
        dtype: of the weights; `auto` is what they were trained or saved in.
        attn_implementation: as for training, for a model that measures whole batches; None is transformers' choice.

    Raises:
        UserError: the folder holds no model, or its base is gone.
    """
    from transformers import AutoModelForCausalLM, GenerationConfig

    folder = Path(model_dir).expanduser()
    require_trained(folder)
    tokenizer = load_saved_tokenizer(folder, trust_remote_code)
    model: Any
    if is_adapter(folder):
        reference, facts = find_base(folder)
        facts.setdefault("embedding_rows", len(tokenizer))
        model = attach_saved_adapter(load_base(reference, facts, dtype, trust_remote_code), str(folder))
        if merge_for_speed and not facts.get("quantization_config"):
            untie_adapted_ends(model)
            model = model.merge_and_unload()
        if (folder / "generation_config.json").is_file():
            saved = GenerationConfig.from_pretrained(str(folder))
            model.generation_config = saved
            if hasattr(model, "get_base_model"):
                model.get_base_model().generation_config = saved
    else:
        try:
            model = AutoModelForCausalLM.from_pretrained(str(folder), dtype=dtype, trust_remote_code=trust_remote_code)
        except LOAD_ERRORS as error:
            raise unavailable(str(folder), error, "--model", "model") from error
    if not getattr(model, "is_quantized", False):
        model.to(inference_device())
    if attn_implementation is not None:
        _attend(model, attn_implementation)
    model.eval()
    return model, tokenizer


def _attend(model: Any, attn_implementation: str) -> None:
    import torch

    from sft.distributed.device import device_facts
    from sft.model.attention import document_attention
    from sft.model.attention.selection import choose_attention

    causal_lm = without_adapter(model)
    in_half = causal_lm.dtype != torch.float32
    document_attention.register()
    name, _ = choose_attention(attn_implementation, causal_lm.config, type(causal_lm), in_half, device_facts())
    causal_lm.set_attn_implementation(name)
