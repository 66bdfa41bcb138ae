"""A step that runs out of memory is done again in halves; here the allocator really fails, under an address limit."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from typing import Any

import numpy as np
import pytest
import torch

from sft.data.loading.collator import Collator
from sft.distributed.oom import is_out_of_memory, oom_during_evaluation, out_of_memory
from sft.errors import RankStopped
from sft.training.oom_retry import OomRetry
from sft.training.split_batch import split_batch
from tests.runs import ROOT


def rows(*lengths: int) -> list[dict[str, Any]]:
    rng = np.random.default_rng(0)
    made = [{"input_ids": rng.integers(0, 90, n)} for n in lengths]
    return [
        {**row, "labels": np.where(np.arange(n) < 2, -100, row["input_ids"])}
        for row, n in zip(made, lengths, strict=True)
    ]


# Halves


def test_a_flattened_pass_is_cut_between_documents() -> None:
    batch = Collator(0, flatten=True)(rows(3, 2, 4, 1))
    first, second = split_batch(batch) or ({}, {})
    assert first["documents"].lengths == (3, 2)
    assert second["documents"].lengths == (4, 1)
    assert second["documents"].cu_seqlens.tolist() == [0, 4, 5]
    for name in ("input_ids", "labels", "position_ids"):
        assert torch.cat([first[name], second[name]], 1).equal(batch[name])
    assert first["trained_positions"].tolist() == [2]
    assert second["trained_positions"].tolist() == [2, 3]
    assert int(first["lengths"].sum() + second["lengths"].sum()) == int(batch["lengths"].sum()) == 10


def test_a_padded_pass_is_cut_between_rows() -> None:
    batch = Collator(0)(rows(3, 5, 4))
    first, second = split_batch(batch) or ({}, {})
    assert [len(first["input_ids"]), len(second["input_ids"])] == [1, 2]
    assert second["lengths"].tolist() == [5, 4]
    assert second["trained_positions"].tolist() == [2, 3, 4, 7, 8]


@pytest.mark.parametrize("flatten", [True, False])
def test_a_single_row_stays_whole(flatten: bool) -> None:
    assert split_batch(Collator(0, flatten)(rows(4))) is None


# Doing a step again


def test_only_failed_allocations_are_taken_for_them() -> None:
    with pytest.raises(RuntimeError) as raised:
        torch.empty(2**60, dtype=torch.uint8)  # a real one: more than any address space
    assert is_out_of_memory(raised.value)
    assert is_out_of_memory(MemoryError())
    assert is_out_of_memory(torch.OutOfMemoryError("CUDA out of memory."))
    assert not is_out_of_memory(RuntimeError("mat1 and mat2 shapes cannot be multiplied"))
    assert not is_out_of_memory(ValueError("out of memory"))


@pytest.mark.parametrize(
    ("raised", "key", "hint"),
    [
        (out_of_memory("step 3", batch_size=8), "per_device_train_batch_size", "lower it from 8 "),
        (out_of_memory("step 3"), "max_seq_length", "shorten max_seq_length, set gradient_checkpointing"),
    ],
)
def test_the_first_thing_to_do_is_to_lower_the_rows_of_a_pass_where_there_are_several(
    raised: RankStopped, key: str, hint: str
) -> None:
    (problem,) = raised.problems
    assert (problem.key, raised.exit_code) == (key, 3)
    assert problem.hint.startswith(hint)
    assert "shorten max_seq_length" in problem.hint


@pytest.mark.parametrize(("rows", "key"), [(8, "per_device_eval_batch_size"), (1, "max_seq_length")])
def test_an_evaluation_that_is_out_of_memory_says_so(rows: int, key: str) -> None:
    with (
        pytest.raises(RankStopped, match="the evaluation ran out of memory: ") as raised,
        oom_during_evaluation("the evaluation", rows),
    ):
        torch.empty(2**60, dtype=torch.uint8)
    assert [problem.key for problem in raised.value.problems] == [key]
    with pytest.raises(ZeroDivisionError), oom_during_evaluation("the evaluation", rows):
        1 / 0  # noqa: B018


class Step:
    """A weight whose passes add up their numbers, and fail on more than `room` at a time."""

    def __init__(self, room: int) -> None:
        self.room, self.gradient, self.counted = room, 0.0, 0
        self.passes: list[list[float]] = []
        self.shrinking = OomRetry(self.split_batch, self.clear, lambda: self.counted, self.put_back)

    def run_pass(self, numbers: list[float]) -> torch.Tensor:
        self.passes.append(numbers)
        self.counted += len(numbers)
        self.gradient += numbers[0]  # what a backward pass has done before it fails
        if len(numbers) > self.room:
            torch.empty(2**60, dtype=torch.uint8)
        self.gradient += sum(numbers[1:])
        return torch.tensor(sum(numbers))

    @staticmethod
    def split_batch(numbers: list[float]) -> tuple[list[float], list[float]] | None:
        middle = len(numbers) // 2
        return (numbers[:middle], numbers[middle:]) if middle else None

    def clear(self) -> None:
        self.gradient = 0.0

    def put_back(self, counted: int) -> None:
        self.counted = counted


def test_the_passes_of_the_step_are_done_again_and_count_once() -> None:
    step = Step(room=2)
    step.shrinking.begin()
    losses = [
        float(step.shrinking.run(numbers, step.run_pass)) for numbers in ([1.0, 2.0], [3.0, 4.0, 5.0, 6.0], [7.0, 8.0])
    ]
    assert losses == [3.0, 18.0, 15.0]
    assert step.gradient == 36.0
    assert step.counted == 8
    assert step.passes[2:] == [[1.0], [2.0], [3.0, 4.0], [5.0, 6.0], [7.0], [8.0]], "later passes stay small"


def test_what_cannot_be_cut_ends_the_run() -> None:
    step = Step(room=0)
    step.shrinking.begin()
    with pytest.raises(RankStopped, match="a pass of a single row"):
        step.shrinking.run([1.0, 2.0], step.run_pass)


def test_other_errors_are_not_touched() -> None:
    step = Step(room=9)
    step.shrinking.begin()
    with pytest.raises(IndexError):
        step.shrinking.run([], step.run_pass)


RUN = """
import json, resource, sys
import torch
from sft.data.loading.collator import Collator
from sft.loss.token_loss import token_loss
from sft.training.oom_retry import OomRetry
from sft.training.split_batch import split_batch
from tests.builders import tiny_llama
from tests.training.test_oom_retry import rows

