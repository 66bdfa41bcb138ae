"""Mistakes in single keys: exact messages, and the nearest valid key for an unknown one."""

from __future__ import annotations

import pytest

from sft.config.error_messages import list_keys
from sft.config.key_aliases import HINTS, KEY_ALIASES
from sft.config.schema import Config
from tests.config.yaml_files import hints, refusal, write_yaml


@pytest.mark.parametrize("line", ["max_steps: true", "learning_rate: no", "logging_steps: '10'", "seed: 1.5"])
def test_a_value_that_is_no_number_is_refused(tmp_path, line):
    ((number, key, message),) = refusal(write_yaml(tmp_path, f"\n{line}"))
    assert (number, key) == (2, line.split(":")[0])
    assert message.startswith("expected a ")
    assert " number, got " in message


@pytest.mark.parametrize("value", [".nan", ".inf"])
def test_numbers_that_are_not_finite_are_refused(tmp_path, value):
    assert refusal(write_yaml(tmp_path, f"weight_decay: {value}"))[0][1] == "weight_decay"


@pytest.mark.parametrize(
    ("text", "typed", "meant"),
    [
        ("lora_r: 8", "lora_r", "lora_config.r"),
        ("lora_rank: 8", "lora_rank", "lora_config.r"),
        ("load_in_4bit: true", "load_in_4bit", "quantization_config.load_in_4bit"),
        ("use_dora: true", "use_dora", "lora_config.use_dora"),
        ("lora_config: {rank: 8}", "lora_config.rank", "lora_config.r"),
        ("lora_config: {alpha: 8}", "lora_config.alpha", "lora_config.lora_alpha"),
        ("lora_config: {learning_rate: 1}", "lora_config.learning_rate", "learning_rate"),
        ("lora_config: {load_in_8bit: true}", "lora_config.load_in_8bit", "quantization_config.load_in_8bit"),
        ("evaluation_strategy: steps", "evaluation_strategy", "eval_strategy"),
        ("max_length: 8", "max_length", "max_seq_length"),
        ("torch_dtype: auto", "torch_dtype", "dtype"),
        ("model_name: x", "model_name", "model_name_or_path"),
        ("learnin_rate: 1", "learnin_rate", "learning_rate"),
        ("Learning_Rate: 1", "Learning_Rate", "learning_rate"),
        ("max_sequence_length: 1", "max_sequence_length", "max_seq_length"),
        ("per_device_batch_size: 1", "per_device_batch_size", "per_device_train_batch_size"),
        ("datasets: [{path: a, formt: chat}]", "datasets.0.formt", "datasets.0.format"),
        ("lora_config: {eva_config: {rh: 2}, init_lora_weights: eva}", "lora_config.eva_config.rh", ""),
    ],
)
def test_an_unknown_key_comes_with_the_nearest_valid_one(tmp_path, text, typed, meant):
    meant = meant or "lora_config.eva_config.rho"
    assert hints(write_yaml(tmp_path, text)) == {typed: f"Did you mean {meant}?"}


def test_some_unknown_keys_come_with_a_hint_of_their_own(tmp_path):
    assert hints(write_yaml(tmp_path, "group_by_length: true\ndataset_text_field: body\nxyzzy: 1")) == {
        "group_by_length": "Write train_sampling_strategy: group_by_length.",
        "dataset_text_field": "Write columns: {text: YOUR_COLUMN}.",
        "xyzzy": "See `sft_main.py schema` for all keys.",
    }


def test_every_alias_leads_to_a_key():
    keys = set(list_keys(Config))
    assert {name: to for name, to in KEY_ALIASES.items() if to not in keys} == {}
    assert not set(KEY_ALIASES) & set(Config.model_fields)
    assert set(HINTS) <= set(KEY_ALIASES)
