"""The benchmarks run on any machine, at any size, and count what they say they count."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import numpy as np
import pytest

from benchmarks._inputs import log_normal_lengths, read_questions, write_chats
from benchmarks._measure import ROOT, run_worker
from benchmarks._report import Figures, write_section
from benchmarks.data import targets


def chats(file):
    return [[m["content"] for m in json.loads(line)["messages"]] for line in file.read_text().splitlines()]


def test_chats_go_through_the_questions_again_and_again(tmp_path):
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


def test_generated_questions_are_the_same_each_time_and_as_long_as_gsm8ks():
    generated = read_questions(None)
    assert generated == read_questions(None)
    assert len(generated) == 7473
    for key, words in (("question", 45), ("answer", 52)):
        assert np.mean([len(row[key].split()) for row in generated]) == pytest.approx(words, rel=0.15)


def test_lengths_have_the_mean_they_are_named_for():
    lengths = log_normal_lengths(50_000, 196, 2048)
    assert lengths.mean() == pytest.approx(196, rel=0.01)
    assert lengths.min() >= 1
    assert lengths.max() <= 2048


def test_a_section_of_the_results_is_replaced_and_the_others_stay(tmp_path):
    file = tmp_path / "RESULTS.md"
    write_section(file, "Data", "old")
    write_section(file, "Training", "kept")
    write_section(file, "Data", Figures("T", ("", "n"), [("ours", "1")]).markdown())
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


def test_a_worker_that_fails_says_why(tmp_path):
    with pytest.raises(RuntimeError, match=r"ended with exit code 1:[\s\S]*KeyError: 'nobody'"):
        run_worker("benchmarks._contestants", "nobody", {}, tmp_path)


@pytest.mark.slow
def test_the_data_benchmark_runs_at_a_tiny_size_without_its_rival(tmp_path):
    options = [
        "--rows",
        "60",
        "--rounds",
        "1",
        "--lengths",
        "2000",
        "--scale",
        "40",
        "--without-trl",
        "--data",
        "nowhere.jsonl",
    ]
    places = ["--work", str(tmp_path), "--out", str(tmp_path / "out"), "--json", str(tmp_path / "all.json")]
    environment = {**os.environ, "PYTHONPATH": ""}  # it finds the checkout by itself, from any folder
    command = [sys.executable, str(ROOT / "benchmarks" / "data.py"), *options, *places]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
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
    assert not [
        path for path in tmp_path.iterdir() if path.name not in ("out", "all.json")
    ]  # no temporary file is left
