"""`train` with `resume_from_checkpoint`: the same run, or a refusal."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml

import sft.training.run_log
import sft_main
from sft.data.loading.sampler import EpochSampler
from tests.by_hand import rows_of
from tests.runs import arithmetic, log_history, losses, write_config, write_rows
from trainer_utils import SFTTrainer


def test_the_config_of_a_resumed_run_repeats_it_from_its_start(config_file: Path, tmp_path: Path) -> None:
    """In the same folder: what the first one left there makes room."""
    out, common = tmp_path / "out", ["--config_file", str(config_file), "save_steps=2", "lr_scheduler_type=constant"]
    assert sft_main.main([*common, "max_steps=2"]) == 0
    assert sft_main.main([*common, "resume_from_checkpoint=auto"]) == 0
    whole = losses(out)
    assert len(whole) == 4
    assert sft_main.main(["--config_file", str(out / "config.yaml")]) == 0
    assert losses(out) == whole
    assert (out / "earlier-run-1" / "checkpoint-2").is_dir()


def test_a_resumed_run_is_the_run_that_never_stopped(config_file: Path, tmp_path: Path) -> None:
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
def test_a_resumed_run_keeps_the_dtype_that_auto_had_chosen(
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


def test_tokens_per_second_after_a_resume_count_new_tokens_only(
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
