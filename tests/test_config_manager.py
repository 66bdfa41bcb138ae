"""Loading, overriding, refusing and writing configs: exact messages, lines and values."""

from __future__ import annotations

import json
import logging
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from config_manager import config_text, json_schema, write_config
from sft.config.loading import load_config
from sft.config.schema import Config
from sft.config.validation import require_trainable
from sft.errors import UserError

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture
def config_file(tmp_path):
    def write(text: str) -> Path:
        path = tmp_path / "config.yaml"
        path.write_text(text)
        return path

    return write


def refusal(path: Path, *overrides: str) -> list[tuple[int | None, str | None, str]]:
    """(line, key, message) of every problem, in the order told."""
    with pytest.raises(UserError) as caught:
        load_config(path, overrides)
    assert caught.value.exit_code == 2
    return [(p.line, p.key, p.message) for p in caught.value.problems]


def hints(path: Path, *overrides: str) -> dict[str | None, str]:
    with pytest.raises(UserError) as caught:
        load_config(path, overrides)
    return {p.key: p.hint for p in caught.value.problems}


# Paths


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
def test_a_tilde_is_the_users_home_in_every_key_that_names_a_path(config_file, monkeypatch, key):
    """A library that expands it by itself, as transformers does with `output_dir`, then means the same folder."""
    monkeypatch.setenv("HOME", "/home/someone")
    assert getattr(load_config(config_file(f"{key}: ~/x")), key) == "/home/someone/x"
    assert getattr(load_config(config_file("seed: 1"), [f"--{key}=~/x"]), key) == "/home/someone/x"
    assert getattr(load_config(config_file(f"{key}: ./x~")), key) == "./x~"


def test_a_tilde_in_a_list_of_paths_is_the_users_home_too(config_file, monkeypatch):
    monkeypatch.setenv("HOME", "/home/someone")
    config = load_config(config_file("train_file: [~/a.jsonl, b.jsonl]\neval_datasets:\n  - path: ~/c.jsonl\n"))
    assert config.train_file == ["/home/someone/a.jsonl", "b.jsonl"]
    assert [entry.path for entry in config.eval_datasets or []] == ["/home/someone/c.jsonl"]
    scratch = "tokenizer_name_or_path: t\nfrom_scratch: ~/m.json\n"
    assert load_config(config_file(scratch)).from_scratch == "/home/someone/m.json"


# Values


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
def test_a_scalar_means_what_its_key_means(config_file, line, key, value):
    loaded = getattr(load_config(config_file(line)), key)
    assert loaded == value
    assert type(loaded) is type(value)


def test_merge_keys_and_anchors(config_file):
    config = load_config(
        config_file("datasets:\n- &first {path: a, format: chat}\n- {path: b, <<: *first}\n- {<<: *first, format: qa}")
    )
    assert config.datasets is not None
    assert [(d.path, d.format) for d in config.datasets] == [("a", "chat"), ("b", "chat"), ("a", "qa")]


# Mistakes


