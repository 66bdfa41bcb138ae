"""`packing: auto` packs where that saves rows, costs nothing, and leaves steps enough."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

import data_handler
import model_manager
from sft.config.schema import DataKeys, ModelKeys
from sft.data.preparation.packing import AutoPacking
from tests.builders import byte_level_tokenizer
from tests.runs import write_rows

SHORT = np.full(10_000, 100)  # a million tokens: 1,000 rows of 1,000


@pytest.mark.parametrize(
    ("auto", "lengths", "packing", "words"),
    [
        (AutoPacking(None, 20), SHORT, "bfd", "bfd: 10,000 samples, some 10 in a row of 1,000 tokens"),
        (AutoPacking(None, 21), SHORT, None, "off: 10 samples a row and 21 rows a step would leave 47 steps"),
        (AutoPacking(None, 1), SHORT * 6, None, "off: fewer than two samples would share a row of 1,000 tokens"),
        (AutoPacking("it cannot", 1), SHORT, None, "off: it cannot"),
        (AutoPacking(None, 1), SHORT[:0], None, "off: "),
    ],
)
def test_the_choice(auto: AutoPacking, lengths: np.ndarray, packing: str | None, words: str) -> None:
    chosen, said = auto.choose(lengths, 1000)
    assert chosen == packing
    assert said.startswith(words)


def test_the_rows_of_a_step_decide_and_are_part_of_what_is_kept(tmp_path: Path) -> None:
    rows = write_rows(tmp_path / "rows.jsonl", [{"text": "a b c"}] * 400)
    keys = DataKeys(train_file=str(rows), max_seq_length=32, cache_dir=str(tmp_path / "cache"))
    found = [
        data_handler.prepare_data(keys, byte_level_tokenizer(), seed=0, auto=AutoPacking(None, rows_a_step))
        for rows_a_step in (1, 2, 1)
    ]
    assert ["seq_lengths" in data.train.column_names for data in found] == [True, False, True]
    assert [data.from_cache for data in found] == [False, False, True]
    assert found[0].packing == found[2].packing
    assert found[0].packing.startswith("bfd: 400 samples")
    assert found[0].train_tokens == found[1].train_tokens


def test_evaluation_rows_are_packed_however_few(tmp_path: Path) -> None:
    rows = write_rows(tmp_path / "rows.jsonl", [{"text": "a b c"}] * 8)
    keys = DataKeys(validation_file=str(rows), max_seq_length=64, cache_dir=str(tmp_path / "cache"))
    for auto, is_packed in ((AutoPacking(None, 100), True), (AutoPacking("it cannot"), False)):
        data = data_handler.prepare_data(keys, byte_level_tokenizer(), seed=0, training=False, auto=auto)
        assert ("seq_lengths" in data.evals["validation"].column_names) is is_packed


def test_the_model_that_is_named_says_whether_samples_may_share_a_row(model_dir: Path) -> None:
    def obstacle(**keys: object) -> str | None:
        return model_manager.obstacle_to_packing(ModelKeys.model_validate(keys), byte_level_tokenizer())

    assert obstacle(model_name_or_path=str(model_dir)) is None
    assert obstacle(from_scratch={"model_type": "qwen2"}) is None
    assert "all pairs" in str(obstacle(model_name_or_path=str(model_dir), attn_implementation="sdpa"))
    assert "recurrent" in str(obstacle(from_scratch={"model_type": "mamba"}))
