"""Batches are flattened or padded; fillers count as nothing."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from datasets import Dataset

from sft.data.loading.collator import Collator, EvenRows


def row(*ids: int, **more: object) -> dict:
    return {"input_ids": np.array(ids), "labels": np.array([-100, *ids[1:]]), **more}


def test_flattened_batches_concatenate_all_tokens_and_keep_the_lengths() -> None:
    batch = Collator(9, flatten=True)([row(1, 2, 3), row(4, 5)])
    assert batch["input_ids"].tolist() == [[1, 2, 3, 4, 5]]
    assert batch["labels"].tolist() == [[-100, 2, 3, -100, 5]]
    assert batch["position_ids"].tolist() == [[0, 1, 2, 0, 1]]
    assert batch["documents"].lengths == (3, 2)
    assert batch["documents"].cu_seqlens.tolist() == [0, 3, 5]
    assert batch["lengths"].tolist() == [3, 2]
    assert batch["trained_positions"].tolist() == [1, 2, 4]
    assert "attention_mask" not in batch


def test_documents_of_packed_sequences_are_kept() -> None:
    packed = row(1, 2, 3, 4, seq_lengths=np.array([1, 3]))
    batch = Collator(0, flatten=True)([packed, row(5, 6, seq_lengths=np.array([2]))])
    assert batch["input_ids"].tolist() == [[1, 2, 3, 4, 5, 6]]
    assert batch["position_ids"].tolist() == [[0, 0, 1, 2, 0, 1]]
    assert batch["documents"].lengths == (1, 3, 2)
    assert batch["lengths"].tolist() == [4, 2]


def test_no_document_predicts_the_first_token_of_the_next() -> None:
    """The labels of a single text may include its first token."""
    text = {"input_ids": np.array([1, 2]), "labels": np.array([1, 2])}
    for flatten in (True, False):
        batch = Collator(0, flatten)([text, text])
        assert batch["labels"].flatten().tolist() == [-100, 2, -100, 2]
        assert batch["trained_positions"].tolist() == [1, 3]


def test_padded_batches_are_padded_on_the_right_to_the_longest() -> None:
    batch = Collator(pad_token_id=9)([row(1, 2, 3), row(4, 5)])
    assert batch["input_ids"].tolist() == [[1, 2, 3], [4, 5, 9]]
    assert batch["labels"].tolist() == [[-100, 2, 3], [-100, 5, -100]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1], [1, 1, 0]]
    assert batch["lengths"].tolist() == [3, 2]
    assert batch["trained_positions"].tolist() == [1, 2, 4]
    assert not {"position_ids", "documents"} & batch.keys()


@pytest.mark.parametrize("flatten", [True, False])
def test_a_pad_token_that_is_also_the_end_token_is_supervised_where_it_ends_an_answer(flatten: bool) -> None:
    batch = Collator(2, flatten)([row(1, 7, 2), row(1, 2)])
    assert batch["labels"].flatten()[batch["trained_positions"]].tolist() == [7, 2, 2]


def test_padded_packed_sequences_get_positions_and_no_mask() -> None:
    first = row(1, 2, 3, 4, seq_lengths=np.array([1, 2, 1]))
    second = row(5, 6, seq_lengths=np.array([2]))
    batch = Collator(0)([first, second])
    assert "attention_mask" not in batch
    assert batch["position_ids"].tolist() == [[0, 0, 1, 0], [0, 1, 0, 0]]


def test_fillers_are_masked() -> None:
    rows = Dataset.from_dict({"input_ids": [[1, 2], [3, 4, 5], [6, 7]], "labels": [[-100, 2], [-100, 4, 5], [-100, 7]]})
    even = EvenRows(rows.with_format("numpy"), multiple=4)
    assert len(even) == len(list(even)) == 4  # type: ignore[call-overload]
    batch = Collator(0)([even[2], even[3]])
    assert batch["labels"].tolist() == [[-100, 7], [-100, -100]]
    assert batch["lengths"].tolist() == [2, 0]
    assert torch.is_tensor(batch["input_ids"])


def test_even_data_gets_no_filler() -> None:
    assert len(EvenRows([row(1), row(2)], multiple=2)) == 2
