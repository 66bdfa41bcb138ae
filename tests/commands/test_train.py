"""`train`: the files of a run, its config, its end."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
from filelock import FileLock
from safetensors import safe_open

import sft_main
from sft.data.loading.sampler import EpochSampler
from sft.model.trained_models import load_trained
from tests.by_hand import rows_of
from tests.runs import log_history, losses
from trainer_utils import SFTTrainer


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


def test_the_hub_token_reaches_every_library_and_no_file(
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


def test_without_hub_token_the_one_of_the_environment_stays(config_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_of_the_environment")
    assert sft_main.main(["preview", "--config_file", str(config_file), "--json"]) == 0
    assert huggingface_hub.get_token() == "hf_of_the_environment"


def test_the_written_config_runs_again_to_the_same_losses(config_file: Path, tmp_path: Path) -> None:
    sft_main.main(["--config_file", str(config_file)])
    first = losses(tmp_path / "out")
    again = tmp_path / "again"
    assert sft_main.main(["--config_file", str(tmp_path / "out" / "config.yaml"), f"output_dir={again}"]) == 0
    assert losses(again) == first


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
def test_ctrl_c_prints_how_to_resume(
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


def test_a_second_run_archives_the_records_of_the_first(config_file: Path, tmp_path: Path) -> None:
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


def test_steps_after_the_last_log_are_logged_at_the_end(
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
