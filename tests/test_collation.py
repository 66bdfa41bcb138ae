"""Batches are padded to their longest row; packed rows keep their documents apart; fillers weigh nothing."""

from __future__ import annotations

import numpy as np
import torch
from datasets import Dataset

from sft.collation import Collator, EvenRows


def row(*ids: int, **more: object) -> dict:
    return {"input_ids": np.array(ids), "labels": np.array([-100, *ids[1:]]), **more}


def test_rows_are_padded_on_the_right_to_the_longest() -> None:
    batch = Collator(pad_token_id=9)([row(1, 2, 3), row(4, 5)])
    assert batch["input_ids"].tolist() == [[1, 2, 3], [4, 5, 9]]
    assert batch["labels"].tolist() == [[-100, 2, 3], [-100, 5, -100]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1], [1, 1, 0]]
    assert batch["lengths"].tolist() == [3, 2]
    assert "position_ids" not in batch


def test_the_width_is_rounded_up_where_the_device_likes_it() -> None:
    batch = Collator(0, pad_to_multiple_of=8)([row(1, 2, 3)])
    assert batch["input_ids"].shape == (1, 8)
    assert batch["lengths"].tolist() == [3]


def test_a_pad_token_that_is_also_the_end_token_stays_trained_where_it_ends_an_answer() -> None:
    batch = Collator(pad_token_id=2)([row(1, 7, 2), row(1, 2)])
    assert batch["labels"].tolist() == [[-100, 7, 2], [-100, 2, -100]]


def test_packed_rows_get_positions_and_no_mask_and_padding_stands_alone() -> None:
    first = row(1, 2, 3, 4, seq_lengths=np.array([1, 2, 1]))
    second = row(5, 6, seq_lengths=np.array([2]))
    batch = Collator(0)([first, second])
    assert "attention_mask" not in batch
    assert batch["position_ids"].tolist() == [[0, 0, 1, 0], [0, 1, 0, 0]]
    assert batch["seq_lengths"].tolist() == [[1, 2, 1], [2, 0, 0]]


def test_packed_rows_are_joined_without_padding_for_flash_attention() -> None:
    first = row(1, 2, 3, 4, seq_lengths=np.array([1, 3]))
    batch = Collator(0, flatten=True)([first, row(5, 6, seq_lengths=np.array([2]))])
    assert batch["input_ids"].tolist() == [[1, 2, 3, 4, 5, 6]]
    assert batch["position_ids"].tolist() == [[0, 0, 1, 2, 0, 1]]
    assert batch["seq_lengths"].tolist() == [[1, 3, 2]]
    assert batch["lengths"].tolist() == [4, 2]


def test_fillers_make_rows_even_and_train_nothing() -> None:
    rows = Dataset.from_dict({"input_ids": [[1, 2], [3, 4, 5], [6, 7]], "labels": [[-100, 2], [-100, 4, 5], [-100, 7]]})
    even = EvenRows(rows.with_format("numpy"), multiple=4)
    assert len(even) == len(list(even)) == 4  # type: ignore[call-overload]
    batch = Collator(0)([even[2], even[3]])
    assert batch["labels"].tolist() == [[-100, 7], [-100, -100]]
    assert batch["lengths"].tolist() == [2, 0]
    assert torch.is_tensor(batch["input_ids"])


def test_rows_that_are_even_already_get_no_filler() -> None:
    assert len(EvenRows([row(1), row(2)], multiple=2)) == 2