limited = sys.argv[1] == "limited"
model = tiny_llama(4000)
optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
collate = Collator(0)
steps = [[collate(rows(*[60 + s + i + 4 * p for i in range(8)])) for p in range(2)] for s in range(6)]

def field(name):
    for line in open("/proc/self/status"):
        if line.startswith(name):
            return int(line.split()[1]) * 1024

def run_pass(batch):
    logits = model(batch["input_ids"], attention_mask=batch["attention_mask"], use_cache=False).logits
    loss = token_loss(logits, batch["labels"]).objective / tokens
    loss.backward()
    return loss

passes = OomRetry(split_batch, model.zero_grad, lambda: None, lambda _: None)
curve, cuts = [], []
for number, step in enumerate(steps):
    tokens = sum(len(batch["trained_positions"]) for batch in step)
    passes.begin()
    if limited and number == 3:
        needed = field("VmPeak") - field("VmSize")  # of a whole pass, over what is held between steps
        room = field("VmSize") + round(0.75 * needed)
        resource.setrlimit(resource.RLIMIT_AS, (room, room))
    curve.append(float(sum(passes.run(batch, run_pass) for batch in step)))
    cuts.append(passes.cuts)
    optimizer.step()
    optimizer.zero_grad()
print(json.dumps({"curve": curve, "cuts": cuts}))
"""


def trained(kind: str) -> dict[str, list[float]]:
    # Blocks from 64 kB on are mapped and unmapped one by one, so that the address space is what is in use.
    env = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536", "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-c", RUN, kind], cwd=ROOT, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout)


@pytest.mark.slow
def test_a_run_whose_allocator_fails_goes_on_with_the_same_losses() -> None:
    free, limited = trained("free"), trained("limited")
    assert free["cuts"] == [0] * 6
    assert limited["cuts"][:3] == [0, 0, 0]
    assert limited["cuts"][3:] == [1, 1, 1], "one cut was needed, and one was enough"
    assert free["curve"][-1] < 0.95 * free["curve"][0], "nothing was learned, so that nothing was compared"
    assert limited["curve"] == pytest.approx(free["curve"], abs=1e-5)
