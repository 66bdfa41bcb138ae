"""Loads a tokenizer as `AutoTokenizer` does, if possible without importing torch.

`AutoTokenizer` reads the model's config to choose a class, and the module of configs imports torch: 190 MiB and over a
second, which `check`, `preview` and the preparation of data do not need. For most models with a tokenizer.json the
class is known from two names in their files. Those are loaded directly, all others by `AutoTokenizer`.
"""

from __future__ import annotations

import json
from importlib import import_module
from pathlib import Path
from typing import Any

_ANY_RUST = "transformers.tokenization_utils_tokenizers", "TokenizersBackend"
_RUST_TYPES = frozenset(
    (
        *("cohere", "cohere2", "deepseek_v2", "deepseek_v3", "falcon", "gemma", "gemma2", "gemma3", "gemma3_text"),
        *("gpt2", "gpt_neox", "gpt_oss", "granite", "llama", "olmo2", "qwen3", "qwen3_moe", "smollm3", "stablelm"),
        "starcoder2",
    )
)
_QWEN_TYPES = frozenset(("qwen2", "qwen2_moe", "qwen3", "qwen3_moe"))
# By the class that a tokenizer_config.json names: module and class to load, and the `model_type`s (or none: a tokenizer
# without a model) for which AutoTokenizer loads the same.
KNOWN_CLASSES: dict[str, tuple[tuple[str, str], frozenset[str]]] = {
    "TokenizersBackend": (_ANY_RUST, _RUST_TYPES),
    "PreTrainedTokenizerFast": (_ANY_RUST, _RUST_TYPES),
    "Qwen2Tokenizer": (("transformers.models.qwen2.tokenization_qwen2", "Qwen2Tokenizer"), _QWEN_TYPES),
}


def load_tokenizer_files(reference: str, *, revision: str = "main", trust_remote_code: bool = False) -> Any:
    """Loads the tokenizer at `reference`, a folder or a name on the hub.

    Raises:
        Exception: whatever transformers raises for broken or missing files.
    """
    known = _find_class(Path(reference))
    if known is None:
        from transformers import AutoTokenizer

        return AutoTokenizer.from_pretrained(reference, revision=revision, trust_remote_code=trust_remote_code)
    module, name = known
    return getattr(import_module(module), name).from_pretrained(reference)


def _find_class(folder: Path) -> tuple[str, str] | None:
    """Returns module and name of the class of the tokenizer in `folder`; None if AutoTokenizer has to choose."""
    if not (folder / "tokenizer.json").is_file():
        return None
    try:
        tokenizer_config = json.loads((folder / "tokenizer_config.json").read_text(encoding="utf-8"))
        config = folder / "config.json"
        model = json.loads(config.read_text(encoding="utf-8")) if config.exists() else {"model_type": None}
        known, types = KNOWN_CLASSES[tokenizer_config["tokenizer_class"]]
        has_own_code = "auto_map" in tokenizer_config or "auto_map" in model
        return known if not has_own_code and model["model_type"] in (*types, None) else None
    except (OSError, ValueError, KeyError, TypeError):
        return None  # AutoTokenizer says what is wrong with them
