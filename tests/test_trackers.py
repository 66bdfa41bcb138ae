"""What the trackers received, read back from what they wrote: TensorBoard's events, W&B's offline run."""

from __future__ import annotations

import json
import struct
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.runs import arithmetic, log_history, run, write_config, write_rows

METRICS = ("loss", "perplexity", "token_accuracy", "sequence_accuracy", "learning_rate", "grad_norm", "num_tokens")


@pytest.fixture(scope="module")
def tracked(tmp_path_factory: pytest.TempPathFactory, model_dir: Path) -> Path:
    """One run that reports to both; the folder it ran in."""
    folder = tmp_path_factory.mktemp("tracked")
    config_file = write_config(
        folder / "run.yaml",
        model_name_or_path=str(model_dir),
        train_file=str(write_rows(folder / "train.jsonl", arithmetic(40))),
        validation_split=0.2,
        cache_dir=str(folder / "cache"),
        output_dir=str(folder / "out"),
        per_device_train_batch_size=4,
        max_steps=4,
        logging_steps=1,
        eval_strategy="steps",
        eval_steps=2,
        save_strategy="no",
        report_to=["tensorboard", "wandb"],
        run_name="tracked",
        wandb_project="sft-tests",
    )
    done = run("--config_file", config_file, env={"WANDB_MODE": "offline", "WANDB_DIR": str(folder)})
    assert done.returncode == 0, done.stderr[-3000:]
    return folder


def wandb_records(content: bytes) -> Iterator[bytes]:
    """The records of an offline run: LevelDB's log format behind a header of 7 bytes.

    Blocks of 32 KiB hold chunks: checksum (4 bytes), length (2), kind (1: whole, 2: first, 3: middle, 4: last), data.
    """
    assert content[:4] == b":W&B"
    position, record = 7, b""
    while position + 7 <= len(content):
        left_in_block = 32768 - position % 32768
        if left_in_block < 7:
            position += left_in_block
            continue
        length, kind = struct.unpack_from("<HB", content, position + 4)
        record += content[position + 7 : position + 7 + length]
        position += 7 + length
        if kind in (1, 4):
            yield record
            record = b""


@pytest.mark.slow
def test_tensorboard_has_every_metric_of_every_log(tracked: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(tracked / "out" / "logs" / "tensorboard"))
    events.Reload()
    for name in METRICS:
        written = [(e.step, e.value) for e in events.Scalars(f"train/{name}")]
        assert written == [(e["step"], pytest.approx(e[name], rel=1e-6)) for e in log_history(tracked / "out")], name
    assert [e.step for e in events.Scalars("eval/loss")] == [2, 4]


@pytest.mark.slow
def test_wandb_has_every_metric_of_every_log(tracked: Path) -> None:
    from wandb.proto import wandb_internal_pb2

    (file,) = (tracked / "wandb").glob("offline-run-*/*.wandb")
    rows: list[dict[str, float]] = []
    project = name = ""
    for data in wandb_records(file.read_bytes()):
        record = wandb_internal_pb2.Record()  # type: ignore[attr-defined]
        record.ParseFromString(data)
        if record.HasField("run"):
            project, name = record.run.project, record.run.display_name
        if record.HasField("history"):
            rows.append({"/".join(i.nested_key) or i.key: json.loads(i.value_json) for i in record.history.item})
    assert (project, name) == ("sft-tests", "tracked")
    for metric in METRICS:
        written = [row[f"train/{metric}"] for row in rows if f"train/{metric}" in row]
        assert written == [pytest.approx(e[metric]) for e in log_history(tracked / "out")], metric
    assert len([row for row in rows if "eval/loss" in row]) == 2
