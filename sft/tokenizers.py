"""What is done to a tokenizer before training: tokens that the user adds, and a token to pad with."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from sft.errors import Problem, UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

# Names under which vocabularies of the common model families already hold a token that is for padding and nothing
# else, although their tokenizer config may not say so.
PAD_NAMES = (
    "<|pad|>",
    "<pad>",
    "[PAD]",
    "<PAD>",
    "<|padding|>",
    "<|finetune_right_pad_id|>",
    "<|pad_token|>",
    "<pad_token>",
)
# The slots of a tokenizer that hold one token each; `additional_special_tokens` holds a list.
SLOTS = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")


def _as_mapping(special_tokens: Sequence[str] | Mapping[str, Any]) -> dict[str, Any]:
    """`special_tokens` in the one spelling that transformers takes, or a UserError that names what is off."""
    if not isinstance(special_tokens, Mapping):
        special_tokens = {"additional_special_tokens": list(special_tokens)}
    problems = []
    for slot, value in special_tokens.items():
        key = f"special_tokens.{slot}"
        if slot in SLOTS:
            ok = isinstance(value, str) and bool(value)
        elif slot == "additional_special_tokens":
            ok = isinstance(value, (list, tuple)) and all(isinstance(token, str) and token for token in value)
        else:
            known = ", ".join((*SLOTS, "additional_special_tokens"))
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
    """Put the user's tokens into the tokenizer, and return those that the vocabulary did not hold before.

    Tokens that the tokenizer already lists as additional ones stay listed.

    Raises:
        UserError: an unknown slot, or a token that is not text.
    """
    wanted = _as_mapping(special_tokens)
    names = [name for value in wanted.values() for name in ([value] if isinstance(value, str) else value)]
    before = tokenizer.get_vocab()
    if wanted:
        tokenizer.add_special_tokens(wanted, replace_extra_special_tokens=False)
    return tuple(dict.fromkeys(name for name in names if name not in before))


def set_pad_token(tokenizer: PreTrainedTokenizerFast) -> str:
    """Give the tokenizer a pad token without a new row in the embeddings; returns in words which and why.

    The usual trap is to pad with EOS and to mask every pad id in the labels: then the model never learns to stop.
    Here labels are masked by position, never by id, so that reuse is harmless; still a token of its own is preferred,
    because other tools read the saved tokenizer too.

    Raises:
        UserError: the tokenizer has no pad, unk or eos token and none of the usual names.
    """
    if tokenizer.pad_token is not None:
        return f"{tokenizer.pad_token!r}, the tokenizer's own"
    vocabulary = tokenizer.get_vocab()
    name = next((name for name in PAD_NAMES if name in vocabulary), None)
    if name is not None:
        reason = "which the vocabulary already holds"
    elif tokenizer.unk_token is not None and tokenizer.unk_token != tokenizer.eos_token:
        name, reason = tokenizer.unk_token, "the unknown token (no new token is added for padding)"
    elif tokenizer.eos_token is not None:
        name = tokenizer.eos_token
        reason = "the end token (EOS is still trained: labels are masked by position, not by token id)"
    else:
        raise UserError(
            Problem(
                "the tokenizer has no pad, unk or eos token, so batches cannot be padded",
                "Name one: `special_tokens: {pad_token: '<pad>'}`.",
                key="special_tokens",
            )
        )
    tokenizer.pad_token = name
    return f"{name!r}, {reason}"
