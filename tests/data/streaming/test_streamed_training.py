"""Training on a stream, as a user starts it; a stopped and resumed run equals one that was not stopped."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import transformers

import config_manager
import sft_main
from sft.errors import UserError
from tests.runs import arithmetic, log_history, run, write_config, write_rows


@pytest.fixture(scope="module")
def config_file(tmp_path_factory: pytest.TempPathFactory, model_dir: Path) -> Path:
    """Two data sets of 70 rows (one of them lost) and 20, in small windows; dropout shows if its state is restored."""
    folder = tmp_path_factory.mktemp("streamed")
    rows: list[dict[str, Any]] = list(arithmetic(70))
    rows[3] = {"question": "Why?", "answer": ""}
    return write_config(
        folder / "run.yaml",
        model_name_or_path=str(model_dir),
        dtype="float32",
        datasets=[
            {"path": str(write_rows(folder / "large.jsonl", rows))},
            {"path": str(write_rows(folder / "small.jsonl", arithmetic(20, start=500)))},
        ],
        validation_file=str(write_rows(folder / "validation.jsonl", arithmetic(5, start=10))),
        cache_dir=str(folder / "cache"),
        output_dir=str(folder / "out"),
        streaming=True,
        streaming_window=9,
        packing="bfd",
        max_seq_length=128,
        per_device_train_batch_size=2,
        gradient_accumulation_steps=3,
        learning_rate=3e-3,
        lr_scheduler_type="constant",
        lora_config={"r": 4, "lora_dropout": 0.2},
        max_steps=12,
        save_steps=6,
        logging_steps=1,
        shuffle_seed=5,
    )


def trained(config_file: Path, name: str, *overrides: str, processes: int = 0) -> Path:
    output_dir = config_file.parent / name
    arguments = ["--config_file", str(config_file), f"output_dir={output_dir}", *overrides]
    if not processes:
        assert sft_main.main(arguments) == 0
    else:
        done = run(*arguments, processes=processes)
        assert done.returncode == 0, done.stderr[-3000:]
    return output_dir


def curve(output_dir: Path) -> list[tuple[float, ...]]:
    return [tuple(e[name] for name in ("loss", "grad_norm", "num_tokens", "epoch")) for e in log_history(output_dir)]


def report(output_dir: Path) -> dict[str, Any]:
    return json.loads((output_dir / "logs" / "data_report.json").read_text())


@pytest.mark.slow
@pytest.mark.parametrize(("processes", "workers"), [(0, 0), (0, 2), (2, 0), (2, 2)])
def test_a_resumed_run_equals_one_that_was_not_stopped(config_file: Path, processes: int, workers: int) -> None:
    setting, name = f"dataloader_num_workers={workers}", f"{processes}_{workers}"
    whole = trained(config_file, f"whole_{name}", setting, processes=processes)
    stopped = trained(config_file, f"stopped_{name}", setting, "max_steps=6", processes=processes)
    again = trained(config_file, f"stopped_{name}", setting, "resume_from_checkpoint=auto", processes=processes)
    assert again == stopped
    assert len(curve(whole)) == 12
    assert curve(again) == curve(whole)
    assert curve(whole)[-1][3] >= 1, "the second epoch has begun"
    assert report(again) == report(whole)
    saved = [json.loads((out / "checkpoint-12" / "stream_state.json").read_text()) for out in (whole, again)]
    assert saved[0] == saved[1]
    assert len(saved[0]["places"]) == max(1, processes) * max(1, workers)
    assert saved[0]["batches"] == 12 * 3


@pytest.mark.slow
def test_a_run_killed_while_it_deletes_older_checkpoints_resumes_from_the_new_one(
    config_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its metrics file ends in half a line; the newest checkpoint is complete before an older one is deleted."""
    whole, killed = trained(config_file, "not_killed"), config_file.parent / "killed"
    rotate = transformers.trainer.rotate_checkpoints

    def kill(**options: Any) -> None:
        rotate(**options)
        if (killed / "checkpoint-6").exists():
            raise KeyboardInterrupt

    monkeypatch.setattr(transformers.trainer, "rotate_checkpoints", kill)
    arguments = ["--config_file", str(config_file), f"output_dir={killed}", "save_steps=3", "save_total_limit=1"]
    assert sft_main.main(arguments) == 130
    assert [path.name for path in killed.glob("checkpoint-*")] == ["checkpoint-6"]
    with (killed / "logs" / "metrics.jsonl").open("a") as stream:
        stream.write('{"step": 6, "lo')
    monkeypatch.undo()
    assert sft_main.main([*arguments, "resume_from_checkpoint=auto"]) == 0
    assert curve(killed) == curve(whole)
    assert report(killed) == report(whole)
    metrics = [json.loads(line) for line in (killed / "logs" / "metrics.jsonl").read_text().splitlines()]
    assert [entry["step"] for entry in metrics if "loss" in entry] == list(range(1, 13))
    assert "metrics.jsonl: 1 unreadable lines" in (killed / "logs" / "training_log.txt").read_text()


