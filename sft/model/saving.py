"""Saving what was trained so that it loads as what was trained, and loading it again.

An adapter directory is peft's own layout with one file beside it, `base_model.json`: how the base was held while the
adapter was trained (number format, quantization, rows of the embeddings). With that a 4-bit adapter is put back on the
same 4-bit base, and not on weights that it never saw.
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sft.model.quantization import held_as

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerFast

BASE_FACTS = "base_model.json"


def stop_tokens(tokenizer: PreTrainedTokenizerFast, end_token_ids: Sequence[int]) -> list[int]:
    """The ids that end a reply: those that were trained to end one, then the tokenizer's EOS; each once."""
    ids = [*end_token_ids, *([] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id])]
    return list(dict.fromkeys(int(token) for token in ids))


def generation_config(
    model: PreTrainedModel | PeftModel, tokenizer: PreTrainedTokenizerFast, end_token_ids: Sequence[int]
) -> GenerationConfig:
    """The base's generation config, made to stop where this model was trained to stop.

    A base that was tuned on chat otherwise keeps its old EOS, and a server runs on past the answer.
    """
    from copy import deepcopy

    from transformers import GenerationConfig

    config: Any = deepcopy(model.generation_config) or GenerationConfig()
    stops = stop_tokens(tokenizer, end_token_ids)
    config.eos_token_id = stops[0] if len(stops) == 1 else (stops or None)
    config.pad_token_id = tokenizer.pad_token_id
    config.bos_token_id = tokenizer.bos_token_id
    config.use_cache = True
    if not config.do_sample and any(getattr(config, n, None) is not None for n in ("temperature", "top_p", "top_k")):
        # Some bases ship sampling settings beside do_sample=false, which transformers refuses to write.
        config.temperature = config.top_p = config.top_k = None
    return config


def save_companions(
    model: PreTrainedModel | PeftModel,
    tokenizer: PreTrainedTokenizerFast,
    folder: str | Path,
    end_token_ids: Sequence[int],
) -> None:
    """What a checkpoint needs beside the weights: tokenizer with template, generation config, and the base's facts."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save_pretrained(folder)
    generation_config(model, tokenizer, end_token_ids).save_pretrained(folder)
    if hasattr(model, "peft_config"):
        facts = base_facts(model, folder)
        (folder / BASE_FACTS).write_text(json.dumps(facts, indent=2) + "\n", encoding="utf-8")


def save_final_model(
    model: PreTrainedModel | PeftModel,
    tokenizer: PreTrainedTokenizerFast,
    output_dir: str | Path,
    end_token_ids: Sequence[int],
) -> None:
    """Write the model, or the adapter, to the top of `output_dir` in Hugging Face layout.

    The adapter names its base by absolute path (or hub name): a relative one would mean something else as soon as a
    process starts in another folder. For the case that the whole tree moves, `base_model.json` also holds the way
    from the adapter to the base, which is tried when the absolute path is gone.

    Args:
        model: unwrapped from DDP and the like.
        end_token_ids: the tokens that were trained to end an answer.
    """
    folder = Path(output_dir)
    folder.mkdir(parents=True, exist_ok=True)
    use_cache, model.config.use_cache = model.config.use_cache, True  # it was off for training only
    try:
        if hasattr(model, "peft_config"):
            # Embeddings that only grew are made again at loading; the rows trained for new tokens are in the adapter.
            model.save_pretrained(str(folder), save_embedding_layers=False)
        else:
            model.generation_config = generation_config(model, tokenizer, end_token_ids)
            model.save_pretrained(str(folder))
    finally:
        model.config.use_cache = use_cache
    save_companions(model, tokenizer, folder, end_token_ids)


def base_facts(model: Any, folder: Path) -> dict[str, Any]:
    """What `base_model.json` holds: the base's name, the way to it, and how it was held while it was trained on."""
    base: Any = model.get_base_model()
    name = base.name_or_path
    local = Path(name).is_dir()
    commit = getattr(base.config, "_commit_hash", None)  # of a hub's model; a branch may have moved on since
    return {
        "base_model_name_or_path": name,
        "path_from_here": os.path.relpath(name, folder.resolve()) if local else None,
        "dtype": str(base.config.dtype).removeprefix("torch."),
        "embedding_rows": int(base.config.get_text_config().vocab_size),
        "quantization_config": held_as(base.config),
        **({"revision": commit} if commit else {}),
    }
