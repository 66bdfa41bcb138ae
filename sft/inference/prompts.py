"""Prompts for generation from a file: a text file with one a line, or rows in the shapes that training takes."""

from __future__ import annotations

from pathlib import Path

from sft.data.formats.conversation import Conversation, RowLost
from sft.data.formats.normalize import read_question
from sft.data.sources.files import find_files, read_files
from sft.data.sources.row import Row
from sft.data.sources.text_readers import data_extension
from sft.errors import Problem, UserError


def _conversation(row: Row, is_text: bool) -> Conversation:
    if row.data is None:
        raise RowLost(*(row.lost or ("bad_schema", "no data")))
    return read_question({"question": row.data["text"]} if is_text else row.data)


def read_prompts(path: str | Path) -> list[Conversation]:
    """The conversations to answer, in the order of the file.

    A .txt file has one question a line. Rows of any other kind of file that training reads are asked what they ask
    there (`sft.data.formats.normalize.read_question`), with or without an answer: a training file can be used as it is.

    Raises:
        UserError: the file is missing, empty, of an unknown kind, or has rows that ask nothing: all at once, each with
            its line.
    """
    conversations, problems = [], []
    for file in find_files(str(path), "--prompts"):
        is_text = data_extension(file) == ".txt"
        for row in read_files([file]):
            try:
                conversations.append(_conversation(row, is_text))
            except RowLost as lost:
                problems.append(Problem(lost.message, file=row.file, line=row.line))
    if problems:
        raise UserError(*problems)
    return conversations
