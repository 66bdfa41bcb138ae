"""Checks once per run, on a few conversations, that training and serving use the same tokens.

    trained    <s> [INST] Hi [/INST] | Hello </s>      labels: -100 ... -100 | Hello </s>
    served     <s> [INST] Hi [/INST]                   apply_chat_template(..., add_generation_prompt=True)

A server's prompt must be exactly the tokens before a trained answer, and generation must stop on exactly the token that
the answer ends with. Both are read from what is trained (`input_ids` and `labels`) and from what a server calls (the
tokenizer, the generation config), not from the code that turns one into the other.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from transformers import PreTrainedTokenizerBase

from sft.data.documents import IGNORE_INDEX
from sft.data.encoding.encoder import Encoded
from sft.data.formats.conversation import Conversation
from sft.data.templates.renderer import ChatRenderer
from sft.errors import Problem

_HINT = "Serve with the tokenizer and chat template that this run saves, or fix `chat_template`."


@dataclass(frozen=True, slots=True)
class ServingContract:
    """What was compared, and what differs.

    Attributes:
        prompts: conversations whose prompt was compared.
        prompt_tokens: tokens of all these prompts.
        skipped: conversations that were not compared, by the reason why their prompts may differ.
        end_token_ids: the tokens that end the trained answers, each once, in the order of first use.
        end_tokens: their texts.
        problems: the first differing token of each prompt that differs.
    """

    prompts: int
    prompt_tokens: int
    skipped: dict[str, int]
    end_token_ids: tuple[int, ...]
    end_tokens: tuple[str, ...]
    problems: tuple[Problem, ...] = ()

    @property
    def ok(self) -> bool:
        """Whether nothing differs."""
        return not self.problems

    def as_json(self) -> dict[str, Any]:
        """Returns the part of it that `check --json` prints."""
        return {
            "ok": self.ok,
            "prompts": self.prompts,
            "prompt_tokens": self.prompt_tokens,
            "left_out": self.skipped,
            "end_tokens": list(self.end_tokens),
        }

    @property
    def message(self) -> str:
        """One line for `check` and the log."""
        parts = [f"{n} not compared ({reason})" for reason, n in self.skipped.items()]
        if self.problems:
            parts.insert(0, f"{len(self.problems)} of {self.prompts} prompts differ from what a server sends")
        elif self.prompts:
            ends = " or ".join(map(repr, self.end_tokens))
            parts.insert(0, f"{self.prompts} prompts ({self.prompt_tokens:,} tokens) match what a server sends")
            parts.insert(1, f"answers end with {ends}")
        return "; ".join(parts) or "no conversations to compare with what a server sends"


def check_prompts(
    tokenizer: PreTrainedTokenizerBase, samples: Iterable[tuple[Conversation, Encoded]], train_on: str = "assistant"
) -> ServingContract:
    """Compares the ids before each conversation's first trained token with the prompt that a server would encode.

    Only the first trained answer's prompt can be compared: a server that gets an answer back as text may encode it
    differently from the tokens that the model generates.

    Args:
        samples: conversations with their encodings before truncation and packing.
        train_on: the setting they were rendered with; with `all` there is no prompt, and nothing is compared.
    """
    renderer = ChatRenderer(tokenizer)
    prompts = tokens = 0
    skipped: Counter[str] = Counter()
    ends: dict[int, None] = {}
    problems: list[Problem] = []
    for number, (conversation, encoded) in enumerate(samples):
        if train_on == "all":
            skipped["all tokens are trained"] += 1
            continue
        trained = encoded.labels != IGNORE_INDEX
        ends.update(dict.fromkeys(encoded.input_ids[trained & ~np.append(trained[1:], False)].tolist()))
        ids = encoded.input_ids[: int(trained.argmax())].tolist()
        served = _served_prompt(tokenizer, conversation, train_on)
        problem = _difference(tokenizer, ids, served, f"conversation {number}: ")
        if problem and ids != served and (reason := _may_differ(conversation, served, renderer)):
            skipped[reason] += 1
            continue
        prompts, tokens = prompts + 1, tokens + len(ids)
        problems += [problem] if problem else []
    names = tuple(tokenizer.convert_ids_to_tokens(list(ends)))
    return ServingContract(prompts, tokens, dict(skipped), tuple(ends), names, tuple(problems))


def merge_contracts(contracts: Sequence[ServingContract]) -> ServingContract:
    """Merges the contracts of several data sets."""
    return ServingContract(
        sum(one.prompts for one in contracts),
        sum(one.prompt_tokens for one in contracts),
        dict(sum((Counter(one.skipped) for one in contracts), Counter())),
        tuple(dict.fromkeys(token for one in contracts for token in one.end_token_ids)),
        tuple(dict.fromkeys(token for one in contracts for token in one.end_tokens)),
        tuple(problem for one in contracts for problem in one.problems),
    )


def check_end_tokens(
    tokenizer: PreTrainedTokenizerBase, end_token_ids: Iterable[int], eos_token_id: int | Sequence[int] | None
) -> list[Problem]:
    """Returns a problem for each trained end token on which generation would not stop.

    Args:
        end_token_ids: the tokens that end the trained answers.
        eos_token_id: of the generation config that is saved with the model.
    """
    stops = [] if eos_token_id is None else [eos_token_id] if isinstance(eos_token_id, int) else list(eos_token_id)
    shown = ", ".join(f"{tokenizer.convert_ids_to_tokens(i)!r} (id {i})" for i in stops) or "nothing"
    return [
        Problem(
            f"answers are trained to end with {tokenizer.convert_ids_to_tokens(end)!r} (id {end}), but the saved "
            f"generation config stops on {shown}: a server would generate past the end of the answer",
            "Add the id to `eos_token_id` in generation_config.json.",
        )
        for end in end_token_ids
        if end not in stops
    ]


def _served_prompt(tokenizer: PreTrainedTokenizerBase, conversation: Conversation, train_on: str) -> list[int]:
    """Encodes the prompt as a server does that is asked for the first trained answer."""
    turns = [i for i, trained in enumerate(conversation.trainable) if trained]
    messages = conversation.messages[: turns[-1] if train_on == "last_assistant" else turns[0]]
    tools: Any = conversation.tools
    # As a batch of one, because transformers refuses a single empty conversation: that of a sample that opens with
    # the answer.
    batch: Any = tokenizer.apply_chat_template(
        [messages], tools=tools, add_generation_prompt=True, tokenize=True, return_dict=False
    )
    return [int(token) for token in batch[0]]


def _difference(tokenizer: PreTrainedTokenizerBase, ids: list[int], served: list[int], where: str) -> Problem | None:
    """Returns what is wrong with a prompt; None if training and server have the same tokens and at most one BOS."""
    bos = tokenizer.bos_token_id
    if bos is not None and served[:2] == [bos, bos]:
        message = f"{where}the prompt starts with {tokenizer.bos_token!r} twice"
        return Problem(message, "Write it once in the chat template.", "chat_template")
    if ids == served:
        return None
    shared = min(len(ids), len(served))
    at = next((i for i in range(shared) if ids[i] != served[i]), shared)
    trained_token, served_token = (
        f"{tokenizer.convert_ids_to_tokens(some[at])!r} (id {some[at]})" if at < len(some) else "missing"
        for some in (ids, served)
    )
    message = f"{where}token {at} of the prompt is {trained_token} in training and {served_token} when served"
    return Problem(message, _HINT, "chat_template")


def _may_differ(conversation: Conversation, served: list[int], renderer: ChatRenderer) -> str:
    """Returns why a server's prompt may differ from the trained one; empty if it must not."""
    if not served:  # the first token of a sample is never trained, because nothing predicts it
        return "the sample opens with the answer"
    called = any("tool_calls" in message or message["role"] == "tool" for message in conversation.messages)
    if (conversation.tools or called) and not renderer.renders_tools:
        return "its tools are inserted as text, because the template takes none"
    if renderer.control_tokens.find(conversation.messages, conversation.tools):
        return "its messages contain control tokens: plain text in training, but a server may interpret them"
    return ""
