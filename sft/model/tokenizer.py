"""Loads a tokenizer for training: the user's special tokens, a pad token, a chat template.

The system prompt of a run is saved with its tokenizer, so that a trained model can be asked with it again.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from sft.config.section import located
from sft.data.templates import chat_templates
from sft.errors import Problem, UserError
from sft.model.fast_tokenizer import load_tokenizer_files
from sft.model.paths import load_failure, resolve_reference

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

    from sft.config.schema import ModelKeys

logger = logging.getLogger("sft")

# Names that vocabularies of the common model families give to a token that only pads, even if their tokenizer config
# does not declare it.
_PAD_NAMES = "<|pad|> <pad> [PAD] <PAD> <|padding|> <|finetune_right_pad_id|> <|pad_token|> <pad_token>"
# Settings of a tokenizer that hold one token each; `additional_special_tokens` holds a list.
_SLOTS = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
_SYSTEM_PROMPT = "sft_system_prompt"


def _check_special_tokens(special_tokens: Sequence[str] | Mapping[str, Any]) -> dict[str, Any]:
    """Checks `special_tokens`, and returns them as a mapping, the form that transformers takes."""
    if not isinstance(special_tokens, Mapping):
        special_tokens = {"additional_special_tokens": list(special_tokens)}
    problems = []
    for slot, value in special_tokens.items():
        key = f"special_tokens.{slot}"
        if slot in _SLOTS:
            ok = isinstance(value, str) and bool(value)
        elif slot == "additional_special_tokens":
            ok = isinstance(value, (list, tuple)) and all(isinstance(token, str) and token for token in value)
        else:
            known = ", ".join((*_SLOTS, "additional_special_tokens"))
            problems.append(Problem(f"no such slot: {slot!r}", f"A tokenizer has {known}.", key=key))
            continue
        if not ok:
            problems.append(Problem(f"not a token: {value!r}", "Write each token as text.", key=key))
    if problems:
        raise UserError(*problems)
    return dict(special_tokens)


def add_special_tokens(
    tokenizer: PreTrainedTokenizerFast, special_tokens: Sequence[str] | Mapping[str, Any]
) -> tuple[str, ...]:
    """Adds the user's tokens to the tokenizer, and returns those that are new in the vocabulary.

    The tokenizer's own additional special tokens stay.

    Raises:
        UserError: an unknown slot, or a token that is not text.
    """
    wanted = _check_special_tokens(special_tokens)
    names = [name for value in wanted.values() for name in ([value] if isinstance(value, str) else value)]
    before = tokenizer.get_vocab()
    if wanted:
        tokenizer.add_special_tokens(wanted, replace_extra_special_tokens=False)
    return tuple(dict.fromkeys(name for name in names if name not in before))


def set_pad_token(tokenizer: PreTrainedTokenizerFast) -> str:
    """Sets a pad token that needs no new row in the embeddings; returns which one and why, for the log.

    A common mistake is to pad with EOS and to mask every pad id in the labels: the model then never learns to stop.
    Here labels are masked by position, never by id, so any token can pad. A separate token is still preferred, for
    other tools that read the saved tokenizer.

    Raises:
        UserError: the tokenizer has no pad, unk or eos token and none of the usual names.
    """
    if tokenizer.pad_token is not None:
        return f"{tokenizer.pad_token!r}, the tokenizer's own"
    vocabulary = tokenizer.get_vocab()
    name = next((name for name in _PAD_NAMES.split() if name in vocabulary), None)
    if name is not None:
        reason = "which the vocabulary already holds"
    elif tokenizer.unk_token is not None and tokenizer.unk_token != tokenizer.eos_token:
        name, reason = tokenizer.unk_token, "the unknown token (no new token is added for padding)"
    elif tokenizer.eos_token is not None:
        name = tokenizer.eos_token
        reason = "the end token (EOS is still trained: labels are masked by position, not by token id)"
    else:
        message = "the tokenizer has no pad, unk or eos token, so batches cannot be padded"
        raise UserError(Problem(message, "Name one: `special_tokens: {pad_token: '<pad>'}`.", key="special_tokens"))
    tokenizer.pad_token = name
    return f"{name!r}, {reason}"


def read_tokenizer(keys: ModelKeys) -> PreTrainedTokenizerFast:
    """Loads the tokenizer from its files, unchanged.

    Raises:
        UserError: no name is given, there is none at that name, or it has no Rust backend.
    """
    key = "tokenizer_name_or_path" if keys.tokenizer_name_or_path else "model_name_or_path"
    name = keys.tokenizer_name_or_path or keys.model_name_or_path
    if not name:
        hint = "Give `model_name_or_path`, or `tokenizer_name_or_path` with `from_scratch`."
        raise UserError(Problem("no tokenizer is named", hint, key="tokenizer_name_or_path"))
    reference = resolve_reference(name, key)
    revision = keys.model_revision if name == keys.model_name_or_path else None  # of that repository alone
    trust = keys.trust_remote_code
    try:
        tokenizer: Any = load_tokenizer_files(reference, revision=revision or "main", trust_remote_code=trust)
    except Exception as error:  # a broken tokenizer file makes the loader raise almost anything
        raise load_failure(reference, error, key, "tokenizer") from error
    if not tokenizer.is_fast:
        message = f"{type(tokenizer).__name__} is a slow tokenizer, without the character offsets that exact masks need"
        raise UserError(Problem(message, "Use a model whose folder has a tokenizer.json.", key=key))
    return tokenizer  # type: ignore[no-any-return]


def load_tokenizer(keys: ModelKeys) -> PreTrainedTokenizerFast:
    """Loads the tokenizer, and adds the user's special tokens, a pad token and a chat template.

    Raises:
        UserError: the tokenizer cannot be loaded, or a setting does not fit it.
    """
    with located(keys):
        tokenizer = read_tokenizer(keys)
    configure_tokenizer(tokenizer, keys)
    return tokenizer


def configure_tokenizer(tokenizer: PreTrainedTokenizerFast, keys: ModelKeys) -> None:
    """Applies the config to a tokenizer; nothing changes in one that a run of this config saved.

    Raises:
        UserError: a setting does not fit the tokenizer.
    """
    with located(keys):
        if keys.special_tokens and (added := add_special_tokens(tokenizer, keys.special_tokens)):
            logger.info("Tokens added to the vocabulary: %s", ", ".join(added))
        logger.info("Padding with %s", set_pad_token(tokenizer))
        logger.info("Chat template: %s", chat_templates.install(tokenizer, keys.chat_template))
    tokenizer.padding_side = "right"


def remember_system_prompt(tokenizer: Any, system_prompt: str | None) -> None:
    """Makes `save_pretrained` write the prompt into tokenizer_config.json; None removes that of an earlier training."""
    tokenizer.init_kwargs.pop(_SYSTEM_PROMPT, None)
    if system_prompt:
        tokenizer.init_kwargs[_SYSTEM_PROMPT] = system_prompt


def remembered_system_prompt(tokenizer: Any) -> str | None:
    """Returns the system prompt of the last training, None if it had none."""
    text = tokenizer.init_kwargs.get(_SYSTEM_PROMPT)
    return text if isinstance(text, str) and text else None
