"""The commands as users type them: what they print, what they leave, and how they end."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import huggingface_hub
import pytest
import yaml
from filelock import FileLock
from safetensors import safe_open

import sft.training.run_log
import sft_main
from sft.data.loading.sampler import EpochSampler
from sft.inference import generate as replies
from sft.inference.generate import encode_prompt
from sft.model.trained import load_trained
from tests.builders import byte_level_tokenizer, tiny_llama
from tests.by_hand import rows_of
from tests.runs import ROOT, arithmetic, log_history, losses, run, write_config, write_rows
from trainer_utils import SFTTrainer


@pytest.fixture
def config_file(tmp_path: Path, model_dir: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A config of a run that takes a second or two."""
    monkeypatch.setenv("SFT_CACHE", str(tmp_path / "cache"))
    rows = write_rows(tmp_path / "train.jsonl", arithmetic(60))
    return write_config(
        tmp_path / "run.yaml",
        model_name_or_path=str(model_dir),
        dtype="float32",
        train_file=str(rows),
        validation_split=0.1,
        output_dir=str(tmp_path / "out"),
        max_seq_length=128,
        per_device_train_batch_size=4,
        learning_rate=1e-3,
        max_steps=4,
        logging_steps=1,
        lora_config={"r": 4},
    )


def test_a_run_leaves_exactly_these_files(config_file: Path, tmp_path: Path) -> None:
    assert sft_main.main(["--config_file", str(config_file), "--save_steps", "4"]) == 0
    out = tmp_path / "out"
    assert sorted(p.name for p in out.iterdir()) == [
        ".lock",
        "README.md",
        "adapter_config.json",
        "adapter_model.safetensors",
        "base_model.json",
        "chat_template.jinja",
        "checkpoint-4",
        "config.yaml",
        "generation_config.json",
        "logs",
        "tokenizer.json",
        "tokenizer_config.json",
        "trainer_state.json",
    ]
    assert sorted(p.name for p in (out / "logs").iterdir()) == [
        "data_report.json",
        "eval_results.json",
        "metrics.jsonl",
        "training_log.txt",
    ]
    logs = [json.loads(line) for line in (out / "logs" / "metrics.jsonl").read_text().splitlines()]
    assert [entry["step"] for entry in logs if "loss" in entry] == [1, 2, 3, 4]
    expected = {"loss", "perplexity", "token_accuracy", "sequence_accuracy", "grad_norm", "learning_rate"}
    assert expected | {"num_tokens", "tokens_per_second", "memory_gb"} <= set(logs[0])
    results = json.loads((out / "logs" / "eval_results.json").read_text())
    assert set(results) == {
        "eval_loss",
        "eval_perplexity",
        "eval_token_accuracy",
        "eval_sequence_accuracy",
        "eval_tokens",
        "datasets",
    }
    assert "loss" in (out / "logs" / "training_log.txt").read_text()


