"""Saves a trained model or adapter in Hugging Face layout.

An adapter's folder has peft's own layout and one more file, `base_model.json`: how the base was held while the adapter
was trained (dtype, quantization, rows of the embeddings). It is loaded again on that same base: a 4-bit adapter on the
4-bit base that it was trained on, not on weights that it never saw.
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from copy import deepcopy
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sft.model.quantization import quantization_settings

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerFast

BASE_FACTS = "base_model.json"


def stop_tokens(tokenizer: PreTrainedTokenizerFast, end_token_ids: Sequence[int]) -> list[int]:
    """Returns the ids that end an answer: those trained to end one, then the tokenizer's EOS; each once."""
    ids = [*end_token_ids, *([] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id])]
    return list(dict.fromkeys(int(token) for token in ids))


def generation_config(
    model: PreTrainedModel | PeftModel, tokenizer: PreTrainedTokenizerFast, end_token_ids: Sequence[int]
) -> GenerationConfig:
    """Returns the base's generation config with the tokens at which this model was trained to stop.

    Otherwise a chat-tuned base keeps its old EOS, and a server generates past the end of the answer.
    """
    from transformers import GenerationConfig

    config: Any = deepcopy(model.generation_config) or GenerationConfig()
    stops = stop_tokens(tokenizer, end_token_ids)
    config.eos_token_id = stops[0] if len(stops) == 1 else (stops or None)
    config.pad_token_id = tokenizer.pad_token_id
    config.bos_token_id = tokenizer.bos_token_id
    config.use_cache = True
    if not config.do_sample and any(getattr(config, n, None) is not None for n in ("temperature", "top_p", "top_k")):
        # Some bases come with sampling settings beside do_sample=false, which transformers refuses to write.
        config.temperature = config.top_p = config.top_k = None
    return config


def save_companions(
    model: PreTrainedModel | PeftModel,
    tokenizer: PreTrainedTokenizerFast,
    folder: str | Path,
    end_token_ids: Sequence[int],
) -> None:
    """Saves what belongs to the weights: tokenizer with chat template, generation config, and `base_model.json`."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save_pretrained(folder)
    generation_config(model, tokenizer, end_token_ids).save_pretrained(folder)
    if hasattr(model, "peft_config"):
        facts = _base_facts(model, folder)
        (folder / BASE_FACTS).write_text(json.dumps(facts, indent=2) + "\n", encoding="utf-8")


def save_final_model(
    model: PreTrainedModel | PeftModel,
    tokenizer: PreTrainedTokenizerFast,
    output_dir: str | Path,
    end_token_ids: Sequence[int],
) -> None:
    """Writes the model, or the adapter, to the top of `output_dir`.

    The adapter names its base by absolute path (or hub name): a relative path would mean another folder to a process
    that starts elsewhere. In case both are moved together, `base_model.json` also holds the relative path from the
    adapter to the base, which is used if the absolute path does not exist.

    Args:
        model: unwrapped from DDP and the like.
        end_token_ids: the tokens that were trained to end an answer.
    """
    folder = Path(output_dir)
    folder.mkdir(parents=True, exist_ok=True)
    use_cache, model.config.use_cache = model.config.use_cache, True  # it was off for training only
    try:
        if hasattr(model, "peft_config"):
            # Embeddings that only grew are grown again at loading; the rows trained for new tokens are in the adapter.
            model.save_pretrained(str(folder), save_embedding_layers=False)
        else:
            model.generation_config = generation_config(model, tokenizer, end_token_ids)
            model.save_pretrained(str(folder))
    finally:
        model.config.use_cache = use_cache
    save_companions(model, tokenizer, folder, end_token_ids)


def _base_facts(model: Any, folder: Path) -> dict[str, Any]:
    """Returns the content of `base_model.json`: the base's name and relative path, and how it was held in training."""
    base: Any = model.get_base_model()
    name = base.name_or_path
    local = Path(name).is_dir()
    commit = getattr(base.config, "_commit_hash", None)  # of a hub model; its branch may have changed since
    return {
        "base_model_name_or_path": name,
        "path_from_here": os.path.relpath(name, folder.resolve()) if local else None,
        "dtype": str(base.config.dtype).removeprefix("torch."),
        "embedding_rows": int(base.config.get_text_config().vocab_size),
        "quantization_config": quantization_settings(base.config),
        **({"revision": commit} if commit else {}),
    }
