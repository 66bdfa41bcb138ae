"""One rule for the order of training rows, in memory and streamed: `shuffle_seed`, else `data_seed`, else `seed`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import sft_main
from sft.config.loading import load_config
from sft.errors import UserError
from tests.by_hand import rows_of
from tests.runs import arithmetic, write_config, write_rows
from trainer_utils import SFTTrainer

ROWS = 12
Order = list[tuple[int, ...]]


@pytest.fixture(scope="module")
def config_file(tmp_path_factory: pytest.TempPathFactory, model_dir: Path) -> Path:
    """One epoch of 12 rows, one row a step."""
    folder = tmp_path_factory.mktemp("order")
    return write_config(
        folder / "run.yaml",
        model_name_or_path=str(model_dir),
        dtype="float32",
        train_file=str(write_rows(folder / "train.jsonl", arithmetic(ROWS))),
        cache_dir=str(folder / "cache"),
        output_dir=str(folder / "out"),
        max_seq_length=128,
        packing=False,
        per_device_train_batch_size=1,
        max_steps=ROWS,
        save_strategy="no",
        lora_config={"r": 2},
    )


@pytest.fixture
def trained_order(config_file: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Trains with some overrides; returns the rows in the order in which they were trained."""
    seen: Order = []
    measure = SFTTrainer.measure

    def noting(self: SFTTrainer, model: Any, inputs: dict[str, Any], gradient_scale: torch.Tensor | None = None) -> Any:
        if gradient_scale is not None:  # a pass of training
            seen.append(tuple(inputs["input_ids"][0].tolist()))
        return measure(self, model, inputs, gradient_scale)

    monkeypatch.setattr(SFTTrainer, "measure", noting)

    def train(*overrides: str) -> Order:
        seen.clear()
        assert sft_main.main(["--config_file", str(config_file), *overrides]) == 0
        return list(seen)

    return train


@pytest.mark.parametrize("streaming", [False, True])
def test_each_key_in_its_turn_decides_the_order(trained_order: Any, config_file: Path, streaming: bool) -> None:
    common = f"streaming={streaming}".lower()
    by_seed = trained_order(common, "seed=7")
    assert trained_order(common, "data_seed=7") == by_seed
    assert trained_order(common, "shuffle_seed=7") == by_seed
    other = trained_order(common, "seed=7", "data_seed=8")
    assert other != by_seed
    assert trained_order(common, "seed=7", "shuffle_seed=8") == other
    assert sorted(other) == sorted(by_seed)
    assert len(set(other)) == ROWS, "every row is trained once"
    if not streaming:
        rows = rows_of(config_file.parent / "out").train
        for seed, order in ((7, by_seed), (8, other)):
            chosen = np.random.default_rng([seed, 0]).permutation(ROWS)
            assert order == [tuple(rows[int(row)]["input_ids"]) for row in chosen]


def test_the_estimate_counts_the_passes_of_that_order(config_file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    sizes = {}
    lengths = np.array([len(row["input_ids"]) for row in rows_of_config(config_file)])
    for seed in range(20):
        order = np.random.default_rng([seed, 0]).permutation(ROWS)
        sizes[seed] = int(lengths[order].reshape(-1, 3).sum(1).max())
    low, high = min(sizes, key=lambda seed: sizes[seed]), max(sizes, key=lambda seed: sizes[seed])
    assert sizes[low] < sizes[high]
    for key in ("shuffle_seed", "data_seed"):
        for seed in (low, high):
            overrides = [f"{key}={seed}", "per_device_train_batch_size=3", "max_steps=4", "--json"]
            assert sft_main.main(["estimate", "--config_file", str(config_file), *overrides]) == 0
            assert json.loads(capsys.readouterr().out)["longest_pass"]["tokens"] == sizes[seed]


def rows_of_config(config_file: Path) -> Any:
    """The prepared rows of a config that need not have run."""
    (config_file.parent / "prepared").mkdir(exist_ok=True)
    (config_file.parent / "prepared" / "config.yaml").write_text(config_file.read_text())
    return rows_of(config_file.parent / "prepared").train


def test_two_seeds_of_one_order_are_refused(tmp_path: Path) -> None:
    def load(**seeds: Any) -> Any:
        return load_config(write_config(tmp_path / "c.yaml", train_file="a.jsonl", **seeds))

    with pytest.raises(UserError) as caught:
        load(shuffle_seed=0, data_seed=2)
    (problem,) = caught.value.problems
    assert (problem.key, problem.line) == ("data_seed", 3)
    assert problem.message == "is 2, but shuffle_seed, which orders the training rows too, is 0"
    assert load(shuffle_seed=2, data_seed=2).order_seed == 2
    assert load(data_seed=0, seed=5).order_seed == 0
    with pytest.raises(UserError, match="shuffle_seed: must be at least 0, got -1"):
        load(shuffle_seed=-1)
