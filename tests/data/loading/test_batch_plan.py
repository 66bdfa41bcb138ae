"""The plan computes batch sizes and the number of steps."""

from __future__ import annotations

from typing import Any

import pytest

from sft.config.schema import TrainingKeys
from sft.data.loading.batch_plan import plan_batches
from sft.errors import UserError


def keys(**values: Any) -> TrainingKeys:
    return TrainingKeys(**values)


def test_global_batch_size_sets_the_accumulation() -> None:
    plan = plan_batches(keys(per_device_train_batch_size=4, global_batch_size=32), 1000, 5000, world_size=2)
    assert plan.gradient_accumulation_steps == 4
    assert plan.global_batch_size == 32
    assert plan.steps_per_epoch == 32  # 125 batches of 8 sequences, 4 per step, the last step with 1
    assert plan.total_steps == 96


def test_a_global_batch_size_that_cannot_be_made_is_a_user_error() -> None:
    with pytest.raises(UserError, match="30 is not a multiple of 8"):
        plan_batches(keys(per_device_train_batch_size=4, global_batch_size=30), 100, 100, world_size=2)


def test_max_steps_overrides_epochs() -> None:
    plan = plan_batches(keys(max_steps=7, per_device_train_batch_size=2), 100, 100, world_size=1)
    assert plan.total_steps == 7


def test_dropping_the_last_batch_counts_only_full_ones() -> None:
    dropping = keys(per_device_train_batch_size=8, dataloader_drop_last=True, num_train_epochs=1)
    assert plan_batches(dropping, 15, 15, world_size=1).total_steps == 1
