"""Loading a config: values by the type of their key, every mistake at once, and secrets that no message shows."""

from __future__ import annotations

import logging

import pytest

from sft.config.loading import load_config
from sft.errors import UserError
from tests.config.yaml_files import refusal, write_yaml


@pytest.mark.parametrize(
    "key",
    [
        "model_name_or_path",
        "tokenizer_name_or_path",
        "chat_template",
        "dataset_path",
        "train_file",
        "validation_file",
        "cache_dir",
        "output_dir",
        "logging_dir",
        "resume_from_checkpoint",
    ],
)
def test_a_tilde_is_the_users_home_in_every_path_key(tmp_path, monkeypatch, key):
    """Libraries that expand it themselves, as transformers does with `output_dir`, then use the same folder."""
    monkeypatch.setenv("HOME", "/home/someone")
    assert getattr(load_config(write_yaml(tmp_path, f"{key}: ~/x")), key) == "/home/someone/x"
    assert getattr(load_config(write_yaml(tmp_path, "seed: 1"), [f"--{key}=~/x"]), key) == "/home/someone/x"
    assert getattr(load_config(write_yaml(tmp_path, f"{key}: ./x~")), key) == "./x~"


def test_a_tilde_in_a_list_of_paths_is_the_users_home_too(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", "/home/someone")
    config = load_config(
        write_yaml(tmp_path, "train_file: [~/a.jsonl, b.jsonl]\neval_datasets:\n  - path: ~/c.jsonl\n")
    )
    assert config.train_file == ["/home/someone/a.jsonl", "b.jsonl"]
    assert [entry.path for entry in config.eval_datasets or []] == ["/home/someone/c.jsonl"]
    scratch = "tokenizer_name_or_path: t\nfrom_scratch: ~/m.json\n"
    assert load_config(write_yaml(tmp_path, scratch)).from_scratch == "/home/someone/m.json"


@pytest.mark.parametrize(
    ("line", "key", "value"),
    [
        ("learning_rate: 1e-5", "learning_rate", 1e-5),
        ("learning_rate: 2", "learning_rate", 2.0),
        ("max_steps: 1e3", "max_steps", 1000),
        ("save_strategy: no", "save_strategy", "no"),
        ("save_strategy: 'no'", "save_strategy", "no"),
        ("bf16: yes", "bf16", True),
        ("bf16: Off", "bf16", False),
        ("packing: no", "packing", False),
        ("packing: bfd", "packing", "bfd"),
        ("report_to: none", "report_to", "none"),
        ("run_name: 2024-01-01", "run_name", "2024-01-01"),
        ("run_name: 12:30", "run_name", "12:30"),
        ("run_name: 007", "run_name", "007"),
        ("model_revision: 1e5", "model_revision", "1e5"),
        ("resume_from_checkpoint: yes", "resume_from_checkpoint", True),
        ("resume_from_checkpoint: auto", "resume_from_checkpoint", "auto"),
        ("train_file: [a.jsonl, 1]", "train_file", ["a.jsonl", "1"]),
        ("seed: 010", "seed", 10),
        ("include_num_input_tokens_seen: no", "include_num_input_tokens_seen", False),
        ("fsdp: true", "fsdp", True),
    ],
)
def test_a_scalar_gets_the_type_of_its_key(tmp_path, line, key, value):
    loaded = getattr(load_config(write_yaml(tmp_path, line)), key)
    assert loaded == value
    assert type(loaded) is type(value)


def test_all_mistakes_are_reported_at_once_in_the_order_of_the_file(tmp_path):
    path = write_yaml(
        tmp_path,
        "model_name: x\n"
        "learning_rate: fast\n"
        "lora_config:\n"
        "  rank: 8\n"
        "  lora_dropout: 2\n"
        "max_steps: true\n"
        "save_strategy: epohc\n"
        "datasets:\n"
        "  - path: a\n"
        "    formt: chat\n"
        "  - name: b\n"
        "packing: [bfd]\n"
        "warmup_steps: 5\n"
        "warmup_ratio: 0.1\n"
        "max_steps: 3\n",
    )
    assert refusal(path, "--seed=-1", "--nonsense", "1") == [
        (1, "model_name", "there is no such key"),
        (2, "learning_rate", "expected a number, got 'fast'"),
        (4, "lora_config.rank", "there is no such key"),
        (5, "lora_config.lora_dropout", "must be below 1, got 2"),
        (7, "save_strategy", "expected one of no, steps, epoch, best, got 'epohc'"),
        (10, "datasets.0.formt", "there is no such key"),
        (11, "datasets.1.path", "is needed: text"),
        (12, "packing", "expected one of auto, bfd, wrapped, false, got ['bfd']"),
        (14, "warmup_ratio", "excludes warmup_steps (line 13)"),
        (15, "max_steps", "given twice; the first time on line 6"),
        (None, "seed", "must be at least 0, got -1"),
        (None, "nonsense", "there is no such key"),
    ]


def test_a_rule_about_a_wrong_key_is_not_reported(tmp_path):
    path = write_yaml(
        tmp_path, "from_scratch: x\ntokenizer_name_or_path: [t]\neval_strategy: stps\nload_best_model_at_end: true"
    )
    assert [key for _, key, _ in refusal(path)] == ["tokenizer_name_or_path", "eval_strategy"]


def test_a_secret_is_in_no_message(tmp_path, caplog):
    path = write_yaml(tmp_path, "hub_token: [hf_secret]")
    with caplog.at_level(logging.INFO, "sft"), pytest.raises(UserError) as caught:
        load_config(path, ["--hub_token=[hf_other]"])
    assert "hf_" not in str(caught.value) + caplog.text
