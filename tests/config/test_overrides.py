"""Overrides from the command line: spellings, values, list items, log lines and mistakes."""

from __future__ import annotations

import logging

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from sft.config.loading import load_config
from tests.config.yaml_files import refusal, write_yaml


@pytest.mark.parametrize(
    "words",
    [
        ["--learning_rate", "1e-5", "--lora_config.r", "32", "--bf16", "true"],
        ["--learning_rate=1e-5", "--lora_config.r=32", "--bf16=yes"],
        ["learning_rate=1e-5", "lora_config.r=32", "bf16=true"],
        ["--learning-rate", "1e-5", "--bf16", "--lora-config.r=32"],
        ["--bf16", "lora_config.r=32", "--learning-rate=1e-5"],
        ["--learning_rate", "1e-5", "lora_config.r=32", "--bf16"],
    ],
)
def test_overrides_in_every_spelling(tmp_path, words):
    config = load_config(write_yaml(tmp_path, "learning_rate: 3\nlora_config: {r: 8, lora_alpha: 9}"), words)
    assert config.lora_config is not None
    assert (config.learning_rate, config.bf16) == (1e-5, True)
    assert (config.lora_config.r, config.lora_config.lora_alpha) == (32, 9)


@pytest.mark.parametrize(
    ("words", "key", "value"),
    [
        (["train_file=[a.jsonl,b.jsonl]"], "train_file", ["a.jsonl", "b.jsonl"]),
        (["--max_steps", "-1"], "max_steps", -1),
        (["--system_prompt", "Answer in one word: yes or no"], "system_prompt", "Answer in one word: yes or no"),
        (["--chat_template", "{% for m in messages %}{{ m }}{% endfor %}"], "chat_template", None),
        (["--chat_template={{ messages }}"], "chat_template", "{{ messages }}"),
        (["--run_name", "a=b"], "run_name", "a=b"),
        (["--run_name=007"], "run_name", "007"),
        (["--run_name="], "run_name", None),
        (["--packing", "no"], "packing", False),
        (["--packing", "wrapped"], "packing", "wrapped"),
        (["columns.question=problem"], "columns", {"question": "problem"}),
        (["from_scratch.model_type=llama", "--tokenizer_name_or_path=t"], "from_scratch", {"model_type": "llama"}),
        (["seed=1", "seed=2"], "seed", 2),
        (["--trust-remote-code", "--seed", "3"], "trust_remote_code", True),
    ],
)
def test_override_values(tmp_path, words, key, value):
    if value is None and "{%" in words[-1]:
        value = words[-1]
    assert getattr(load_config(write_yaml(tmp_path, "output_dir: o"), words), key) == value


def test_an_override_reaches_into_a_list(tmp_path):
    path = write_yaml(tmp_path, "datasets: [{path: a}, {path: b}]")
    config = load_config(path, ["datasets.1.max_samples=10"])
    assert config.datasets is not None
    assert [d.max_samples for d in config.datasets] == [None, 10]
    assert refusal(path, "datasets.2.path=c", "datasets.path=c", "datasets.0.path.x=c") == [
        (None, "datasets.2.path", "datasets has 2 items, counted from 0"),
        (None, "datasets.path", "datasets is a list; write datasets.0.path for its first item"),
        (None, "datasets.0.path.x", "datasets.0.path is 'a', which has no keys"),
    ]


def test_an_override_replaces_a_wrong_value(tmp_path):
    config = load_config(
        write_yaml(tmp_path, "learning_rate: fast\nlora_config:"), ["--learning_rate=1", "lora_config.r=4"]
    )
    assert config.learning_rate == 1
    assert config.lora_config is not None
    assert config.lora_config.r == 4


def test_each_override_is_logged(tmp_path, caplog):
    with caplog.at_level(logging.INFO, "sft"):
        load_config(
            write_yaml(tmp_path, "learning_rate: 3e-4"), ["--learning_rate", "1e-5", "lora_config.r=32", "run_name=x"]
        )
    assert [record.message for record in caplog.records] == [
        "override: learning_rate = 1e-5 (was 0.0003)",
        "override: lora_config.r = 32 (was 16)",
        "override: run_name = x (was null)",
    ]


def test_words_that_are_no_override_are_refused(tmp_path):
    found = refusal(
        write_yaml(tmp_path, "seed: 1"), "train.jsonl", "--learning_rate", "--", "-x", "a..b=1", "--foo.bar=1"
    )
    assert found == [
        (None, None, "'train.jsonl' is not an override"),
        (None, "learning_rate", "needs a value"),
        (None, None, "'--' is not an override"),
        (None, None, "'-x' is not an override"),
        (None, "a..b", "'a..b' is not a key"),
        (None, "foo.bar", "there is no such key"),
    ]


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(rate=st.floats(min_value=0, max_value=10), steps=st.integers(1, 10**9), flag=st.booleans())
def test_an_override_has_the_effect_of_a_line_in_the_file(tmp_path, rate, steps, flag):
    in_file = load_config(
        write_yaml(tmp_path, f"learning_rate: {rate!r}\nmax_steps: {steps}\nbf16: {str(flag).lower()}")
    )
    overridden = load_config(
        write_yaml(tmp_path, "seed: 42"), [f"--learning_rate={rate!r}", "--max_steps", str(steps), f"bf16={flag}"]
    )
    assert overridden == in_file
    assert overridden.learning_rate == rate