def test_all_mistakes_are_told_at_once_in_the_order_of_the_file(config_file):
    path = config_file(
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
        "max_steps: 3\n"
    )
    told = refusal(path, "--seed=-1", "--nonsense", "1")
    assert told == [
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


@pytest.mark.parametrize("line", ["max_steps: true", "learning_rate: no", "logging_steps: '10'", "seed: 1.5"])
def test_what_is_no_number_is_refused(config_file, line):
    ((number, key, message),) = refusal(config_file(f"\n{line}"))
    assert (number, key) == (2, line.split(":")[0])
    assert message.startswith("expected a ")
    assert " number, got " in message


@pytest.mark.parametrize("value", [".nan", ".inf"])
def test_numbers_that_are_not_finite_are_refused(config_file, value):
    assert refusal(config_file(f"weight_decay: {value}"))[0][1] == "weight_decay"


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
def test_an_unknown_key_comes_with_the_nearest_valid_one(config_file, text, typed, meant):
    meant = meant or "lora_config.eva_config.rho"
    assert hints(config_file(text)) == {typed: f"Did you mean {meant}?"}


def test_some_unknown_keys_come_with_what_to_write(config_file):
    told = hints(config_file("group_by_length: true\ndataset_text_field: body\nxyzzy: 1"))
    assert told == {
        "group_by_length": "Write train_sampling_strategy: group_by_length.",
        "dataset_text_field": "Write columns: {text: YOUR_COLUMN}.",
        "xyzzy": "See `sft_main.py schema` for all keys.",
    }


def test_every_name_used_elsewhere_leads_to_a_key():
    from sft.config.error_messages import list_keys
    from sft.config.key_aliases import HINTS, KEY_ALIASES

    keys = set(list_keys(Config))
    assert {name: to for name, to in KEY_ALIASES.items() if to not in keys} == {}
    assert not set(KEY_ALIASES) & set(Config.model_fields)
    assert set(HINTS) <= set(KEY_ALIASES)


@pytest.mark.parametrize(
    ("text", "key", "part"),
    [
        ("train_file: a\ndataset_name: b", "dataset_name", "excludes train_file (line 1)"),
        ("dataset_path: a\ndatasets: [{path: b}]", "datasets", "excludes dataset_path (line 1)"),
        ("validation_file: a\nvalidation_split: 0.1", "validation_split", "excludes validation_file (line 1)"),
        ("from_scratch: x\nmodel_name_or_path: a\ntokenizer_name_or_path: t", "model_name_or_path", "from_scratch"),
        ("from_scratch: {model_type: llama}", "from_scratch", "needs tokenizer_name_or_path"),
        ("bf16: true\nfp16: true", "fp16", "excludes bf16"),
        ("gradient_accumulation_steps: 2\nglobal_batch_size: 8", "global_batch_size", "excludes"),
        ("load_best_model_at_end: true", "load_best_model_at_end", "needs evaluation"),
        (
            "load_best_model_at_end: true\neval_strategy: epoch\nvalidation_split: 0.1",
            "load_best_model_at_end",
            "save_strategy is steps",
        ),
        (
            "load_best_model_at_end: true\neval_strategy: steps\neval_steps: 30\nsave_steps: 100\nvalidation_split: .1",
            "load_best_model_at_end",
            "save_steps (100) to be a multiple of eval_steps (30)",
        ),
        ("eval_strategy: steps", "eval_strategy", "needs validation data"),
        ("quantization_config: {}", "quantization_config", "asks for neither 4 nor 8 bits"),
        ("lora_config:", "lora_config", "the section is empty"),
        ("max_steps: 0", "max_steps", "0 would train for num_train_epochs"),
        ("logging_steps: 2.5", "logging_steps", "expected a whole number of steps, got 2.5"),
        ("report_to: [wandb, tensorbord]", "report_to", "there is no tracker 'tensorbord'"),
        ("remove_unused_columns: true", "remove_unused_columns", "must be false, got true"),
        ("lora_config: {inference_mode: true}", "lora_config.inference_mode", "must be false"),
        ("lora_config: {eva_config: {}}", "lora_config.eva_config", "only with init_lora_weights: eva"),
        ("gradient_checkpointing: true\nactivation_checkpointing: false", "gradient_checkpointing", "its new name"),
        ("dataloader_prefetch_factor: 2", "dataloader_prefetch_factor", "worker processes"),
        ("dataset_config_name: main", "dataset_config_name", "needs dataset_name"),
        ("datasets: [{path: a, weight: 2}, {path: b}]", "datasets.1", "has no weight, others have"),
        ("eval_datasets: [{path: a, weight: 2}]", "eval_datasets.0.weight", "validation data is not mixed"),
    ],
)
def test_keys_that_do_not_go_together(config_file, text, key, part):
    told = refusal(config_file(text))
    assert [(problem[1], part in problem[2]) for problem in told] == [(key, True)]


def test_four_and_eight_bits_exclude_each_other(config_file):
    path = config_file("quantization_config:\n  load_in_4bit: true\n  load_in_8bit: true")
    assert refusal(path) == [
        (3, "quantization_config.load_in_8bit", "excludes quantization_config.load_in_4bit (line 2)")
    ]


@pytest.mark.parametrize(
    "text",
    [
        "warmup_steps: 0\nwarmup_ratio: 0.1",
        "bf16: true\nfp16: false",
        "train_file: a\ndatasets: null\nvalidation_split: 0.0\nvalidation_file: v",
        "load_best_model_at_end: true\neval_strategy: steps\neval_steps: 50\nsave_steps: 100\nvalidation_split: 0.1",
        "load_best_model_at_end: true\neval_strategy: steps\neval_steps: .1\nsave_steps: .3\nvalidation_split: 0.1",
    ],
)
def test_a_key_that_is_off_excludes_nothing(config_file, text):
    assert isinstance(load_config(config_file(text)), Config)


def test_a_rule_about_a_wrong_key_waits_until_it_is_right(config_file):
    path = config_file(
        "from_scratch: x\ntokenizer_name_or_path: [t]\neval_strategy: stps\nload_best_model_at_end: true"
    )
    assert [key for _, key, _ in refusal(path)] == ["tokenizer_name_or_path", "eval_strategy"]


def test_a_secret_is_told_nowhere(config_file, caplog):
    path = config_file("hub_token: [hf_secret]")
    with caplog.at_level(logging.INFO, "sft"), pytest.raises(UserError) as caught:
        load_config(path, ["--hub_token=[hf_other]"])
    assert "hf_" not in str(caught.value) + caplog.text


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
def test_unreadable_files_name_the_line(config_file, text, line, part):
    told = refusal(config_file(text))
    assert [found for found in told if found[0] == line and part in found[2]]


def test_a_file_that_is_not_there(tmp_path):
    with pytest.raises(UserError, match=r"nowhere\.yaml: there is no such config file"):
        load_config(tmp_path / "nowhere.yaml")
    with pytest.raises(UserError, match="cannot be read"):
        load_config(tmp_path)
    (tmp_path / "binary.yaml").write_bytes(b"\xff\xfe\x00s")
    with pytest.raises(UserError, match="not UTF-8"):
        load_config(tmp_path / "binary.yaml")


def test_what_only_training_needs(config_file):
    def needs(text: str) -> list[str | None]:
        config = load_config(config_file(text))
        with pytest.raises(UserError) as caught:
            require_trainable(config)
        return [problem.key for problem in caught.value.problems]

    assert needs("seed: 1") == ["model_name_or_path", "train_file"]
    assert needs("model_name_or_path: m\ntrain_file: t\nquantization_config: {load_in_4bit: true}") == [
        "quantization_config"
    ]
    whole = "model_name_or_path: m\ntrain_file: t\nquantization_config: {load_in_8bit: on}\nlora_config: {}"
    require_trainable(load_config(config_file(whole)))


# Overrides


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
def test_overrides_in_every_spelling(config_file, words):
    config = load_config(config_file("learning_rate: 3\nlora_config: {r: 8, lora_alpha: 9}"), words)
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
def test_override_values(config_file, words, key, value):
    if value is None and "{%" in words[-1]:
        value = words[-1]
    assert getattr(load_config(config_file("output_dir: o"), words), key) == value


def test_an_override_reaches_into_a_list(config_file):
    path = config_file("datasets: [{path: a}, {path: b}]")
    config = load_config(path, ["datasets.1.max_samples=10"])
    assert config.datasets is not None
    assert [d.max_samples for d in config.datasets] == [None, 10]
    assert refusal(path, "datasets.2.path=c", "datasets.path=c", "datasets.0.path.x=c") == [
        (None, "datasets.2.path", "datasets has 2 items, counted from 0"),
        (None, "datasets.path", "datasets is a list; write datasets.0.path for its first item"),
        (None, "datasets.0.path.x", "datasets.0.path is 'a', which has no keys"),
    ]


def test_an_override_makes_a_wrong_value_right(config_file):
    config = load_config(config_file("learning_rate: fast\nlora_config:"), ["--learning_rate=1", "lora_config.r=4"])
    assert config.learning_rate == 1
    assert config.lora_config is not None
    assert config.lora_config.r == 4


def test_each_override_is_announced(config_file, caplog):
    with caplog.at_level(logging.INFO, "sft"):
        load_config(config_file("learning_rate: 3e-4"), ["--learning_rate", "1e-5", "lora_config.r=32", "run_name=x"])
    assert [record.message for record in caplog.records] == [
        "override: learning_rate = 1e-5 (was 0.0003)",
        "override: lora_config.r = 32 (was 16)",
        "override: run_name = x (was null)",
    ]


def test_words_that_are_no_override(config_file):
    told = refusal(config_file("seed: 1"), "train.jsonl", "--learning_rate", "--", "-x", "a..b=1", "--foo.bar=1")
    assert told == [
        (None, None, "'train.jsonl' is not an override"),
        (None, "learning_rate", "needs a value"),
        (None, None, "'--' is not an override"),
        (None, None, "'-x' is not an override"),
        (None, "a..b", "'a..b' is not a key"),
        (None, "foo.bar", "there is no such key"),
    ]


# Writing

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


def test_a_written_config_runs_again_unchanged(config_file, tmp_path):
    config = load_config(config_file(FULL), ["--max_steps=5"])
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
def test_what_a_run_went_on_from_is_not_written(config_file, tmp_path, given, written):
    """The file repeats the run from its start; `false`, with which no job that is started again goes on, stays."""
    write_config(load_config(config_file(FULL), [f"--resume_from_checkpoint={given}"]), tmp_path / "again.yaml")
    assert load_config(tmp_path / "again.yaml").resume_from_checkpoint is written


def test_the_default_config_is_written_whole():
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
def test_any_text_and_number_survives_writing(tmp_path, name, files, rate, steps, free):
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


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(rate=st.floats(min_value=0, max_value=10), steps=st.integers(1, 10**9), flag=st.booleans())
def test_an_override_is_as_good_as_the_file(config_file, rate, steps, flag):
    in_file = load_config(config_file(f"learning_rate: {rate!r}\nmax_steps: {steps}\nbf16: {str(flag).lower()}"))
    overridden = load_config(
        config_file("seed: 42"), [f"--learning_rate={rate!r}", "--max_steps", str(steps), f"bf16={flag}"]
    )
    assert overridden == in_file
    assert overridden.learning_rate == rate


# The schema command


def test_json_schema_describes_every_key():
    schema = json_schema()
    json.dumps(schema)
    assert schema["additionalProperties"] is False
    assert schema["properties"].keys() == Config.model_fields.keys()
    assert [key for key, value in schema["properties"].items() if not value.get("description")] == []
    assert schema["properties"]["truncation"]["enum"] == ["error", "drop", "left", "right", "split"]
    assert schema["properties"]["max_seq_length"]["default"] == 2048


def test_config_and_schema_import_nothing_heavy(config_file):
    path = config_file("lora_config: {r: 4}\nlearning_rate: 1e-4")
    code = (
        "import sys, config_manager as c\n"
        f"c.load_config({str(path)!r}, ['lora_config.r=2']); c.json_schema()\n"
        "print(sorted({'torch', 'transformers', 'peft', 'datasets', 'accelerate', 'numpy'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
