"""Answers a file of prompts, or chats."""

from __future__ import annotations

from typing import Any

from commands.options import Options
from sft.inference.batch import run_batch
from sft.inference.chat import chat
from sft.inference.generate import Sampling


def run(options: Options) -> int:
    """Writes the answers, or chats until the user leaves."""
    sampling = Sampling(options.max_new_tokens, options.temperature, options.top_p, options.seed)
    asking: dict[str, Any] = {"system": options.system, "trust_remote_code": options.trust_remote_code}
    if options.chat:
        chat(options.model, sampling, **asking)
    else:
        run_batch(options.model, options.prompts, options.output, sampling, options.batch_size, **asking)
    return 0
