"""`per_device_train_batch_size: auto` in real runs: chosen, logged, kept by a resume, and reduced without memory."""

from __future__ import annotations

import json
import re
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from datasets import Dataset

import sft_main
from sft.config.schema import TrainingKeys
from sft.data.loading.collator import Collator
from sft.estimate import batch_size_probe
from sft.loss.token_loss import LossSettings
from sft.model.precision import Precision
from tests.builders import tiny_llama
from tests.runs import arithmetic, losses, run, write_config, write_rows


@pytest.fixture
def config_file(tmp_path: Path, model_dir: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("SFT_CACHE", str(tmp_path / "cache"))
    rows = write_rows(tmp_path / "train.jsonl", arithmetic(60))
    return write_config(
        tmp_path / "run.yaml",
        model_name_or_path=str(model_dir),
        dtype="float32",
        train_file=str(rows),
        output_dir=str(tmp_path / "out"),
        max_seq_length=128,
        per_device_train_batch_size="auto",
        global_batch_size=8,
        learning_rate=1e-3,
        max_steps=4,
        logging_steps=1,
        save_steps=2,
        packing=False,
        lora_config={"r": 4, "lora_dropout": 0.3},
    )


def chosen(stderr: str) -> int:
    found = re.search(r"per_device_train_batch_size: auto is (\d+)", stderr)
    assert found, stderr
    return int(found[1])


def test_a_run_is_that_of_the_number_it_chose(
    config_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """To the last bit, with dropout, whose random numbers the probes must not advance."""
    assert sft_main.main(["--config_file", str(config_file)]) == 0
    said = capsys.readouterr().err
    rows = chosen(said)
    assert 8 % rows == 0
    assert "1 sequences per micro-batch: " in said
    sizes = f"{rows} sequences per micro-batch × {8 // rows} accumulation steps × 1 processes"
    assert f"{sizes} = 8 sequences per step" in said
    curve = losses(tmp_path / "out")
    again = ["--output_dir", str(tmp_path / "given"), "--per_device_train_batch_size", str(rows)]
    assert sft_main.main(["--config_file", str(config_file), *again]) == 0
    assert losses(tmp_path / "given") == curve
    assert len(curve) == 4


def test_a_resumed_run_keeps_the_number(config_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    sft_main.main(["--config_file", str(config_file)])
    rows = chosen(capsys.readouterr().err)
    checkpoint = tmp_path / "out" / "checkpoint-2"
    again = ["--resume_from_checkpoint", str(checkpoint), "--output_dir", str(tmp_path / "resumed")]
    assert sft_main.main(["--config_file", str(config_file), *again]) == 0
    said = capsys.readouterr().err
    assert chosen(said) == rows
    assert "as in" in said
    assert losses(tmp_path / "resumed")[-2:] == losses(tmp_path / "out")[-2:]


def test_the_head_is_searched_on_the_device_where_the_model_trains(monkeypatch: pytest.MonkeyPatch) -> None:
    """Attention that only a GPU has would fail in main memory, and the head would not be fused."""

    class HeadFoundError(Exception):
        pass

    def forward(model: Any, *_: Any) -> Any:
        raise HeadFoundError(model.device.type)

    monkeypatch.setattr(batch_size_probe, "training_device", lambda: torch.device("meta"))
    monkeypatch.setattr(batch_size_probe, "TokenForward", forward)
    rows = Dataset.from_dict({"input_ids": [[1, 2, 3]] * 4, "labels": [[1, 2, 3]] * 4})
    options: dict[str, Any] = {"world_size": 1, "local_world_size": 1}
    given: list[Any] = [rows, TrainingKeys(), Collator(0), LossSettings(), Precision("float32", False, False, "")]
    with pytest.raises(HeadFoundError, match="meta"):
        batch_size_probe.probe_batch_size(tiny_llama(9), *given, **options)
    quantized: Any = tiny_llama(9)
    quantized.is_quantized = True  # bitsandbytes has moved it to its device already, and it cannot move
    with pytest.raises(HeadFoundError, match="cpu"):
        batch_size_probe.probe_batch_size(quantized, *given, **options)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["--streaming", "true"], "auto needs all rows at once"),
        (["--per_device_train_batch_size", "most"], "per_device_train_batch_size"),
        (["--auto_batch_memory_fraction", "0.000001"], "of the longest samples brings the process to"),
    ],
)
def test_settings_that_contradict_auto_are_errors(
    config_file: Path, capsys: pytest.CaptureFixture[str], overrides: list[str], message: str
) -> None:
    assert sft_main.main(["--config_file", str(config_file), *overrides]) == 2
    assert message in capsys.readouterr().err


@pytest.mark.slow
def test_all_ranks_take_the_same_number(config_file: Path, tmp_path: Path) -> None:
    done = run("--config_file", config_file, processes=2)
    assert done.returncode == 0, done.stderr[-3000:]
    rows = chosen(done.stderr)
    again = ["--output_dir", str(tmp_path / "given"), "--per_device_train_batch_size", str(rows)]
    assert run("--config_file", config_file, *again, processes=2).returncode == 0
    assert losses(tmp_path / "out") == losses(tmp_path / "given")


