"""A tokenizer from its files, as `AutoTokenizer` loads it, and where possible without what that imports.

`AutoTokenizer` reads the model's config to choose a class, and the module of configs imports torch: 190 MiB and over a
second, for `check`, `preview` and a preparation of data that need none of it. For most models with a tokenizer.json the
choice is plain from two names in their files. Those are settled here; all others are left to `AutoTokenizer`.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

# The class that a tokenizer_config.json names → where it is, and the `model_type`s (none: a tokenizer without a model)
# with which AutoTokenizer takes that class as named.
_ANY_RUST = "transformers.tokenization_utils_tokenizers", "TokenizersBackend"
_RUST_TYPES = frozenset(
    (
        *("cohere", "cohere2", "deepseek_v2", "deepseek_v3", "falcon", "gemma", "gemma2", "gemma3", "gemma3_text"),
        *("gpt2", "gpt_neox", "gpt_oss", "granite", "llama", "olmo2", "qwen3", "qwen3_moe", "smollm3", "stablelm"),
        "starcoder2",
    )
)
_QWEN_TYPES = frozenset(("qwen2", "qwen2_moe", "qwen3", "qwen3_moe"))
_SETTLED: dict[str, tuple[tuple[str, str], frozenset[str]]] = {
    "TokenizersBackend": (_ANY_RUST, _RUST_TYPES),
    "PreTrainedTokenizerFast": (_ANY_RUST, _RUST_TYPES),
    "Qwen2Tokenizer": (("transformers.models.qwen2.tokenization_qwen2", "Qwen2Tokenizer"), _QWEN_TYPES),
}


def load_tokenizer_files(reference: str, *, revision: str = "main", trust_remote_code: bool = False) -> Any:
    """The tokenizer at `reference`, a folder or a name on the hub.

    Raises:
        Exception: whatever transformers raises of broken or missing files.
    """
    place = _settled(Path(reference))
    if place is None:
        from transformers import AutoTokenizer

        return AutoTokenizer.from_pretrained(reference, revision=revision, trust_remote_code=trust_remote_code)
    from importlib import import_module

    module, name = place
    return getattr(import_module(module), name).from_pretrained(reference)


def _settled(folder: Path) -> tuple[str, str] | None:
    """Module and name of the class of the tokenizer in `folder`; None where AutoTokenizer has to choose."""
    if not (folder / "tokenizer.json").is_file():
        return None
    try:
        tokenizer_config = json.loads((folder / "tokenizer_config.json").read_text(encoding="utf-8"))
        config = folder / "config.json"
        model = json.loads(config.read_text(encoding="utf-8")) if config.exists() else {"model_type": None}
        place, types = _SETTLED[tokenizer_config["tokenizer_class"]]
        is_plain = "auto_map" not in tokenizer_config and "auto_map" not in model
        return place if is_plain and model["model_type"] in (*types, None) else None
    except (OSError, ValueError, KeyError, TypeError):
        return None  # AutoTokenizer has words for what is wrong with them
