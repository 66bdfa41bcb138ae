"""Chats with a model in the terminal, or through a pipe with one question per line."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from threading import Thread
from typing import Any

from rich.console import Console

from sft.data.formats.conversation import Message
from sft.errors import Problem, UserError
from sft.inference.generate import (
    GREEDY,
    Sampling,
    encode_prompt,
    find_stop_ids,
    generation_mode,
    make_generation_config,
    position_limit,
)
from sft.inference.prompts import choose_system_prompt
from sft.model.trained_models import load_trained

HELP = "/reset forgets the conversation, /system TEXT sets the system message (and resets), /quit ends"


def stream_reply(model: Any, tokenizer: Any, conversation: list[Message], sampling: Sampling = GREEDY) -> Iterator[str]:
    """Yields the reply in pieces, as they are generated.

    A second thread generates. When the caller closes the iterator, generation stops after the current token.

    Raises:
        UserError: the chat template refuses the conversation, or it fills all positions of the model.
    """
    import torch
    from transformers import StoppingCriteria, StoppingCriteriaList, TextIteratorStreamer

    ids = torch.tensor([encode_prompt(tokenizer, conversation)])
    streamer = TextIteratorStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True)
    abandoned = False
    failure: list[BaseException] = []
    new_tokens = min(sampling.max_new_tokens, position_limit(model) - ids.shape[1])
    if new_tokens < 1:
        raise UserError(Problem("the conversation fills all positions of the model", "/reset starts a new one."))
    settings = make_generation_config(tokenizer, sampling, new_tokens, find_stop_ids(model, tokenizer))

    class Abandoned(StoppingCriteria):
        def __call__(self, input_ids: Any, *_: Any, **__: Any) -> Any:
            return torch.full((input_ids.shape[0],), abandoned, device=input_ids.device, dtype=torch.bool)

    def generate() -> None:
        try:
            with generation_mode(model):
                torch.manual_seed(sampling.seed)
                model.generate(
                    input_ids=ids.to(model.device),
                    attention_mask=torch.ones_like(ids).to(model.device),
                    generation_config=settings,
                    streamer=streamer,
                    stopping_criteria=StoppingCriteriaList([Abandoned()]),
                )
        except BaseException as error:
            failure.append(error)
            streamer.end()

    thread = Thread(target=generate, daemon=True)
    thread.start()
    try:
        yield from (piece for piece in streamer if piece)
    finally:
        abandoned = True
        thread.join()
    if failure:
        raise failure[0]


class _Chat:
    """One conversation and its commands."""

    def __init__(self, model: Any, tokenizer: Any, console: Console, sampling: Sampling, system: str | None) -> None:
        self._model, self._tokenizer, self._console, self._sampling = model, tokenizer, console, sampling
        self._system = system
        self.reset()

    def reset(self) -> None:
        """Forgets everything but the system message."""
        self.messages: list[Message] = [{"role": "system", "content": self._system}] if self._system else []

    def run_command(self, line: str) -> bool:
        """Runs a line that starts with a slash; returns false when the chat is over."""
        word, _, rest = line.partition(" ")
        if word in ("/quit", "/exit"):
            return False
        if word == "/reset":
            self.reset()
            self._console.print("Conversation reset.", style="dim")
        elif word == "/system":
            self._system = rest.strip() or None
            self.reset()
            self._console.print("System message set." if self._system else "No system message.", style="dim")
        else:
            self._console.print(HELP, style="dim")
        return True

    def answer(self, line: str) -> None:
        """Prints the reply while it is generated and keeps both messages; Ctrl-C ends it, and the part is kept."""
        messages = [*self.messages, {"role": "user", "content": line}]
        pieces: list[str] = []
        stream = stream_reply(self._model, self._tokenizer, messages, self._sampling)
        try:
            for piece in stream:
                pieces.append(piece)
                self._console.print(piece, end="", markup=False, highlight=False, soft_wrap=True)
        except KeyboardInterrupt:
            stream.close()  # type: ignore[attr-defined]
        except UserError as error:
            self._console.print(str(error), style="red", markup=False)
            return
        self._console.print()
        self.messages = [*messages, {"role": "assistant", "content": "".join(pieces)}]


def run_chat(
    model: Any, tokenizer: Any, sampling: Sampling = GREEDY, console: Console | None = None, system: str | None = None
) -> list[Message]:
    """Chats until /quit or the end of the input; returns the messages of the conversation.

    Args:
        system: the first system message; `/system` sets another.
    """
    console = console or Console()
    conversation = _Chat(model, tokenizer, console, sampling, system)
    read: Callable[[], str] = input  # from a pipe no prompt is shown
    if sys.stdin.isatty():
        read = partial(console.input, "[bold]> [/bold]")
        console.print(HELP, style="dim")
    while True:
        try:
            line = read().strip()
        except (EOFError, KeyboardInterrupt):
            console.print()
            break
        if line.startswith("/"):
            if not conversation.run_command(line):
                break
        elif line:
            conversation.answer(line)
    return conversation.messages


def chat(
    model_dir: str | Path, sampling: Sampling = GREEDY, *, system: str | None = None, trust_remote_code: bool = False
) -> list[Message]:
    """Loads a trained model and chats with it in the terminal; returns the messages of the conversation.

    Args:
        system, trust_remote_code: as for `sft.inference.batch.run_batch`.

    Raises:
        UserError: the folder holds no model.
    """
    model, tokenizer = load_trained(model_dir, merge_for_speed=True, trust_remote_code=trust_remote_code)
    return run_chat(model, tokenizer, sampling, system=choose_system_prompt(tokenizer, system))
