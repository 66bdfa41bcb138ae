"""The benchmarks run on any machine at any size, and their figures count what they name."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import asdict

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments

from benchmarks._gpu_report import all_figures as gpu_figures
from benchmarks._gpu_report import targets as gpu_targets
from benchmarks._inputs import log_normal_lengths, read_questions, write_chats
from benchmarks._measure import ROOT, run_worker
from benchmarks._models import GPU_SHAPES, Shape, square
from benchmarks._report import Figures, write_section
from benchmarks._train_contestants import add_clock, real_tokens
from benchmarks._training_inputs import write_pairs
from benchmarks._training_report import figures, plot_sweeps
from benchmarks._training_report import targets as training_targets
from benchmarks.data import targets
from benchmarks.gpu import merge_runs, read_earlier
from benchmarks.profile_step import list_imports
from sft.training.mfu import peak_flops_by_name
from tests.builders import tiny_llama


def run_script(script, *options, cwd=ROOT.parent):
    """Runs a benchmark, which finds the checkout by itself from any folder."""
    environment = {**os.environ, "PYTHONPATH": "", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(ROOT / "benchmarks" / script), *map(str, options)]
    done = subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def chats(file):
    return [[m["content"] for m in json.loads(line)["messages"]] for line in file.read_text().splitlines()]


def test_chats_repeat_the_questions_in_order(tmp_path):
    questions = [{"question": "1 + 9?", "answer": "10"}, {"question": "why?", "answer": "so"}]
    write_chats(tmp_path / "plain.jsonl", questions, 5)
    write_chats(tmp_path / "distinct.jsonl", questions, 5, distinct=True)
    assert chats(tmp_path / "plain.jsonl") == [["1 + 9?", "10"], ["why?", "so"]] * 2 + [["1 + 9?", "10"]]
    assert chats(tmp_path / "distinct.jsonl") == [
        ["1 + 9?", "10"],
        ["why?", "so"],
        ["1. 2 + 0?", "21"],
        ["1. why?", "so"],
        ["2. 3 + 1?", "32"],
    ]


def test_generated_questions_are_deterministic_and_as_long_as_gsm8ks():
    generated = read_questions(None)
    assert generated == read_questions(None)
    assert len(generated) == 7473
    for key, words in (("question", 45), ("answer", 52)):
        assert np.mean([len(row[key].split()) for row in generated]) == pytest.approx(words, rel=0.15)


def test_lengths_have_the_requested_mean():
    lengths = log_normal_lengths(50_000, 196, 2048)
    assert lengths.mean() == pytest.approx(196, rel=0.01)
    assert lengths.min() >= 1
    assert lengths.max() <= 2048


def test_a_section_of_the_results_is_replaced_and_the_others_stay(tmp_path):
    file = tmp_path / "RESULTS.md"
    write_section(file, "Data", ["old"])
    write_section(file, "Training", ["kept"])
    write_section(file, "Data", [Figures("T", ("", "n"), [("ours", "1")]).markdown()])
    expected = "# Results\n\n## Data\n\n**T**\n\n|  | n |\n| --- | ---: |\n| ours | 1 |\n\n## Training\n\nkept\n"
    assert file.read_text() == expected


def test_targets_are_met_or_not():
    def one(seconds, peak):
        return [{"seconds": seconds, "tokens": 100, "peak_mib": peak, "ready_mib": 100}]

    found = targets({"compare": {"ours": one(1, 200), "TRL": one(4, 300), "encode_batch_fast": one(0.5, 100)}})
    assert [(t["what"], t["reached"], t.get("met")) for t in found] == [
        ("tokens/s, times those of TRL", 4.0, True),
        ("tokens/s, share of encode_batch_fast", 0.5, False),
        ("peak memory, share of that of TRL", 200 / 300, False),
        ("memory that the work adds, share of that of TRL", 0.5, None),
    ]


def test_the_error_of_a_failed_worker_is_reported(tmp_path):
    with pytest.raises(RuntimeError, match=r"ended with exit code 1:[\s\S]*KeyError: 'nobody'"):
        run_worker("benchmarks._data_contestants", "nobody", {}, tmp_path)


@pytest.mark.slow
def test_the_data_benchmark_runs_at_a_tiny_size_without_trl(tmp_path):
    sizes = ("--rows", 60, "--rounds", 1, "--lengths", 2000, "--scale", 40, "--without-trl", "--data", "nowhere.jsonl")
    places = ("--work", tmp_path, "--out", tmp_path / "out", "--json", tmp_path / "all.json")
    run_script("data.py", *sizes, *places, cwd=tmp_path)
    found = json.loads((tmp_path / "all.json").read_text())
    compared = {name: reports[0] for name, reports in found["compare"].items()}
    assert set(compared) == {"ours", "encode_batch_fast", "ours, no row twice"}
    assert compared["ours"]["tokens"] == compared["encode_batch_fast"]["tokens"] > 60 * 50
    assert compared["ours"]["rows_lost"] == 0
    assert not compared["ours"]["from_cache"]
    assert 2000 * 150 < found["packing"]["ours"][0]["tokens"] < 2000 * 250
    assert found["scale"]["second_start"][0]["from_cache"]
    for report in compared.values():
        assert 0 < report["ready_mib"] <= report["peak_mib"] < 4000
        assert 0 < report["seconds"] < report["wall_s"]
    results = (tmp_path / "out" / "RESULTS.md").read_text()
    assert "## Data" in results
    assert "generated text" in results
    assert {path.name for path in tmp_path.iterdir()} == {"out", "all.json"}  # no temporary file is left


def test_pairs_hold_what_the_chats_hold(tmp_path):
    questions = [{"question": "1 + 9?", "answer": "10"}, {"question": "why?", "answer": "so"}]
    write_pairs(tmp_path / "chats.jsonl", tmp_path / "pairs.jsonl", questions, 3, joined=2)
    assert chats(tmp_path / "chats.jsonl") == [["1 + 9?\nwhy?", "10\nso"]] * 3
    messages = [json.loads(line)["messages"] for line in (tmp_path / "chats.jsonl").read_text().splitlines()]
    pairs = [json.loads(line) for line in (tmp_path / "pairs.jsonl").read_text().splitlines()]
    assert [pair["prompt"] + pair["completion"] for pair in pairs] == messages


@pytest.mark.parametrize("shape", [square(2, 128, 500), square(2, 128, 500, tied=True), GPU_SHAPES["tiny"]["0.6B"]])
@pytest.mark.parametrize("frozen", [False, True])
def test_operations_are_those_of_the_weights_that_are_multiplied(shape, frozen):
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(shape.config())
    multiplied = sum(m.weight.numel() for m in model.modules() if isinstance(m, torch.nn.Linear))
    assert shape.operations(frozen) == (4 if frozen else 6) * multiplied


@pytest.mark.parametrize(("size", "billions"), [("0.6B", 0.596), ("1.7B", 1.721), ("8B", 8.030)])
def test_gpu_models_have_the_sizes_of_their_names(size, billions):
    shape = GPU_SHAPES["real"][size]
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(shape.config())
    assert model.num_parameters() / 1e9 == pytest.approx(billions, abs=5e-4)
    assert Shape(**asdict(shape)) == shape


def test_padding_is_never_counted():
    mask = torch.tensor([[1, 1, 0, 0], [1, 1, 1, 0]])
    assert real_tokens({"input_ids": torch.zeros(2, 4), "attention_mask": mask}) == 5
    assert real_tokens({"input_ids": torch.zeros(1, 9)}) == 9
    on_device = real_tokens({"input_ids": torch.zeros(2, 4), "attention_mask": mask.to("meta")})
    assert on_device.device.type == "meta"  # the step that is timed does not wait for the number


def test_the_clock_starts_after_the_warm_up(tmp_path):
    model = tiny_llama(50)
    rows = [{"input_ids": [1] * n, "attention_mask": [1] * n, "labels": [1] * n} for n in (5, 7) * 6]
    trainer_class, report = add_clock(Trainer, warm_up=2)
    arguments = TrainingArguments(
        str(tmp_path), max_steps=5, per_device_train_batch_size=1, gradient_accumulation_steps=2, use_cpu=True,
        report_to="none", train_sampling_strategy="sequential", save_strategy="no",
    )  # fmt: skip
    trainer = trainer_class(model=model, args=arguments, train_dataset=rows, callbacks=[trainer_class.clock])
    trainer.train()
    assert report["steps"] == 3
    assert report["tokens"] == 3 * (5 + 7)
    assert type(report["tokens"]) is int  # as JSON takes it
    assert report["seconds"] > 0


def run_of(tokens_per_second, wall=10.0, peak=1000.0):
    return {"tokens": tokens_per_second * 2, "seconds": 2, "steps": 4, "wall_s": wall, "peak_mib": peak, "loss": 9.0}


def test_training_targets_are_medians_of_the_ratios_within_a_round():
    rounds = {
        "ours": [run_of(900), run_of(300), run_of(800)],
        "TRL": [run_of(100), run_of(100), run_of(100)],
        "bare loop": [run_of(900), run_of(400), run_of(800)],
    }
    found = training_targets({"speed": {"full": {"rounds": rounds, "heats": {}}}})
    assert [(t["what"], t["reached"], t["met"]) for t in found] == [
        ("full: tokens/s, times those of TRL", 8.0, True),
        ("full: tokens/s, times those of bare loop", 1.0, True),
    ]


def test_memory_and_whole_runs_have_their_targets():
    memory = {"ours": [run_of(100, peak=300)], "Trainer, bf16": [run_of(200, peak=1000)]}
    process = {"ours": [run_of(1, wall=10)], "TRL": [run_of(1, wall=15)], "TRL, packed": [run_of(1, wall=30)]}
    found = training_targets({"memory": memory, "process": process})
    assert [(t["what"], t["reached"], t.get("met")) for t in found] == [
        ("whole run, times faster than TRL", 1.5, False),
        ("whole run, times faster than TRL, packed", 3.0, None),
        ("peak memory with the large vocabulary, share of Trainer, bf16", 0.3, True),
        ("tokens/s with it, times those of Trainer, bf16", 0.5, False),
    ]


def test_figures_are_medians_and_ranges():
    table = figures("T", {"ours": [run_of(900), run_of(1300), run_of(1000)]})
    assert table.rows == [("ours", "1,000", "900–1,300", "450", "10.0", "1,000", "9.000")]


def test_the_plot_of_the_sweeps_is_deterministic(tmp_path):
    pytest.importorskip("matplotlib")
    points = {"32000": {"ours": run_of(900), "TRL": run_of(100)}, "64000": {"ours": run_of(800)}}
    for name in ("one.svg", "two.svg"):
        assert plot_sweeps(tmp_path / name, {"vocabulary": points, "rows": points})
    text = (tmp_path / "one.svg").read_text()
    assert text == (tmp_path / "two.svg").read_text()
    assert "32,000" in text
    assert "peak MiB" in text


def gpu_results(name, **changed):
    one = {"size": "8B", "length": 4096, "pass_tokens": 8192, "flops_per_token": 40_000_000_000}

    def of(method, who, speed, peak_gb):
        run = {**run_of(speed), "device_peak_mib": peak_gb * 1e9 / 2**20}
        return {**one, "method": method, "name": who, "runs": [run]}

    return {
        "device": {"name": name, "memory_gib": 79.2, "peak": peak_flops_by_name(name)},
        "train": [
            of("lora", "ours", 12_000, 30),
            of("lora", "TRL", 6_000, 30),
            {**one, "method": "lora", "name": "TRL, packed", "runs": [{"failed": "out of memory"}]},
            of("qlora", "ours", 10_800, 12),
        ],
        **changed,
    }


def test_gpu_figures_have_mfu_and_failures():
    (table,) = gpu_figures(gpu_results("Some card"))[1:]
    assert table.rows[0] == ("lora", "4,096", "ours", "12,000", "", "30.0")  # no peak is known: no MFU
    (table,) = gpu_figures(gpu_results("NVIDIA H100 80GB HBM3"))[1:]
    assert table.rows[0] == ("lora", "4,096", "ours", "12,000", "48.5%", "30.0")
    assert table.rows[2] == ("lora", "4,096", "TRL, packed", "out of memory", "", "")


def test_absolute_targets_are_those_of_an_h100():
    ratios = [
        ("8B lora 4,096: times TRL's default", 2.0, ">=", 1.5),
        ("8B lora 4,096: times TRL's best (TRL)", 2.0, ">=", 1.15),
        ("8B qlora 4,096: share of LoRA's tokens/s", 0.9, ">=", 0.85),
    ]
    assert gpu_targets(gpu_results("NVIDIA A100-SXM4-80GB")) == ratios
    head = {"ours": [{"ms": 80.0, "device_peak_mib": 2.9e9 / 2**20}]}
    found = gpu_targets(gpu_results("NVIDIA H100 80GB HBM3", head=head, head_shape=[16_384, 248_320, 2048]))
    assert found == [
        ("8B lora 4,096: tokens/s", 12_000, ">=", 13_500),
        *ratios,
        ("head and loss: ms", 80.0, "<=", 90),
        ("head and loss: peak GB", pytest.approx(2.9), "<=", 3.0),
    ]


def test_the_gpu_benchmark_keeps_the_figures_of_earlier_runs(tmp_path):
    one = {"size": "8B", "method": "lora", "length": 4096, "pass_tokens": 8192, "name": "ours"}
    first = [{**one, "runs": [1]}, {**one, "length": 8192, "runs": [2]}]
    assert merge_runs(first, [{**one, "runs": [3]}]) == [first[1], {**one, "runs": [3]}]
    file = tmp_path / "all.json"
    assert read_earlier(file, "card") == {}
    file.write_text(json.dumps({"device": {"name": "card"}, "train": first}))
    assert read_earlier(file, "card")["train"] == first
    with pytest.raises(SystemExit, match="has figures of card, and this is another"):
        read_earlier(file, "another")


def test_a_target_without_enough_memory_is_missed():
    full = {"size": "8B", "method": "full 8-bit", "length": 4096, "pass_tokens": 8192, "flops_per_token": 1}
    ours = {**full, "name": "ours", "runs": [{"failed": "out of memory"}]}
    results = gpu_results("NVIDIA H100 80GB HBM3", train=[ours])
    assert gpu_targets(results) == [("8B full 8-bit 4,096: tokens/s", "out of memory", ">=", 8_500)]
    assert gpu_figures(results)[0].rows == [("8B full 8-bit 4,096: tokens/s", "out of memory", ">= 8,500", "no")]


def test_the_longest_imports_come_first():
    output = (
        "import time: self [us] | cumulative | imported package\n"
        "import time:       100 |       2000 |   torch.nn\nimport time:    500000 |    1600000 | torch\n"
    )
    assert list_imports(output, 1).splitlines()[1] == "    1.60     0.50  torch"
    assert list_imports(output, 5).splitlines()[2].split() == ["0.00", "0.00", "torch.nn"]


SMALL = ("--layers", 1, "--width", 64, "--data", "nowhere.jsonl")


@pytest.mark.slow
def test_the_training_benchmark_runs_at_a_tiny_size_without_trl(tmp_path):
    (tmp_path / "RESULTS.md").write_text("# Results\n\n## Data\n\nkept\n")
    sizes = ("--rows", 100, "--max-length", 512, "--step-tokens", 512, "--methods", "lora")
    steps = ("--rounds", 1, "--steps", 2, "--warm-up", 1, "--sweep-steps", 2)
    sweeps = ("--sweep-vocabulary", "--sweep-size", "--sweep-rows", 100, "--sweep-joined", 1)
    places = ("--out", tmp_path, "--json", tmp_path / "all.json", "--work", tmp_path, "--without-trl")
    run_script("train.py", *SMALL, "--parts", "speed", "sweeps", *sizes, *steps, *sweeps, *places)
    found = json.loads((tmp_path / "all.json").read_text())
    reports = {name: of_it[0] for name, of_it in found["speed"]["lora"]["rounds"].items()}
    assert set(reports) == {"ours", "bare loop", "Trainer, bf16", "Trainer, float32"}
    for report in reports.values():
        assert report["steps"] == 1
        assert 200 < report["tokens"] <= 700  # one step of about 512
        assert 9 < report["loss"] < 12  # ln(32,000) = 10.4
        assert 0 < report["seconds"] < report["wall_s"]
    ((length, point),) = found["sweeps"]["length"].items()
    assert 100 < int(length) < 256
    assert set(point) == {"ours", "Trainer, bf16"}
    assert found["sweeps"]["rows"] == {"100": point}, "the same run was measured on two axes"
    results = (tmp_path / "RESULTS.md").read_text()
    assert "## Data\n\nkept" in results
    assert "## Training" in results


@pytest.mark.slow
def test_the_gpu_benchmark_can_be_tried_without_a_gpu(tmp_path):
    sizes = ("--sizes", "0.6B", "--methods", "full", "qlora", "--lengths", 256, "--pass-tokens", 256)
    steps = ("--step-tokens", 512, "--steps", 2, "--warm-up", 1, "--rows", 60, "--head", 64, 640, 32, "--repeats", 1)
    places = ("--out", tmp_path, "--json", tmp_path / "all.json", "--work", tmp_path, "--data", "nowhere.jsonl")
    run_script("gpu.py", "--device", "cpu", "--scale", "tiny", *sizes, *steps, *places)
    found = json.loads((tmp_path / "all.json").read_text())
    ours = [one["method"] for one in found["train"] if one["name"] == "ours"]
    assert ours == ["full", "qlora"]
    for one in found["train"]:
        assert not [run for run in one["runs"] if "failed" in run], one
    losses = [runs[0]["loss"] for name, runs in found["head"].items() if name in ("ours", "torch_plain")]
    assert losses[0] == pytest.approx(losses[1], rel=1e-3)
    results = (tmp_path / "RESULTS.md").read_text()
    assert "## One GPU" in results
    assert "no GPU: a trial of the script" in results


@pytest.mark.slow
def test_the_profile_names_imports_stages_and_operations(tmp_path):
    run_script("profile_step.py", *SMALL, "--steps", 1, "--warm-up", 1, "--out", tmp_path / "profile.txt")
    text = (tmp_path / "profile.txt").read_text()
    assert " torch\n" in text
    assert "Batches:" in text
    assert "aten::mm" in text