@pytest.mark.slow
def test_the_report_counts_every_row_of_the_stream(config_file: Path) -> None:
    out = trained(config_file, "reported", "max_steps=20", "save_strategy=no")
    ledger = report(out)
    assert list(ledger["datasets"]) == ["large", "small", "validation"]
    large, small, validation = ledger["datasets"].values()
    assert (large["rows_read"], large["rows_trained"], large["rows_lost"]) == (70, 69, {"empty_answer": 1})
    assert (small["rows_read"], small["rows_lost"]) == (20, {})
    assert large["passes"] > 1
    assert large["in_validation"] == 5
    assert validation["rows_read"] == 5
    assert ledger["total"]["rows_read"] == 95
    assert json.loads((out / "logs" / "eval_results.json").read_text())["eval_tokens"] > 0


@pytest.mark.slow
@pytest.mark.parametrize("setting", ["streaming_window=8", "dataloader_num_workers=2", "system_prompt=Be kind."])
def test_resuming_a_different_stream_is_refused(
    config_file: Path, setting: str, capsys: pytest.CaptureFixture[str]
) -> None:
    name = setting.partition("=")[0].replace("system_prompt", "streamed_data")
    out = trained(config_file, f"refused_{name}", "max_steps=1", "save_steps=1")
    arguments = ["--config_file", str(config_file), f"output_dir={out}", "resume_from_checkpoint=auto"]
    assert sft_main.main([*arguments, setting]) == 2
    assert f"{name}: was" in " ".join(capsys.readouterr().err.split())


@pytest.mark.slow
def test_check_warns_that_it_has_read_only_the_first_rows(
    config_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    many = write_rows(tmp_path / "many.jsonl", arithmetic(2000))
    overrides = [f"datasets.0.path={many}", "streaming_window=1200"]
    assert sft_main.main(["check", "--config_file", str(config_file), *overrides, "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert any("checked the first 1,200 rows" in warning for warning in document["warnings"])
    assert document["data"]["datasets"]["many"]["rows_read"] == 1180
    assert document["data"]["datasets"]["small"]["rows_read"] == 20
    assert document["estimate"]["total_steps"] == 12
    assert document["estimate"]["train_rows"] is None


@pytest.mark.slow
def test_too_many_lost_rows_stop_the_run_before_or_during_training(
    config_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bad = [{"question": "Why?", "answer": ""}] * 400
    for name, rows in (("soon", [*bad, *arithmetic(1600)]), ("late", [*arithmetic(1600), *bad])):
        file = write_rows(tmp_path / f"{name}.jsonl", rows)
        overrides = [f"datasets=[{{path: {file}}}]", f"output_dir={tmp_path / name}", "streaming_window=500"]
        assert sft_main.main(["--config_file", str(config_file), *overrides, "max_steps=300", "save_steps=50"]) == 2
        assert f"rows of '{name}' are lost" in " ".join(capsys.readouterr().err.split())
    assert not (tmp_path / "soon" / "logs" / "metrics.jsonl").exists()
    assert (tmp_path / "late" / "logs" / "metrics.jsonl").exists()


def test_settings_that_streaming_does_not_support_are_refused(tmp_path: Path) -> None:
    config = write_config(
        tmp_path / "c.yaml",
        train_file="a.jsonl",
        streaming=True,
        validation_split=0.1,
        dedupe=True,
        train_sampling_strategy="group_by_length",
        dataloader_in_order=False,
        save_strategy="epoch",
        mix_by="tokens",
    )
    with pytest.raises(UserError) as error:
        config_manager.load_config(config)
    assert sorted(str(p.key) for p in error.value.problems) == [
        "dataloader_in_order",
        "dedupe",
        "mix_by",
        "save_strategy",
        "streaming",
        "train_sampling_strategy",
        "validation_split",
    ]
