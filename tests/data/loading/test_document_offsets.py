"""Offsets of documents in a flattened sequence, on the host and on the device."""

from __future__ import annotations

import pickle

import torch

from sft.data.loading.document_offsets import DocumentOffsets


def test_offsets_are_the_running_sum_of_the_lengths() -> None:
    documents = DocumentOffsets.of([3, 2, 4])
    assert documents.lengths == (3, 2, 4)
    assert documents.cu_seqlens.tolist() == [0, 3, 5, 9]
    assert documents.cu_seqlens.dtype == torch.int32
    assert (documents.tokens, documents.max_length) == (9, 4)


def test_the_host_keeps_its_offsets_when_the_batch_moves() -> None:
    moved = DocumentOffsets.of([3, 2, 4]).to("meta", non_blocking=True)
    assert moved.cu_seqlens.device.type == "meta"
    assert moved.lengths == (3, 2, 4)
    assert moved.offsets.device.type == "cpu"
    assert moved.offsets.tolist() == [0, 3, 5, 9]
    assert moved.offsets is moved.offsets  # computed once per batch


def test_they_can_be_pickled() -> None:
    sent = pickle.loads(pickle.dumps(DocumentOffsets.of([1, 5])))
    assert sent.lengths == (1, 5)
    assert sent.cu_seqlens.tolist() == [0, 1, 6]
