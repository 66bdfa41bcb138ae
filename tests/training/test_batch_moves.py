"""Batches are moved to the device before they are trained on, asynchronously where they are pinned."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from sft.data.loading.collator import Collator
from sft.data.loading.document_offsets import DocumentOffsets
from trainer_utils import SFTTrainer


class Pinned(torch.Tensor):
    """A tensor that claims to be in pinned memory, which a machine without a GPU does not have."""

    asked: list[bool]

    def is_pinned(self, *_: Any) -> bool:
        return True

    def to(self, device: Any, non_blocking: bool = False) -> torch.Tensor:  # type: ignore[override]
        self.asked.append(non_blocking)
        return self.as_subclass(torch.Tensor).to(device)


@pytest.fixture
def trainer() -> Any:
    """No more than moving takes; its device is `meta`, which is another than the host's, as a GPU is."""
    made: Any = SFTTrainer.__new__(SFTTrainer)
    made.args = SimpleNamespace(device=torch.device("meta"), average_tokens_across_devices=False, n_gpu=1, world_size=1)
    made.is_deepspeed_enabled = False
    made.model_accepts_loss_kwargs = made._loss_shifts_labels = True
    made.compute_loss_func, made.model = None, torch.nn.Identity()
    made.accelerator = SimpleNamespace(parallelism_config=None)
    return made


def batch() -> dict[str, Any]:
    rows = [{"input_ids": np.arange(n), "labels": np.arange(n)} for n in (3, 2, 4)]
    return Collator(0, flatten=True)(rows)


def test_document_offsets_move_with_the_tensors(trainer: Any) -> None:
    moved = trainer._prepare_inputs({**batch(), "step": "of the stream"})
    assert moved["documents"].cu_seqlens.device.type == "meta"
    assert moved["documents"].lengths == (3, 2, 4)
    assert moved["documents"].offsets.tolist() == [0, 3, 5, 9]  # in main memory
    tensors = [value for value in moved.values() if isinstance(value, torch.Tensor)]
    assert len(tensors) > 4
    assert {tensor.device.type for tensor in tensors} == {"meta"}
    assert moved["step"] == "of the stream"


def test_copies_of_pinned_tensors_are_asynchronous(trainer: Any) -> None:
    labels = torch.arange(4).as_subclass(Pinned)
    offsets = torch.arange(2, dtype=torch.int32).as_subclass(Pinned)
    labels.asked, offsets.asked = [], []
    moved = trainer._prepare_input({"labels": labels, "documents": DocumentOffsets((4,), offsets)})
    assert (labels.asked, offsets.asked) == ([True], [True])
    assert moved["labels"].device.type == moved["documents"].cu_seqlens.device.type == "meta"


def test_document_offsets_on_the_device_are_not_copied(trainer: Any) -> None:
    there = DocumentOffsets.of([3, 2]).to("meta")
    assert trainer._prepare_input(there) is there


def test_the_tokens_of_a_step_are_counted_on_the_device(trainer: Any) -> None:
    """The loader yields batches in main memory; the third one, which the step does not need, stays in it."""
    loader = iter([batch(), batch(), batch()])
    taken, count = trainer.get_batch_samples(loader, 2, torch.device("meta"))
    assert [each["labels"].device.type for each in taken] == ["meta", "meta"]
    assert torch.is_tensor(count)
    assert count.device.type == "meta"
    assert len(list(loader)) == 1
    trainer.args.device = torch.device("cpu")  # where the number can be read: 3 documents, whose first tokens are not
    _, count = trainer.get_batch_samples(iter([batch(), batch(), batch()]), 2, torch.device("cpu"))
    assert int(count) == 2 * (9 - 3)