def test_the_token_for_the_hub_serves_every_library_and_stands_in_no_file(
    config_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_of_the_environment")
    with config_file.open("a") as file:
        file.write("hub_token: hf_of_this_run\n")
    options = ["max_steps=2", "save_steps=1", "report_to=tensorboard"]
    with caplog.at_level("DEBUG"):
        assert sft_main.main(["--config_file", str(config_file), *options]) == 0
    assert huggingface_hub.get_token() == "hf_of_this_run"
    files = [path for path in (tmp_path / "out").rglob("*") if path.is_file()]
    arguments = [path for path in files if path.name == "training_args.bin"]
    assert {path.parent.name for path in arguments} == {"checkpoint-1", "checkpoint-2"}
    assert {path.name for path in files} >= {"config.yaml", "training_log.txt", "metrics.jsonl"}
    for path in files:
        assert b"hf_of_" not in path.read_bytes(), path
    assert "hf_of_" not in caplog.text


def test_without_one_in_the_config_the_environments_token_stays(
    config_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_of_the_environment")
    assert sft_main.main(["preview", "--config_file", str(config_file), "--json"]) == 0
    assert huggingface_hub.get_token() == "hf_of_the_environment"


def test_the_written_config_runs_again_to_the_same_losses(config_file: Path, tmp_path: Path) -> None:
    sft_main.main(["--config_file", str(config_file)])
    first = losses(tmp_path / "out")
    again = tmp_path / "again"
    assert sft_main.main(["--config_file", str(tmp_path / "out" / "config.yaml"), f"output_dir={again}"]) == 0
    assert losses(again) == first


def test_the_config_of_a_run_that_went_on_repeats_it_from_its_start(config_file: Path, tmp_path: Path) -> None:
    """In the same folder: what the first one left there makes room."""
    out, common = tmp_path / "out", ["--config_file", str(config_file), "save_steps=2", "lr_scheduler_type=constant"]
    assert sft_main.main([*common, "max_steps=2"]) == 0
    assert sft_main.main([*common, "resume_from_checkpoint=auto"]) == 0
    whole = losses(out)
    assert len(whole) == 4
    assert sft_main.main(["--config_file", str(out / "config.yaml")]) == 0
    assert losses(out) == whole
    assert (out / "earlier-run-1" / "checkpoint-2").is_dir()


def test_only_adapter_weights_are_saved_and_the_model_stops_on_the_trained_token(
    config_file: Path, tmp_path: Path
) -> None:
    sft_main.main(["--config_file", str(config_file)])
    with safe_open(tmp_path / "out" / "adapter_model.safetensors", "pt") as weights:
        assert all(".lora_A." in name or ".lora_B." in name for name in weights.keys())  # noqa: SIM118
    generation = json.loads((tmp_path / "out" / "generation_config.json").read_text())
    assert generation["eos_token_id"] == [2, 0]  # <|im_end|>, then the tokenizer's own <|endoftext|>


@pytest.mark.parametrize(
    ("stopped_at", "told"),
    [(2, "; no checkpoint was written yet"), (3, "; --resume_from_checkpoint auto resumes from {out}/checkpoint-2")],
)
def test_ctrl_c_tells_where_to_go_on(
    config_file: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    stopped_at: int,
    told: str,
) -> None:
    step = SFTTrainer.training_step

    def pressed(self: SFTTrainer, *args: Any) -> Any:
        if self.state.global_step == stopped_at - 1:
            raise KeyboardInterrupt
        return step(self, *args)

    monkeypatch.setattr(SFTTrainer, "training_step", pressed)
    assert sft_main.main(["--config_file", str(config_file), "save_steps=2"]) == 130
    assert capsys.readouterr().err.splitlines()[-1] == "stopped" + told.format(out=tmp_path / "out")


def test_of_several_processes_one_tells_that_they_were_stopped(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def pressed(*_: Any) -> int:
        raise KeyboardInterrupt

    monkeypatch.setattr(sft_main, "run_verb", pressed)
    for rank, said in (("0", "stopped\n"), ("1", "")):
        monkeypatch.setenv("RANK", rank)
        assert sft_main.main([]) == 130
        assert capsys.readouterr().err == said


def test_a_second_fresh_run_leaves_the_first_ones_records(config_file: Path, tmp_path: Path) -> None:
    """One between them, which is refused for its model's sake, changes nothing of them either."""
    out = tmp_path / "out"
    records = [Path("logs") / name for name in ("metrics.jsonl", "eval_results.json", "data_report.json")]
    assert sft_main.main(["--config_file", str(config_file)]) == 0
    first = {record: (out / record).read_text() for record in records}
    other = ["--config_file", str(config_file), "validation_split=0.2", "learning_rate=1e-2"]
    assert sft_main.main([*other, "lora_config.target_modules=[nothing]"]) == 2
    assert {record: (out / record).read_text() for record in records} == first
    assert sft_main.main(other) == 0
    assert {record: (out / "earlier-run-1" / record).read_text() for record in records} == first
    second = {record: (out / record).read_text() for record in records}
    assert all(second[record] != first[record] for record in records)


def test_a_resumed_run_goes_on_exactly_where_it_stopped(config_file: Path, tmp_path: Path) -> None:
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    common = ["--config_file", str(config_file), "--max_steps=6", "--save_steps=3", "--lr_scheduler_type=constant"]
    sft_main.main([*common, f"output_dir={whole}"])
    sft_main.main([*common, f"output_dir={parts}", "--max_steps=3"])
    assert sft_main.main([*common, f"output_dir={parts}", "--resume_from_checkpoint", "auto"]) == 0
    assert losses(parts) == losses(whole)
    assert [e["num_tokens"] for e in log_history(parts)] == [e["num_tokens"] for e in log_history(whole)]
    steps = [json.loads(line)["step"] for line in (parts / "logs" / "metrics.jsonl").read_text().splitlines()]
    assert steps == sorted(steps)


@pytest.mark.parametrize(("then", "now", "dtype"), [(5.0, 0.2, "bfloat16"), (0.2, 5.0, "float32")])
def test_a_resumed_run_keeps_the_format_that_auto_had_chosen(
    config_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, then: float, now: float, dtype: str
) -> None:
    """All weights are trained; the machine is measured as slower, or faster, in bfloat16 the second time."""
    keys = yaml.safe_load(config_file.read_text())
    del keys["lora_config"]
    write_config(config_file, **keys)
    common = ["--config_file", str(config_file), "dtype=auto", "max_steps=2", "save_steps=1"]
    monkeypatch.setattr("sft.distributed.cpu.bf16_speedup", lambda: then)
    assert sft_main.main([*common, f"output_dir={tmp_path / 'whole'}"]) == 0
    monkeypatch.setattr("sft.distributed.cpu.bf16_speedup", lambda: now)
    again, first = tmp_path / "again", tmp_path / "whole" / "checkpoint-1"
    assert sft_main.main([*common, f"output_dir={again}", f"resume_from_checkpoint={first}"]) == 0
    assert losses(again) == losses(tmp_path / "whole")
    assert json.loads((again / "checkpoint-2" / "run_shape.json").read_text())["dtype"] == dtype


def test_the_speed_behind_a_resume_is_that_of_the_tokens_since_then(
    config_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first log has the loss of steps 1 to 4, of which three came with the checkpoint. A step takes 2 seconds."""
    seconds, step = [0.0], SFTTrainer.training_step

    def two_seconds(self: SFTTrainer, *args: Any) -> Any:
        seconds[0] += 2
        return step(self, *args)

    for module in (sft.training.run_log,):
        monkeypatch.setattr(module, "time", SimpleNamespace(perf_counter=lambda: seconds[0]))
    monkeypatch.setattr(SFTTrainer, "training_step", two_seconds)
    whole, again = tmp_path / "whole", tmp_path / "again"
    common = ["--config_file", str(config_file), "max_steps=6", "logging_steps=4", "save_steps=3"]
    assert sft_main.main([*common, f"output_dir={whole}"]) == 0
    assert sft_main.main([*common, f"output_dir={again}", f"resume_from_checkpoint={whole / 'checkpoint-3'}"]) == 0
    rows, order = rows_of(whole).train, EpochSampler(54, 0, seed=42).order()
    tokens = [sum(len(rows[int(i)]["input_ids"]) for i in order[at : at + 4]) for at in range(0, 24, 4)]
    assert [e["tokens_per_second"] for e in log_history(whole)] == [sum(tokens[:4]) / 8, sum(tokens[4:]) / 4]
    assert [e["tokens_per_second"] for e in log_history(again)] == [tokens[3] / 2, sum(tokens[4:]) / 4]
    for name in ("loss", "num_tokens"):
        assert [e[name] for e in log_history(again)] == [e[name] for e in log_history(whole)]


def test_a_resume_that_does_not_fit_its_checkpoint_is_refused(
    config_file: Path, model_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    common = ["--config_file", str(config_file), "--save_steps=2"]
    sft_main.main(common)
    resume = [*common, "--max_steps=6", "--resume_from_checkpoint=auto"]
    copy = shutil.copytree(model_dir, tmp_path / "copy")
    other = write_rows(tmp_path / "other.jsonl", arithmetic(60, start=500))
    for override, name in [
        ("per_device_train_batch_size=2", "per_device_train_batch_size"),
        ("lora_config.r=8", "adapter"),
        (f"train_file={other}", "row_lengths"),
        ("lora_config.modules_to_save=[lm_head]", "lora_config.modules_to_save"),
        (f"model_name_or_path={copy}", "model_name_or_path"),
    ]:
        capsys.readouterr()
        assert sft_main.main([*resume, override]) == 2
        assert name in capsys.readouterr().err
    out = tmp_path / "out"
    older = f"resume_from_checkpoint={out / 'checkpoint-2'}"
    assert sft_main.main([*resume, older, "lora_config.r=8"]) == 2
    assert not (out / "earlier-run-1").exists(), "a run that is refused moves nothing"
    assert sft_main.main([*resume, older]) == 0
    assert (out / "earlier-run-1" / "checkpoint-4").is_dir(), "of the branch that was left"
    assert sorted(p.name for p in out.glob("checkpoint-*")) == ["checkpoint-2", "checkpoint-4", "checkpoint-6"]


def test_resuming_a_finished_run_trains_no_further(config_file: Path, tmp_path: Path) -> None:
    common = ["--config_file", str(config_file), "--save_steps=4"]
    sft_main.main(common)
    before = (tmp_path / "out" / "adapter_model.safetensors").read_bytes()
    assert sft_main.main([*common, "--resume_from_checkpoint=auto"]) == 0
    assert (tmp_path / "out" / "adapter_model.safetensors").read_bytes() == before
    assert len(losses(tmp_path / "out")) == 4


def test_a_resumed_run_follows_the_configs_intervals(config_file: Path, tmp_path: Path) -> None:
    common = ["--config_file", str(config_file), "--resume_from_checkpoint=auto"]
    sft_main.main([*common, "--save_steps=2"])
    sft_main.main([*common, "--max_steps=8", "--save_steps=3", "--logging_steps=4"])
    out = tmp_path / "out"
    assert {p.name for p in out.glob("checkpoint-*")} == {
        "checkpoint-2",
        "checkpoint-4",
        "checkpoint-6",
        "checkpoint-8",
    }
    assert [e["step"] for e in log_history(out)] == [1, 2, 3, 4, 8]


def test_steps_behind_the_last_log_are_logged_at_the_end(
    config_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Their loss is that of the four steps by their tokens, on the console, in the files and in the checkpoint."""
    each, whole, none = tmp_path / "each", tmp_path / "whole", tmp_path / "none"
    common = ["--config_file", str(config_file), "save_strategy=no"]
    assert sft_main.main([*common, f"output_dir={each}", "logging_steps=3"]) == 0
    assert [entry["step"] for entry in log_history(each)] == [3, 4]
    capsys.readouterr()
    assert sft_main.main([*common, f"output_dir={whole}", "logging_steps=10", "save_strategy=steps"]) == 0
    said = capsys.readouterr().err
    (log,) = log_history(whole)
    assert log["step"] == 4
    rows, order = rows_of(whole).train, EpochSampler(54, 0, seed=42).order()
    trained = [sum(int((rows[int(i)]["labels"] != -100).sum()) for i in order[a:b]) for a, b in ((0, 12), (12, 16))]
    weighted = sum(loss * tokens for loss, tokens in zip(losses(each), trained, strict=True)) / sum(trained)
    assert log["loss"] == pytest.approx(weighted, rel=1e-6)
    assert f"loss {log['loss']:.4f}" in said
    assert "train_loss" in said.partition(f"loss {log['loss']:.4f}")[2], "the conclusion comes behind it"
    assert log_history(whole / "checkpoint-4") == [log]
    lines = [json.loads(line) for line in (whole / "logs" / "metrics.jsonl").read_text().splitlines()]
    assert [(entry["step"], entry["loss"]) for entry in lines if "loss" in entry] == [(4, log["loss"])]

    assert sft_main.main([*common, f"output_dir={none}", "logging_strategy=no"]) == 0
    assert log_history(none) == []
    seen = [json.loads((out / "trainer_state.json").read_text())["num_input_tokens_seen"] for out in (each, none)]
    assert seen == [log["num_tokens"]] * 2 == [sum(len(rows[int(i)]["input_ids"]) for i in order[:16])] * 2


def test_two_runs_in_one_folder_are_refused(
    config_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "out").mkdir()
    with FileLock(tmp_path / "out" / ".lock"):
        assert sft_main.main(["--config_file", str(config_file)]) == 2
    assert "another run" in capsys.readouterr().err


def test_a_run_without_an_adapter_trains_every_weight_and_leaves_a_whole_model_where_an_adapter_was(
    config_file: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    assert sft_main.main(["--config_file", str(config_file), "max_steps=1"]) == 0
    assert sft_main.main(["--config_file", str(config_file), "lora_config=null"]) == 0
    assert (out / "model.safetensors").is_file()
    assert not (out / "adapter_config.json").exists()
    whole, earlier = (load_trained(folder)[0] for folder in (out, out / "earlier-run-1"))
    assert not hasattr(whole, "peft_config")
    assert hasattr(earlier, "peft_config")
    assert sft_main.main(["--config_file", str(config_file), f"model_name_or_path={out}"]) == 2
    assert (out / "model.safetensors").is_file()


def test_preview_prints_one_json_document(config_file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert sft_main.main(["preview", "--config_file", str(config_file), "--num_samples", "3", "--json"]) == 0
    samples = json.loads(capsys.readouterr().out)["samples"]
    assert [s["row"] for s in samples] == [0, 1, 2]
    first = samples[0]
    assert first["trained_text"] == "It is 0.<|im_end|>"
    assert len(first["labels"]) == len(first["input_ids"])
    assert [i for i in first["labels"] if i != -100] == [
        i for i, label in zip(first["input_ids"], first["labels"], strict=True) if label != -100
    ]
    assert first["messages"][0] == {"role": "user", "content": "What is 0 and 0?"}


def test_check_accepts_a_good_config(config_file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert sft_main.main(["check", "--config_file", str(config_file), "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert (report["ok"], report["errors"]) == (True, [])
    assert report["data"]["total"]["rows_read"] == 60
    assert report["estimate"]["total_steps"] == 4
    assert report["serving"]["ok"]
    assert report["serving"]["end_tokens"] == ["<|im_end|>"]
    assert report["serving"]["prompts"] > 0


def test_check_names_every_mistake_at_once(
    config_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    overrides = ["model_name_or_path=nowhere/at/all", f"train_file={tmp_path / 'gone.jsonl'}", "num_gpus=64"]
    assert sft_main.main(["check", "--config_file", str(config_file), "--json", *overrides]) == 2
    report = json.loads(capsys.readouterr().out)
    keys = {error.get("key") for error in report["errors"]}
    assert {"model_name_or_path", "num_gpus"} <= keys
    assert not report["ok"]


@pytest.mark.parametrize("verb", ["check", "train", "estimate", "evaluate"])
def test_tf32_without_such_units_is_a_mistake(
    config_file: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, verb: str
) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    arguments = [verb, "--config_file", str(config_file), "tf32=true", "num_gpus=0"]
    assert sft_main.main(arguments) == 2
    told = capsys.readouterr()
    assert "tf32: needs a GPU of NVIDIA's Ampere or a later kind" in " ".join((told.out + told.err).split())


def test_evaluate_gives_the_run_its_own_numbers_again(
    config_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    sft_main.main(["--config_file", str(config_file)])
    capsys.readouterr()
    assert sft_main.main(["evaluate", "--config_file", str(config_file), "--json"]) == 0
    results = json.loads(capsys.readouterr().out)
    saved = json.loads((tmp_path / "out" / "logs" / "eval_results.json").read_text())
    assert results["eval_loss"] == pytest.approx(saved["eval_loss"], abs=1e-6)
    assert results["eval_tokens"] == saved["eval_tokens"]
    assert results["datasets"]["validation"]["eval_tokens"] == saved["eval_tokens"]


def test_what_is_evaluated_is_said_and_that_it_is_not_what_the_config_trains(
    config_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    sft_main.main(["--config_file", str(config_file), "max_steps=1"])
    capsys.readouterr()
    assert sft_main.main(["evaluate", "--config_file", str(config_file)]) == 0
    said = capsys.readouterr().err
    assert f"Measuring the adapter in {tmp_path / 'out'}" in " ".join(said.split())
    assert "something else" not in said
    assert sft_main.main(["evaluate", "--config_file", str(config_file), "lora_config=null"]) == 0
    assert "The config trains a whole model, and output_dir holds something else" in " ".join(
        capsys.readouterr().err.split()
    )


def test_a_folder_that_takes_no_files_is_told_before_anything_is_read(
    config_file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Of /proc, where even root, who may do everything, can make nothing."""
    for verb in (["check"], []):
        assert sft_main.main([*verb, "--config_file", str(config_file), "output_dir=/proc/none/here"]) == 2
        said = " ".join("".join(capsys.readouterr()).split())
        assert "cannot write to '/proc'" in said
        assert "name another folder" in said


def test_a_base_is_evaluated_behind_the_prompts_that_training_on_it_makes(
    config_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A base as it comes: no pad token, no template, and without the token that the config adds."""
    tokenizer = byte_level_tokenizer(chat_template=None, pad=False)
    tiny_llama(len(tokenizer)).save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    keys = [f"model_name_or_path={tmp_path / 'base'}", "chat_template=chatml", "special_tokens=[<|new|>]"]
    keys += ["lora_config=null", "max_steps=1", "learning_rate=0", "dtype=float32"]
    assert sft_main.main(["--config_file", str(config_file), *keys]) == 0
    saved = json.loads((tmp_path / "out" / "logs" / "eval_results.json").read_text())
    capsys.readouterr()
    evaluate = ["evaluate", "--config_file", str(config_file), "--model", str(tmp_path / "base"), "--json"]
    assert sft_main.main([*evaluate, *keys]) == 0
    results = json.loads(capsys.readouterr().out)
    assert results["eval_loss"] == pytest.approx(saved["eval_loss"], abs=1e-6)
    assert results["eval_tokens"] == saved["eval_tokens"]


def test_merge_then_evaluate_gives_the_adapters_numbers(
    config_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    sft_main.main(["--config_file", str(config_file)])
    merged = tmp_path / "merged"
    assert sft_main.main(["merge", "--model", str(tmp_path / "out"), "--output_dir", str(merged)]) == 0
    capsys.readouterr()
    sft_main.main(["evaluate", "--config_file", str(config_file), "--model", str(merged), "--json"])
    results = json.loads(capsys.readouterr().out)
    saved = json.loads((tmp_path / "out" / "logs" / "eval_results.json").read_text())
    assert results["eval_loss"] == pytest.approx(saved["eval_loss"], abs=1e-4)


def test_a_training_file_is_asked_behind_the_tokens_that_were_trained(
    config_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    rows: list[dict[str, Any]] = [
        {"instruction": "Who is he?", "context": "Bob is a cat.", "response": "Bob"},
        {"instruction": "And now?", "history": [["Hi", "Hello"]], "output": "Now"},
        {"question": "Who?", "context": "Bob is a cat.", "answer": "Bob"},
        {"conversations": [{"from": "human", "value": "g"}, {"from": "gpt", "value": "h"}]},
    ]
    file = write_rows(tmp_path / "mixed.jsonl", rows)
    keys = [f"train_file={file}", "validation_split=0", "system_prompt=Be brief.", "train_on=last_assistant"]
    command = ["--config_file", str(config_file), *keys]
    assert sft_main.main([*command, "--save_steps=4"]) == 0
    capsys.readouterr()
    assert sft_main.main(["preview", *command, "--num_samples=4", "--json"]) == 0
    samples = json.loads(capsys.readouterr().out)["samples"]
    trained = [s["input_ids"][: next(i for i, label in enumerate(s["labels"]) if label >= 0)] for s in samples]
    assert all("Be brief." in sample["rendered"] for sample in samples)

    asked: list[list[int]] = []

    def overheard(*arguments: Any) -> list[int]:
        asked.append(encode_prompt(*arguments))
        return asked[-1]

    monkeypatch.setattr(replies, "encode_prompt", overheard)
    out, merged = tmp_path / "out", tmp_path / "merged"
    assert sft_main.main(["merge", "--model", str(out), "--output_dir", str(merged)]) == 0
    for folder in (out, out / "checkpoint-4", merged):
        asked.clear()
        generate = ["generate", "--model", str(folder), "--prompts", str(file), "--max_new_tokens=1"]
        assert sft_main.main(generate) == 0
        assert asked == trained
    assert sft_main.main([*generate, "--system", ""]) == 0
    assert len(asked[-1]) < len(trained[-1])


def test_a_model_with_its_own_code_is_asked_and_merged_by_those_who_trust_it(
    config_file: Path, model_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.syspath_prepend(tmp_path / "modules")
    own = tmp_path / "own"
    shutil.copytree(model_dir, own)
    (own / "modeling_own.py").write_text(
        "from transformers import LlamaConfig, LlamaForCausalLM\n\n\n"
        "class OwnConfig(LlamaConfig):\n    model_type = 'own'\n\n\n"
        "class OwnForCausalLM(LlamaForCausalLM):\n    config_class = OwnConfig\n"
    )
    config = json.loads((own / "config.json").read_text())
    names = {"AutoConfig": "modeling_own.OwnConfig", "AutoModelForCausalLM": "modeling_own.OwnForCausalLM"}
    (own / "config.json").write_text(json.dumps(config | {"model_type": "own", "auto_map": names}))
    out, merged, prompts = tmp_path / "out", tmp_path / "merged", tmp_path / "p.txt"
    prompts.write_text("x\n")
    train = ["--config_file", str(config_file), f"model_name_or_path={own}"]
    merge = ["merge", "--model", str(out), "--output_dir", str(merged)]
    assert sft_main.main(train) == 2
    for command in (
        [*train, "--trust_remote_code=true"],
        ["generate", "--model", str(out), "--prompts", str(prompts), "--max_new_tokens=1"],
        merge,
        ["generate", "--model", str(merged), "--prompts", str(prompts), "--max_new_tokens=1"],
    ):
        if command[0] in ("generate", "merge"):
            assert sft_main.main(command) == 2
            command.append("--trust_remote_code")
        assert sft_main.main(command) == 0


def test_generate_answers_a_file(config_file: Path, tmp_path: Path) -> None:
    sft_main.main(["--config_file", str(config_file)])
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("What is 1 and 7?\nWhat is 2 and 14?\n")
    answers = tmp_path / "answers.jsonl"
    arguments = ["generate", "--model", str(tmp_path / "out"), "--prompts", str(prompts), "--output", str(answers)]
    assert sft_main.main([*arguments, "--max_new_tokens", "5"]) == 0
    rows = [json.loads(line) for line in answers.read_text().splitlines()]
    assert [row["prompt"] for row in rows] == ["What is 1 and 7?", "What is 2 and 14?"]
    assert all(isinstance(row["response"], str) for row in rows)


BAD_INPUT = {
    "a missing data file": (["train_file=gone.jsonl"], "gone.jsonl"),
    "an empty data file": (["train_file={empty}"], "is empty"),
    "a folder without data": (["train_file={folder}"], "holds no data file"),
    "a model that does not exist": (["model_name_or_path=no/such/model"], "no/such/model"),
    "an unknown format": (["format=alpacca"], "alpaca"),
    "a file of an unknown kind": (["train_file={strange}"], "cannot tell the format"),
    "a resume from nowhere": (["resume_from_checkpoint=no/such/checkpoint"], "no such checkpoint"),
    "an output folder that is a file": (["output_dir={empty}"], "is a file"),
    "an unknown kind of row order": (["train_sampling_strategy=sideways"], "train_sampling_strategy"),
    "more GPUs than there are": (["num_gpus=64"], "64"),
    "an unknown key": (["learning_rat=1e-4"], "learning_rate"),
    "a wrong type": (["max_steps=many"], "max_steps"),
}


@pytest.mark.parametrize("mistake", BAD_INPUT)
def test_a_mistake_ends_with_a_message_and_exit_code_2(
    config_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], mistake: str
) -> None:
    (tmp_path / "empty.jsonl").touch()
    (tmp_path / "folder").mkdir()
    (tmp_path / "data.strange").write_text("?")
    overrides, expected = BAD_INPUT[mistake]
    places = {
        "empty": tmp_path / "empty.jsonl",
        "folder": tmp_path / "folder",
        "strange": tmp_path / "data.strange",
    }
    filled = [override.format(**places) for override in overrides]
    assert sft_main.main(["--config_file", str(config_file), *filled]) == 2
    printed = capsys.readouterr().err
    assert expected in printed
    assert "Traceback" not in printed


def test_unreadable_yaml_is_named_with_its_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    broken = tmp_path / "broken.yaml"
    broken.write_text("train_file: a.jsonl\nlora_config: {r: 8\n")
    assert sft_main.main(["--config_file", str(broken)]) == 2
    assert "broken.yaml:" in capsys.readouterr().err


def test_no_config_file_is_a_mistake_too(capsys: pytest.CaptureFixture[str]) -> None:
    assert sft_main.main([]) == 2
    assert "--config_file" in capsys.readouterr().err


@pytest.mark.parametrize("arguments", [["--help"], ["schema"], ["--config_file", "gone.yaml"]])
def test_quick_answers_import_nothing_heavy(arguments: list[str]) -> None:
    code = (
        "import sys, sft_main\n"
        "try: sft_main.main(sys.argv[1:])\n"
        "except SystemExit: pass\n"
        "print(sorted({'torch', 'transformers', 'datasets', 'peft', 'numpy'} & set(sys.modules)), file=sys.stderr)"
    )
    done = subprocess.run([sys.executable, "-c", code, *arguments], cwd=ROOT, capture_output=True, text=True)
    assert done.stderr.splitlines()[-1] == "[]"


def test_the_schema_is_json_schema(capsys: pytest.CaptureFixture[str]) -> None:
    assert sft_main.main(["schema"]) == 0
    schema = json.loads(capsys.readouterr().out)
    assert schema["properties"]["learning_rate"]["default"] == 5e-5
    assert "lora_config" in schema["properties"]


@pytest.mark.slow
def test_chat_reads_from_a_pipe_and_ends_with_its_input(config_file: Path, tmp_path: Path) -> None:
    sft_main.main(["--config_file", str(config_file)])
    command = [sys.executable, "sft_main.py", "generate", "--model", str(tmp_path / "out"), "--chat"]
    done = subprocess.run(
        [*command, "--max_new_tokens", "4"], cwd=ROOT, input="Hello\n/quit\n", capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.slow
def test_json_output_is_alone_on_stdout(config_file: Path) -> None:
    done = run("check", "--config_file", config_file, "--json")
    assert done.returncode == 0
    assert json.loads(done.stdout)["ok"] is True
