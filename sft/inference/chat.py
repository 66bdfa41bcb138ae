"""An interactive conversation with a model in the terminal; also from a pipe, one question a line."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from threading import Thread
from typing import TYPE_CHECKING, Any

from sft.data.formats.conversation import Message
from sft.errors import Problem, UserError
from sft.inference.generate import (
    GREEDY,
    Sampling,
    answering,
    encode_prompt,
    generation_settings,
    position_limit,
    stop_ids,
)

if TYPE_CHECKING:
    from rich.console import Console

HELP = "/reset forgets the conversation, /system TEXT sets the system message (and resets), /quit ends"


def stream_reply(model: Any, tokenizer: Any, conversation: list[Message], sampling: Sampling = GREEDY) -> Iterator[str]:
    """The reply in pieces, as the model makes them.

    A second thread generates. When the caller stops listening, so does the model, after the token at hand.

    Raises:
        UserError: the chat template refuses the conversation.
    """
    import torch
    from transformers import StoppingCriteria, StoppingCriteriaList, TextIteratorStreamer

    ids = torch.tensor([encode_prompt(tokenizer, conversation)])
    streamer = TextIteratorStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True)
    abandoned = False
    failure: list[BaseException] = []
    room = min(sampling.max_new_tokens, position_limit(model) - ids.shape[1])
    if room < 1:
        raise UserError(Problem("the conversation fills all positions of the model", "/reset starts a new one."))
    settings = generation_settings(tokenizer, sampling, room, stop_ids(model, tokenizer))

    class Abandoned(StoppingCriteria):
        def __call__(self, input_ids: Any, *_: Any, **__: Any) -> Any:
            return torch.full((input_ids.shape[0],), abandoned, device=input_ids.device, dtype=torch.bool)

    def generate() -> None:
        try:
            with answering(model) as bare:
                torch.manual_seed(sampling.seed)
                bare.generate(
                    input_ids=ids.to(bare.device),
                    attention_mask=torch.ones_like(ids).to(bare.device),
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
    """The state of one conversation and what the commands do to it."""

    def __init__(
        self, model: Any, tokenizer: Any, console: Console, sampling: Sampling, system: str | None = None
    ) -> None:
        self._model, self._tokenizer, self._console, self._sampling = model, tokenizer, console, sampling
        self._system = system
        self.messages: list[Message] = []
        self.reset()

    def reset(self) -> None:
        """Forget everything but the system message."""
        self.messages = [{"role": "system", "content": self._system}] if self._system else []

    def command(self, line: str) -> bool:
        """Obey a line that starts with a slash; false when the chat is over."""
        word, _, rest = line.partition(" ")
        if word in ("/quit", "/exit"):
            return False
        if word == "/reset":
            self.reset()
            self._console.print("The conversation starts anew.", style="dim")
        elif word == "/system":
            self._system = rest.strip() or None
            self.reset()
            self._console.print("System message set." if self._system else "No system message.", style="dim")
        else:
            self._console.print(HELP, style="dim")
        return True

    def answer(self, line: str) -> None:
        """Print the reply as it comes and remember both sides; a reply cut short by Ctrl-C is remembered as it is."""
        asked = [*self.messages, {"role": "user", "content": line}]
        pieces: list[str] = []
        stream = stream_reply(self._model, self._tokenizer, asked, self._sampling)
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
        self.messages = [*asked, {"role": "assistant", "content": "".join(pieces)}]


def _reader(console: Console) -> Callable[[], str]:
    """A prompt on a terminal, silent lines from a pipe."""
    if sys.stdin.isatty():
        return lambda: console.input("[bold]> [/bold]")
    return input


def talk(
    model: Any,
    tokenizer: Any,
    sampling: Sampling = GREEDY,
    console: Console | None = None,
    *,
    system: str | None = None,
) -> list[Message]:
    """Talk until /quit or the end of the input; returns the messages of the conversation as it stands then.

    Args:
        system: the system message to begin with; `/system` sets another.
    """
    from rich.console import Console

    console = console or Console()
    conversation = _Chat(model, tokenizer, console, sampling, system)
    read = _reader(console)
    if sys.stdin.isatty():
        console.print(HELP, style="dim")
    while True:
        try:
            line = read().strip()
        except (EOFError, KeyboardInterrupt):
            console.print()
            break
        if line.startswith("/"):
            if not conversation.command(line):
                break
        elif line:
            conversation.answer(line)
    return conversation.messages