# Running out of memory all the same

RUN = """
import os, sys
import sft.estimate.batch_size_probe
import distributed_utils
import sft_main
import torch
import trainer_utils
from sft.loss.forward import TokenForward
from transformers import TrainerCallback

size = 8 // int(os.environ.get("WORLD_SIZE", "1"))
fitting = float(sys.argv.pop(1)) * size  # sequences of which the first rank has the memory, from the fourth step on
sft.estimate.batch_size_probe.probe_batch_size = lambda *args, **options: size
is_limited = False

def limited_forward(self, model, inputs, *args, **options):
    sums = forward(self, model, inputs, *args, **options)
    if is_limited and model.training and len(inputs["input_ids"]) > fitting:
        torch.empty(2**50, dtype=torch.uint8)  # more than an address space has: torch's own error
    return sums

class Limit(TrainerCallback):
    def on_step_begin(self, args, state, control, **options):
        global is_limited
        is_limited = state.global_step >= 3 and os.environ.get("RANK", "0") == "0"

forward, TokenForward.__call__ = TokenForward.__call__, limited_forward
make = trainer_utils.SFTTrainer.__init__

def with_limit(self, *args, **options):
    make(self, *args, **options)
    self.add_callback(Limit())

trainer_utils.SFTTrainer.__init__ = with_limit
distributed_utils.end_process(sft_main.main(sys.argv[1:]))
"""


@pytest.fixture
def padded_config(config_file: Path) -> Path:
    """Trains all weights, with a sequence in each row of a batch."""
    keys: dict[str, Any] = yaml.safe_load(config_file.read_text())
    keys |= {"global_batch_size": 16, "max_steps": 6, "train_on": "all", "attn_implementation": "eager"}
    return write_config(config_file, **{name: value for name, value in keys.items() if name != "lora_config"})


def trained(config: Path, output_dir: Path, share: float, processes: int = 0) -> subprocess.CompletedProcess:
    """Runs the config; from step 4 on the first rank's memory is enough for `share` of its micro-batch."""
    script = output_dir.with_suffix(".py")
    script.write_text(RUN)
    arguments: list[str | Path] = [str(share), "--config_file", config, "--output_dir", output_dir]
    return run(*arguments, processes=processes, env={"OMP_NUM_THREADS": "1"}, script=script)


@pytest.mark.slow
def test_a_run_out_of_memory_continues_in_halves_with_the_same_losses(padded_config: Path, tmp_path: Path) -> None:
    free, limited = (trained(padded_config, tmp_path / name, share) for name, share in (("free", 1), ("limited", 0.6)))
    assert free.returncode == limited.returncode == 0, limited.stderr[-3000:]
    assert "is run again in micro-batches of 1/2 of the samples" in limited.stderr
    assert "is run again" not in free.stderr
    curve = losses(tmp_path / "free")
    assert len(curve) == 6
    assert losses(tmp_path / "limited") == pytest.approx(curve, abs=1e-5)
    counts = [
        [
            entry["num_tokens"]
            for entry in json.loads((tmp_path / name / "trainer_state.json").read_text())["log_history"]
            if "num_tokens" in entry
        ]
        for name in ("free", "limited")
    ]
    assert counts[0] == counts[1], "a pass that was made again was counted twice"


@pytest.mark.slow
def test_one_rank_out_of_memory_changes_nothing_for_the_others(padded_config: Path, tmp_path: Path) -> None:
    shares = (("free", 1), ("limited", 0.8))
    free, limited = (trained(padded_config, tmp_path / name, share, 2) for name, share in shares)
    assert free.returncode == limited.returncode == 0, limited.stderr[-3000:]
    assert limited.stderr.count("is run again in micro-batches of 1/2 of the samples") == 1
    assert "is run again" not in free.stderr
    curve = losses(tmp_path / "free")
    assert len(curve) == 6
    assert losses(tmp_path / "limited") == pytest.approx(curve, abs=1e-5)


@pytest.mark.slow
def test_a_single_row_that_does_not_fit_stops_the_run(padded_config: Path, tmp_path: Path) -> None:
    done = trained(padded_config, tmp_path / "out", 0.08)
    assert done.returncode == 3, done.stderr[-3000:]
    assert "memory runs out on a micro-batch of a single sample" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.slow
def test_a_rank_whose_single_row_does_not_fit_asks_nothing_of_the_others(padded_config: Path, tmp_path: Path) -> None:
    """They wait for its gradients, so it cannot gather their counts since the last log."""
    keys: dict[str, Any] = yaml.safe_load(padded_config.read_text())
    done = trained(write_config(padded_config, **(keys | {"logging_steps": 10})), tmp_path / "out", 0.08, 2)
    assert "memory runs out on a micro-batch of a single sample" in done.stderr
    assert "exitcode  : 3" in done.stderr, done.stderr[-3000:]
    state = json.loads((tmp_path / "out" / "trainer_state.json").read_text())
    assert (state["global_step"], state["log_history"]) == (3, [])
