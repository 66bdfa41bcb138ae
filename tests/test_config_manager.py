"""Writing a config so that it loads as it was, and the JSON Schema."""

from __future__ import annotations

import json
import subprocess
import sys
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from config_manager import config_text, json_schema, write_config
from sft.config.loading import load_config
from sft.config.schema import Config
from tests.config.yaml_files import write_yaml
from tests.runs import ROOT

FULL = """
model_name_or_path: some/model
train_file: [a.jsonl, 'b c.jsonl']
validation_split: 0.1
learning_rate: 2e-5
save_strategy: no
save_steps: 500
packing: false
run_name: "007"
system_prompt: "yes"
columns: {question: 'no', answer: '1e-5'}
special_tokens: {pad_token: '~', additional_special_tokens: ['<a>', '#b']}
chat_template: |
  {% for m in messages %}
  {{ m }} # not a comment
  {% endfor %}
lora_config: {r: 8, init_lora_weights: eva, eva_config: {rho: 1.5}, target_modules: [q_proj, v_proj]}
quantization_config: {load_in_4bit: true}
lr_scheduler_kwargs: {min_lr: 1e-6, name: '2024-01-01'}
hub_token: hf_secret
"""


def test_a_written_config_loads_as_an_equal_one(tmp_path):
    config = load_config(write_yaml(tmp_path, FULL), ["--max_steps=5"])
    write_config(config, tmp_path / "again.yaml")
    text = (tmp_path / "again.yaml").read_text()
    again = load_config(tmp_path / "again.yaml")
    assert again == config.model_copy(update={"hub_token": None})
    assert "hub_token" not in text
    assert "hf_secret" not in text
    assert config_text(again) == text
    assert {"max_seq_length: 2048", "max_steps: 5", "save_steps: 500", "learning_rate: 2.0e-05"} <= set(
        text.splitlines()
    )
    assert "adam_beta1" not in text


@pytest.mark.parametrize(
    ("given", "written"), [("auto", None), ("out/checkpoint-2", None), ("true", None), ("false", False)]
)
def test_the_checkpoint_that_a_run_resumed_from_is_not_written(tmp_path, given, written):
    """The file repeats the run from step 0; `false`, which stops a restarted job from resuming, is kept."""
    config = load_config(write_yaml(tmp_path, FULL), [f"--resume_from_checkpoint={given}"])
    write_config(config, tmp_path / "again.yaml")
    assert load_config(tmp_path / "again.yaml").resume_from_checkpoint is written


def test_the_default_config_is_written_with_every_key_of_ours():
    lines = config_text(Config()).splitlines()
    for line in ("max_seq_length: 2048", "output_dir: outputs", "lora_config: null", "exact_match_samples: 0"):
        assert line in lines


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=6,
)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    name=st.text(min_size=1),
    files=st.lists(st.text(min_size=1), min_size=1, max_size=3),
    rate=st.floats(min_value=0, max_value=10),
    steps=st.integers(1, 10**9),
    free=st.dictionaries(st.text(min_size=1), json_values, max_size=3),
)
def test_any_text_and_number_is_written_and_read_unchanged(tmp_path, name, files, rate, steps, free):
    values: dict[str, Any] = {
        "run_name": name,
        "train_file": files,
        "learning_rate": rate,
        "save_steps": steps,
        "lr_scheduler_kwargs": free,
    }
    config = Config.model_validate(values)
    write_config(config, tmp_path / "c.yaml")
    again = load_config(tmp_path / "c.yaml")
    assert again == config
    assert again.lr_scheduler_kwargs == free


def test_json_schema_describes_every_key():
    schema = json_schema()
    json.dumps(schema)
    assert schema["additionalProperties"] is False
    assert schema["properties"].keys() == Config.model_fields.keys()
    assert [key for key, value in schema["properties"].items() if not value.get("description")] == []
    assert schema["properties"]["truncation"]["enum"] == ["error", "drop", "left", "right", "split"]
    assert schema["properties"]["max_seq_length"]["default"] == 2048


def test_config_and_schema_import_nothing_heavy(tmp_path):
    path = write_yaml(tmp_path, "lora_config: {r: 4}\nlearning_rate: 1e-4")
    code = (
        "import sys, config_manager as c\n"
        f"c.load_config({str(path)!r}, ['lora_config.r=2']); c.json_schema()\n"
        "print(sorted({'torch', 'transformers', 'peft', 'datasets', 'accelerate', 'numpy'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
