"""Generates replies with a loaded model: greedy or sampled, in batches, also during training."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import takewhile
from typing import Any

from sft.data.formats.conversation import Conversation, Message, RowLost
from sft.errors import Problem, UserError

logger = logging.getLogger("sft")
Prompt = str | list[Message] | Conversation
"""A conversation to answer (messages, or a `Conversation` with its tools), or a text to continue."""


@dataclass(frozen=True)
class Sampling:
    """How the tokens of a reply are chosen.

    Attributes:
        max_new_tokens: length limit of a reply.
        temperature: 0 is greedy; otherwise the logits are divided by it before a token is sampled.
        top_p: sample from the likeliest tokens that together have this probability.
        seed: of the sampling.
    """

    max_new_tokens: int = 256
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0


GREEDY = Sampling()


def encode_prompt(tokenizer: Any, prompt: Prompt) -> list[int]:
    """Returns the token ids of the prompt, up to where the reply begins.

    Control tokens typed into a message are encoded as plain text. Tools and tool calls are written as in training: as
    text, where the template does not support them.

    Raises:
        UserError: the chat template refuses the conversation.
    """
    if isinstance(prompt, str):
        return list(tokenizer(prompt)["input_ids"])
    try:
        messages, tools = _fit_to_template(tokenizer, prompt) if isinstance(prompt, Conversation) else (prompt, None)
        return list(
            tokenizer.apply_chat_template(
                messages, tools=tools, add_generation_prompt=True, return_dict=False, sanitize_control_tokens=True
            )
        )
    except RowLost as lost:
        raise UserError(Problem(lost.message)) from lost
    except Exception as error:  # jinja2 errors that templates raise, and TypeErrors of their filters
        raise UserError(Problem(f"the chat template refuses this conversation: {error}")) from error


def _fit_to_template(tokenizer: Any, prompt: Conversation) -> tuple[list[Message], list[dict[str, Any]] | None]:
    from sft.data.templates.renderer import ChatRenderer

    if not prompt.tools and not any("tool_calls" in message for message in prompt.messages):
        return prompt.messages, None
    return ChatRenderer(tokenizer).fit_to_template(prompt)


@contextmanager
def generation_mode(model: Any) -> Iterator[None]:
    """Sets the model to evaluation mode, then restores its mode, generation config and torch's random state.

    The generation config is emptied for the time: transformers takes every setting from it that a call does not give,
    and a repetition penalty or temperature of the base model would change a greedy reply.
    """
    import torch
    from transformers import GenerationConfig

    holders = [model, *([model.get_base_model()] if hasattr(model, "peft_config") else [])]
    kept = [holder.generation_config for holder in holders]
    was_training = model.training
    devices = [model.device] if model.device.type == "cuda" else []
    model.eval()
    for holder in holders:
        holder.generation_config = GenerationConfig()
    try:
        with torch.random.fork_rng(devices=devices), torch.no_grad():
            yield
    finally:
        for holder, config in zip(holders, kept, strict=True):
            holder.generation_config = config
        model.train(was_training)


def find_stop_ids(model: Any, tokenizer: Any) -> list[int]:
    """Returns the token ids that end a reply: those of the generation config, else the tokenizer's EOS."""
    ids = getattr(model.generation_config, "eos_token_id", None)
    if ids is None:
        ids = tokenizer.eos_token_id
    if ids is None:
        return []
    return list(ids) if isinstance(ids, (list, tuple)) else [int(ids)]


def position_limit(model: Any) -> int:
    """Returns how many tokens a prompt and its reply may have together; 2^31 where the model has no limit."""
    limit = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    return limit if isinstance(limit, int) and limit > 0 else 2**31


def make_generation_config(tokenizer: Any, sampling: Sampling, max_new_tokens: int, stops: Sequence[int]) -> Any:
    """Returns the `GenerationConfig` of one batch."""
    from transformers import GenerationConfig

    sampled = {"temperature": sampling.temperature, "top_p": sampling.top_p, "top_k": 0}
    return GenerationConfig(
        max_new_tokens=max_new_tokens,
        eos_token_id=list(stops) or None,
        pad_token_id=tokenizer.pad_token_id if tokenizer.pad_token_id is not None else next(iter(stops), 0),
        bos_token_id=tokenizer.bos_token_id,
        use_cache=True,
        do_sample=sampling.temperature > 0,
        **(sampled if sampling.temperature > 0 else {}),
    )


def _batch_by_length(prompts: Sequence[list[int]], batch_size: int) -> Iterator[list[int]]:
    """Yields the indices of prompts of similar length, longest first: little padding, and an early out-of-memory."""
    order = sorted((i for i, prompt in enumerate(prompts) if prompt), key=lambda i: -len(prompts[i]))
    for start in range(0, len(order), batch_size):
        yield order[start : start + batch_size]


def generate_replies(
    model: Any,
    tokenizer: Any,
    conversations: Sequence[Prompt],
    sampling: Sampling = GREEDY,
    *,
    batch_size: int = 8,
    stop_token_ids: Sequence[int] | None = None,
    on_progress: Callable[[int], None] | None = None,
) -> list[str]:
    """Generates one reply per conversation, in the given order.

    Args:
        model: a causal language model, not wrapped by DDP, which has no `generate`. It may be in training: its mode and
            torch's random state are restored.
        conversations: conversations for the chat template, or texts to continue.
        sampling: a prompt close to the model's maximum length gets fewer tokens than this allows.
        stop_token_ids: the tokens that end a reply; None takes those of the model's generation config, which during
            training may be the base's and lack the trained end token.
        on_progress: called with the number of replies since the last call.

    Returns:
        The new text of each, without control tokens; empty for a prompt that fills all positions of the model.

    Raises:
        UserError: the chat template refuses a conversation.
    """
    import torch
    from torch.nn.utils.rnn import pad_sequence

    prompts = [encode_prompt(tokenizer, conversation) for conversation in conversations]
    replies = [""] * len(prompts)
    stops = find_stop_ids(model, tokenizer) if stop_token_ids is None else list(stop_token_ids)
    with generation_mode(model):
        limit = position_limit(model)
        fitting = [ids if len(ids) < limit else [] for ids in prompts]
        if fitting != prompts:
            lost = sum(not ids for ids in fitting)
            logger.warning("%d prompts fill all %d positions of the model: no reply", lost, limit)
        torch.manual_seed(sampling.seed)
        for batch in _batch_by_length(fitting, batch_size):
            width = len(fitting[batch[0]])
            settings = make_generation_config(tokenizer, sampling, min(sampling.max_new_tokens, limit - width), stops)
            rows = [torch.tensor(fitting[i], device=model.device) for i in batch]
            ids = pad_sequence(rows, batch_first=True, padding_value=settings.pad_token_id, padding_side="left")
            mask = pad_sequence([torch.ones_like(row) for row in rows], batch_first=True, padding_side="left")
            output = model.generate(input_ids=ids, attention_mask=mask, generation_config=settings)
            for i, reply in zip(batch, output[:, width:].tolist(), strict=True):
                tokens = list(takewhile(lambda token: token not in stops, reply))
                replies[i] = tokenizer.decode(tokens, skip_special_tokens=True)
            if on_progress is not None:
                on_progress(len(batch))
    return replies
