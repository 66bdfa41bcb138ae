"""The system prompt that a model was trained behind, kept with its tokenizer: so it can be asked as it was trained.

It stands in `tokenizer_config.json` beside what else makes a prompt of messages, under a key of ours. So it goes
wherever the tokenizer goes: into each checkpoint, the final model, and what `merge` writes.
"""

from __future__ import annotations

from typing import Any

_KEY = "sft_system_prompt"


def remember(tokenizer: Any, system_prompt: str | None) -> None:
    """Has `save_pretrained` write the prompt; without one, what an earlier training left there is taken out."""
    tokenizer.init_kwargs.pop(_KEY, None)
    if system_prompt:
        tokenizer.init_kwargs[_KEY] = system_prompt


def remembered(tokenizer: Any) -> str | None:
    """The system prompt of the last training, None if it had none."""
    text = tokenizer.init_kwargs.get(_KEY)
    return text if isinstance(text, str) and text else None
