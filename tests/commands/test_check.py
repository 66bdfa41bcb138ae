"""`check` and `preview`: what they print before anything is trained."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

import sft_main
from tests.runs import run


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
def test_tf32_without_hardware_for_it_is_a_mistake(
    config_file: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, verb: str
) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    arguments = [verb, "--config_file", str(config_file), "tf32=true", "num_gpus=0"]
    assert sft_main.main(arguments) == 2
    told = capsys.readouterr()
    assert "tf32: needs a GPU of NVIDIA's Ampere or a later kind" in " ".join((told.out + told.err).split())


def test_an_unwritable_output_dir_is_reported_before_anything_is_read(
    config_file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Of /proc, where even root, who may do everything, can make nothing."""
    for verb in (["check"], []):
        assert sft_main.main([*verb, "--config_file", str(config_file), "output_dir=/proc/none/here"]) == 2
        said = " ".join("".join(capsys.readouterr()).split())
        assert "cannot write to '/proc'" in said
        assert "name another folder" in said


@pytest.mark.slow
def test_json_output_is_alone_on_stdout(config_file: Path) -> None:
    done = run("check", "--config_file", config_file, "--json")
    assert done.returncode == 0
    assert json.loads(done.stdout)["ok"] is True
