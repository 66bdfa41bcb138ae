"""Between two logs a step is queued on the device and nothing is read from it: the host runs ahead."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import sft_main
from sft.data.loading.collator import Collator
from sft.training import nonfinite
from tests.runs import arithmetic, write_config, write_rows
from trainer_utils import SFTTrainer

STEPS = 6
WAITING = {"_local_scalar_dense", "nonzero", "masked_select", "equal", "is_nonzero", "_unique2"}  # for the device


class Reads(TorchDispatchMode):
    """Notes every operation whose result the host must know, with the steps that were made before it."""

    def __init__(self) -> None:
        super().__init__()
        self.trainer: Any = None
        self.found: list[tuple[int, str]] = []
        self.flags: list[tuple[int, int]] = []  # steps made when a copy started, and when it was read
        self.is_host = False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func._schema.name.removeprefix("aten::")
        if name in WAITING and not self.is_host:
            self.found.append((self.trainer.state.global_step, name))
        return func(*args, **(kwargs or {}))

    def on_the_host(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """`function` works on main memory, whatever the device."""

        def run(*args: Any) -> Any:
            was, self.is_host = self.is_host, True
            try:
                return function(*args)
            finally:
                self.is_host = was

        return run

    def copy_to_host(self, flag: torch.Tensor) -> Callable[[], bool]:
        """Replaces the copy of a flag to main memory, which a CPU does not make."""
        left = self.trainer.state.global_step

        def read() -> bool:
            self.flags.append((left, self.trainer.state.global_step))
            return self.on_the_host(bool)(flag)

        return read


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> Reads:
    """Of the runs of a test, while they train."""
    mode, train = Reads(), SFTTrainer._run_epoch

    def run_epoch(self: SFTTrainer, *args: Any, **kwargs: Any) -> Any:
        mode.trainer = self
        with mode:
            return train(self, *args, **kwargs)

    monkeypatch.setattr(SFTTrainer, "_run_epoch", run_epoch)
    monkeypatch.setattr(Collator, "__call__", mode.on_the_host(Collator.__call__))
    monkeypatch.setattr(nonfinite, "copy_to_host", mode.copy_to_host)
    return mode


@pytest.fixture
def config_file(tmp_path: Path, model_dir: Path) -> Path:
    return write_config(
        tmp_path / "run.yaml",
        model_name_or_path=str(model_dir),
        train_file=str(write_rows(tmp_path / "train.jsonl", arithmetic(40))),
        cache_dir=str(tmp_path / "cache"),
        output_dir=str(tmp_path / "out"),
        max_seq_length=128,
        per_device_train_batch_size=2,
        gradient_accumulation_steps=2,
        max_steps=STEPS,
        logging_strategy="no",
        save_strategy="no",
    )


@pytest.mark.parametrize(
    "options",
    [[], ["lora_config={r: 4}"], ["dtype=bfloat16"], ["on_nonfinite=skip", "neftune_noise_alpha=5"]],
    ids=["defaults", "lora", "masters", "skip"],
)
def test_no_step_but_the_first_reads_the_device(config_file: Path, reads: Reads, options: list[str]) -> None:
    """Whether a step was made is read after the next step's micro-batches, or at the end; of the first step at once."""
    assert sft_main.main(["--config_file", str(config_file), *options]) == 0
    assert {step for step, _ in reads.found} == {0}, [found for found in reads.found if found[0]]
    assert reads.flags == [(0, 0), *((made, made + 1) for made in range(1, STEPS))]


def test_a_log_reads_once_for_all_steps_before_it(config_file: Path, reads: Reads) -> None:
    assert sft_main.main(["--config_file", str(config_file), "logging_strategy=steps", "logging_steps=4"]) == 0
    assert {step for step, _ in reads.found} == {0, 4, 6}


def test_an_optimizer_that_cannot_skip_on_the_device_waits_for_the_answer(config_file: Path, reads: Reads) -> None:
    assert sft_main.main(["--config_file", str(config_file), "optim=adafactor"]) == 0
    assert reads.flags == [(made, made) for made in range(STEPS)]
