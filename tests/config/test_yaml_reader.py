"""Reading YAML: merge keys, and files that cannot be read, with the line."""

from __future__ import annotations

import pytest

from sft.config.loading import load_config
from sft.errors import UserError
from tests.config.yaml_files import refusal, write_yaml


def test_merge_keys_and_anchors(tmp_path):
    config = load_config(
        write_yaml(
            tmp_path, "datasets:\n- &first {path: a, format: chat}\n- {path: b, <<: *first}\n- {<<: *first, format: qa}"
        )
    )
    assert config.datasets is not None
    assert [(d.path, d.format) for d in config.datasets] == [("a", "chat"), ("b", "chat"), ("a", "qa")]


@pytest.mark.parametrize(
    ("text", "line", "part"),
    [
        ("a: [1\nb: 2", 2, "not readable as YAML"),
        ("seed: 1\n\tbf16: true", 2, "not readable as YAML"),
        ("a: b: c", 1, "mapping values are not allowed here"),
        ("", None, "the config file is empty"),
        ("# nothing", None, "the config file is empty"),
        ("\n- a", 2, "expected `key: value` lines, got a list"),
        ("hello", 1, "got the single value 'hello'"),
        ("seed: 1\nx: !!python/object:os.system {}", 2, "is not supported here"),
        ("a: &a [*a]", 1, "an anchor that contains itself"),
        ("{seed: 1}: 2", 1, "a key must be one word"),
    ],
)
def test_unreadable_files_name_the_line(tmp_path, text, line, part):
    found = refusal(write_yaml(tmp_path, text))
    assert [problem for problem in found if problem[0] == line and part in problem[2]]


def test_a_file_that_does_not_exist_or_cannot_be_read(tmp_path):
    with pytest.raises(UserError, match=r"nowhere\.yaml: there is no such config file"):
        load_config(tmp_path / "nowhere.yaml")
    with pytest.raises(UserError, match="cannot be read"):
        load_config(tmp_path)
    (tmp_path / "binary.yaml").write_bytes(b"\xff\xfe\x00s")
    with pytest.raises(UserError, match="not UTF-8"):
        load_config(tmp_path / "binary.yaml")
