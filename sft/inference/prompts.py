"""The prompts of `generate`: conversations from a file, and the system prompt."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

from sft.data.formats.conversation import Conversation, RowLost
from sft.data.formats.normalize import read_question
from sft.data.sources.files import find_files, read_files
from sft.data.sources.row import Row
from sft.data.sources.text_readers import data_extension
from sft.errors import Problem, UserError
from sft.model.tokenizer import remembered_system_prompt

logger = logging.getLogger("sft")


def read_prompts(path: str | Path) -> list[Conversation]:
    """Reads the conversations to answer, in the order of the file.

    A .txt file has one question per line. In every other format that training reads, a row becomes the prompt that it
    has in training (`sft.data.formats.normalize.read_question`), with or without an answer: a training file will do.

    Raises:
        UserError: the file is missing, empty or of an unknown format, or rows have no prompt; each is listed with its
            line.
    """
    conversations, problems = [], []
    for file in find_files(str(path), "--prompts"):
        is_text = data_extension(file) == ".txt"
        for row in read_files([file]):
            try:
                conversations.append(_parse_row(row, is_text))
            except RowLost as lost:
                problems.append(Problem(lost.message, file=row.file, line=row.line))
    if problems:
        raise UserError(*problems)
    return conversations


def _parse_row(row: Row, is_text: bool) -> Conversation:
    if row.data is None:
        raise RowLost(*(row.lost or ("bad_schema", "no data")))
    return read_question({"question": row.data["text"]} if is_text else row.data)


def choose_system_prompt(tokenizer: Any, requested: str | None) -> str | None:
    """Returns the requested system prompt (an empty text is none), else the one of the training, which is logged."""
    if requested is not None:
        return requested or None
    trained = remembered_system_prompt(tokenizer)
    if trained:
        logger.info("System prompt, as in training: %r (--system TEXT sets another, --system '' none)", trained)
    return trained
