"""Where documents stand in a flattened row, on the host and on the device."""

from __future__ import annotations

import pickle

import torch

from sft.data.loading.document_offsets import DocumentOffsets


def test_offsets_are_the_running_sum_of_the_lengths() -> None:
    boundaries = DocumentOffsets.of([3, 2, 4])
    assert boundaries.lengths == (3, 2, 4)
    assert boundaries.cu_seqlens.tolist() == [0, 3, 5, 9]
    assert boundaries.cu_seqlens.dtype == torch.int32
    assert (boundaries.tokens, boundaries.max_length) == (9, 4)


def test_the_host_keeps_its_offsets_when_the_batch_moves_on() -> None:
    moved = DocumentOffsets.of([3, 2, 4]).to("meta", non_blocking=True)
    assert moved.cu_seqlens.device.type == "meta"
    assert moved.lengths == (3, 2, 4)
    assert moved.offsets.device.type == "cpu"
    assert moved.offsets.tolist() == [0, 3, 5, 9]
    assert moved.offsets is moved.offsets  # made once a batch


def test_workers_of_a_loader_can_send_them() -> None:
    sent = pickle.loads(pickle.dumps(DocumentOffsets.of([1, 5])))
    assert sent.lengths == (1, 5)
    assert sent.cu_seqlens.tolist() == [0, 1, 6]
