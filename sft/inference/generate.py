"""Replies from a model that is in memory: greedy or sampled, in batches, also while a Trainer holds it."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from sft.data.formats.conversation import Conversation, Message, RowLost
from sft.errors import Problem, UserError

if TYPE_CHECKING:
    import torch

logger = logging.getLogger("sft")
Prompt = str | list[Message] | Conversation
"""A conversation to answer (messages, or with the tools that may be called), or a text to continue as it stands."""


@dataclass(frozen=True)
class Sampling:
    """How the tokens of a reply are chosen.

    Attributes:
        max_new_tokens: length limit of a reply.
        temperature: 0 is greedy; else the logits are divided by it before a token is drawn.
        top_p: draw from the likeliest tokens that together have this probability.
        seed: of the drawing.
    """

    max_new_tokens: int = 256
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0


GREEDY = Sampling()


def encode_prompt(tokenizer: Any, prompt: Prompt) -> list[int]:
    """Token ids up to where the model starts to answer.

    Control tokens that somebody has typed into a message are encoded as the characters they are. Tools and their calls
    are written as in training, where a template has no place for them as text.

    Raises:
        UserError: the chat template refuses the conversation.
    """
    if isinstance(prompt, str):
        return list(tokenizer(prompt)["input_ids"])
    try:
        messages, tools = _as_trained(tokenizer, prompt) if isinstance(prompt, Conversation) else (prompt, None)
        return list(
            tokenizer.apply_chat_template(
                messages,
                tools=tools,
                add_generation_prompt=True,
                tokenize=True,
                return_dict=False,
                sanitize_control_tokens=True,
            )
        )
    except RowLost as lost:
        raise UserError(Problem(lost.message)) from lost
    except Exception as error:  # templates raise jinja2 errors of their own, and TypeErrors from inside filters
        raise UserError(Problem(f"the chat template refuses this conversation: {error}")) from error


def _as_trained(tokenizer: Any, prompt: Conversation) -> tuple[list[Message], list[dict[str, Any]] | None]:
    from sft.data.templates.renderer import ChatRenderer

    if not prompt.tools and not any("tool_calls" in message for message in prompt.messages):
        return prompt.messages, None
    return ChatRenderer(tokenizer).fit_to_template(prompt)


@contextmanager
def answering(model: Any) -> Iterator[Any]:
    """The bare model in evaluation mode; its mode, generation config and torch's random state are put back afterwards.

    The generation config is emptied meanwhile: transformers takes from it whatever a call leaves open, so that a
    repetition penalty or a temperature that the base was shipped with would bend a greedy reply.
    """
    import torch
    from transformers import GenerationConfig

    bare = model.module if hasattr(model, "module") else model  # DDP's wrapper cannot generate
    holders = [bare, *([bare.get_base_model()] if hasattr(bare, "peft_config") else [])]
    kept = [holder.generation_config for holder in holders]
    was_training = bare.training
    devices = [bare.device] if bare.device.type == "cuda" else []
    bare.eval()
    for holder in holders:
        holder.generation_config = GenerationConfig()
    try:
        with torch.random.fork_rng(devices=devices), torch.no_grad():
            yield bare
    finally:
        for holder, config in zip(holders, kept, strict=True):
            holder.generation_config = config
        bare.train(was_training)


def stop_ids(model: Any, tokenizer: Any) -> list[int]:
    """The ids that end a reply: the generation config's, else the tokenizer's EOS."""
    bare = model.module if hasattr(model, "module") else model
    ids = getattr(bare.generation_config, "eos_token_id", None)
    if ids is None:
        ids = tokenizer.eos_token_id
    if ids is None:
        return []
    return list(ids) if isinstance(ids, (list, tuple)) else [int(ids)]


def position_limit(model: Any) -> int:
    """How many tokens a prompt and its reply may have together; a very large number where the model has no limit."""
    limit = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    return limit if isinstance(limit, int) and limit > 0 else 2**31


def generation_settings(tokenizer: Any, sampling: Sampling, max_new_tokens: int, stops: Sequence[int]) -> Any:
    """What transformers' `generate` takes for one batch."""
    from transformers import GenerationConfig

    draw = {"temperature": sampling.temperature, "top_p": sampling.top_p, "top_k": 0}
    return GenerationConfig(
        max_new_tokens=max_new_tokens,
        eos_token_id=list(stops) or None,
        pad_token_id=tokenizer.pad_token_id if tokenizer.pad_token_id is not None else next(iter(stops), 0),
        bos_token_id=tokenizer.bos_token_id,
        use_cache=True,
        do_sample=sampling.temperature > 0,
        **(draw if sampling.temperature > 0 else {}),
    )


def _left_padded(rows: Sequence[Sequence[int]], pad: int) -> tuple[torch.Tensor, torch.Tensor]:
    """`input_ids` and `attention_mask`, both (B, T) int64, each row ending at the right where its reply begins."""
    import torch

    width = max(len(row) for row in rows)
    ids = torch.full((len(rows), width), pad, dtype=torch.long)
    mask = torch.zeros((len(rows), width), dtype=torch.long)
    for i, row in enumerate(rows):
        ids[i, width - len(row) :] = torch.tensor(row, dtype=torch.long)
        mask[i, width - len(row) :] = 1
    return ids, mask


def _cut_at_stop(ids: list[int], stops: Sequence[int]) -> list[int]:
    end = next((i for i, token in enumerate(ids) if token in stops), len(ids))
    return ids[:end]


def _batches(rows: Sequence[list[int]], batch_size: int) -> Iterator[list[int]]:
    """Indices of rows of similar length, longest first: little padding, and too large a batch fails at once."""
    order = sorted((i for i, row in enumerate(rows) if row), key=lambda i: -len(rows[i]))
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
    """One reply for each conversation, in the order given.

    Args:
        model: a causal language model, also one that is being trained: its mode and torch's random state are put back.
        conversations: what the chat template is to render, or texts to continue.
        sampling: a prompt near the end of the model's positions gets fewer tokens than this allows.
        stop_token_ids: what ends a reply; None takes the model's generation config, which in training may still be the
            base's and not know the trained end token.
        on_progress: called with the number of replies done since the last call.

    Returns:
        The new text of each, without control tokens; empty for a prompt that fills the model's positions.

    Raises:
        UserError: the chat template refuses a conversation.
    """
    import torch

    prompts = [encode_prompt(tokenizer, conversation) for conversation in conversations]
    replies = [""] * len(prompts)
    stops = stop_ids(model, tokenizer) if stop_token_ids is None else list(stop_token_ids)
    with answering(model) as bare:
        limit = position_limit(bare)
        fitting = [ids if len(ids) < limit else [] for ids in prompts]
        if fitting != prompts:
            lost = sum(not ids for ids in fitting)
            logger.warning("%d prompts fill all %d positions of the model: no reply", lost, limit)
        torch.manual_seed(sampling.seed)
        for batch in _batches(fitting, batch_size):
            width = len(fitting[batch[0]])
            settings = generation_settings(tokenizer, sampling, min(sampling.max_new_tokens, limit - width), stops)
            ids, mask = _left_padded([fitting[i] for i in batch], settings.pad_token_id)
            output = bare.generate(
                input_ids=ids.to(bare.device), attention_mask=mask.to(bare.device), generation_config=settings
            )
            for i, row in zip(batch, output[:, width:].tolist(), strict=True):
                replies[i] = tokenizer.decode(_cut_at_stop(row, stops), skip_special_tokens=True)
            if on_progress is not None:
                on_progress(len(batch))
    return replies
