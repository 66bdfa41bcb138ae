"""Mistakes of the user end with a message and exit code 2."""

from __future__ import annotations

from pathlib import Path

import pytest

import sft_main

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
