"""The advice for rows that fit no format."""

from __future__ import annotations

import pytest
import yaml

from sft.data.formats.normalize import normalize
from tests.data.formats.rows import assistant, lost, user

MESSAGES = [user("Hi"), assistant("Yes")]


@pytest.mark.parametrize(
    ("row", "columns"),
    [
        ({"prompt": "Hi", "chosen": "Yes", "rejected": "No"}, {"question": "prompt", "answer": "chosen"}),
        ({"rejected": MESSAGES, "chosen": MESSAGES, "prompt": "Hi"}, {"messages": "chosen"}),
        ({"prompt": MESSAGES[:1], "chosen": MESSAGES[1:]}, {"question": "prompt", "answer": "chosen"}),
        ({"id": "7", "dialog": MESSAGES}, {"messages": "dialog"}),
        (
            {"question_id": "7", "Question": "Hi", "Best Answer": "Yes"},
            {"question": "Question", "answer": "Best Answer"},
        ),
        ({"target_text": "Yes", "input_text": "Hi", "n": 1}, {"question": "input_text", "answer": "target_text"}),
        ({"reply": "Yes", "they": "Hi"}, {"question": "they", "answer": "reply"}),
        ({"en": "Hi", "de": "Ja"}, {"question": "en", "answer": "de"}),
        ({"en: x": "Hi", "{é}": "Ja"}, {"question": "en: x", "answer": "{é}"}),
        ({"id": 1, "title": "a", "body": "b", "url": "c"}, {"text": "body"}),
        ({"line": "a", "number": 1}, {"text": "line"}),
    ],
)
def test_the_suggested_columns_make_the_row_readable(row, columns):
    written = lost(row)[1].partition("; name your columns with `columns: ")[2].removesuffix("`")
    assert yaml.safe_load(written) == columns
    normalize(row, columns=columns)


def test_advice_when_columns_would_not_help():
    nested = "the rows are under 'data': write each one on a line of its own"
    assert lost({"data": [{"question": "Hi", "answer": "Yes"}]})[1].endswith(f"its keys are data; {nested}")
    message = 'it is one message: a row is a whole conversation, {"messages": [...]}'
    assert lost({"role": "user", "content": "Hi"})[1].endswith(message)
    assert lost({"prompt": "Hi", "c": 1, "id": "7"})[1].endswith("`columns: {question: prompt, answer: ...}`")
