"""What trackers receive, read from the files they write (TensorBoard's events, W&B's offline run).

And trackers that cannot start, which are reported before anything is loaded.
"""

from __future__ import annotations

import json
import struct
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from sft.config.loading import load_config
from sft.config.schema import TrainingKeys
from sft.config.upstream_schema import known_trackers
from sft.errors import UserError
from sft.report import trackers
from tests.runs import arithmetic, log_history, refused_before_data, run, write_config, write_rows

METRICS = ("loss", "perplexity", "token_accuracy", "sequence_accuracy", "learning_rate", "grad_norm", "num_tokens")


@pytest.fixture(scope="module")
def tracked(tmp_path_factory: pytest.TempPathFactory, model_dir: Path) -> Path:
    """Trains with both trackers; returns the folder."""
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
    """Yields the records of an offline run: LevelDB's log format after a header of 7 bytes.

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


# Trackers that cannot start


@pytest.fixture
def nothing_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    def find_spec(module: str) -> None:
        if "." in module:
            raise ModuleNotFoundError(module)

    monkeypatch.setattr(trackers, "find_spec", find_spec)
    for name in ("KUBEFLOW_TRAINER_SERVER_URL", "MLFLOW_TRACKING_URI"):
        monkeypatch.delenv(name, raising=False)


def refusals(report_to: str | list[str]) -> list[tuple[str, str]]:
    try:
        trackers.require_trackers(TrainingKeys(report_to=report_to))  # type: ignore[call-arg]
    except UserError as error:
        return [(problem.message, problem.hint) for problem in error.problems if problem.key == "report_to"]
    return []


def test_the_needs_of_every_tracker_are_listed() -> None:
    assert list(trackers.MODULES) == known_trackers()


@pytest.mark.usefixtures("nothing_installed")
def test_a_missing_package_is_reported_with_the_command_that_installs_it() -> None:
    pip = f"Install it: {sys.executable} -m pip install"
    assert refusals("wandb") == [("wandb needs wandb, not installed here", f"{pip} wandb")]
    assert refusals(["azure_ml", "comet_ml"]) == [
        ("azure_ml needs azureml-core, not installed here", f"{pip} azureml-core"),
        ("comet_ml needs comet-ml, not installed here", f"{pip} comet-ml"),
    ]
    assert refusals("dagshub") == [
        ("dagshub needs dagshub and mlflow, not installed here", f"{pip} dagshub mlflow"),
        (
            "dagshub needs the environment variable MLFLOW_TRACKING_URI, which is not set",
            "Set it, or remove this tracker.",
        ),
    ]
    ((message, _),) = refusals("kubeflow")
    assert "KUBEFLOW_TRAINER_SERVER_URL" in message
    for name in known_trackers():
        assert refusals(name)
    assert refusals("none") == refusals("all") == refusals([]) == []


def test_an_installed_package_is_found_and_a_folder_of_runs_is_no_package(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for folder in ("swanlab", "trackio"):
        (tmp_path / folder).mkdir()
    (tmp_path / "trackio" / "__init__.py").write_text("")
    (tmp_path / "tensorboardX.py").write_text("")
    monkeypatch.setattr(sys, "path", [str(tmp_path)])
    for name in ("swanlab", "trackio", "tensorboard", "tensorboardX"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    assert refusals(["trackio", "tensorboard"]) == []
    assert refusals("swanlab")[0][0] == "swanlab needs swanlab, not installed here"


@pytest.mark.usefixtures("nothing_installed")
def test_check_and_train_report_it_before_the_data_is_read(
    tmp_path: Path, model_dir: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    config_file = write_config(
        tmp_path / "run.yaml",
        model_name_or_path=str(model_dir),
        train_file=str(write_rows(tmp_path / "train.jsonl", arithmetic(4))),
        cache_dir=str(tmp_path / "cache"),
        output_dir=str(tmp_path / "out"),
        report_to="mlflow",
    )
    problem, messages = refused_before_data(config_file, monkeypatch, capsys, verbs=("train", "evaluate"))
    assert problem["message"] == "mlflow needs mlflow, not installed here"
    assert (problem["key"], problem["line"]) == ("report_to", 5)
    assert all("mlflow needs mlflow" in message for message in messages)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("word", ["none", "all"])
def test_none_and_all_stand_alone(tmp_path: Path, word: str) -> None:
    with pytest.raises(UserError, match=f"report_to: {word} excludes other trackers"):
        load_config(write_config(tmp_path / "run.yaml", report_to=["wandb", word]))
    assert load_config(write_config(tmp_path / "run.yaml", report_to=[word])).report_to == [word]
