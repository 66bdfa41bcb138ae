"""Optimizers are tried before the run that needs them."""

from __future__ import annotations

import copy
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import Trainer, TrainingArguments

from sft.errors import UserError
from sft.training.optim.factory import require_optimizer, with_master_weights
from tests.builders import tiny_llama


def arguments(folder: Path, optim: str) -> TrainingArguments:
    return TrainingArguments(output_dir=str(folder), optim=optim, use_cpu=True, report_to=[], learning_rate=1e-2)


def one_step(
    folder: Path, optim: str, dtype: torch.dtype = torch.float32
) -> tuple[torch.nn.Module, torch.optim.Optimizer]:
    """The Trainer's own optimizer after a step on a Llama whose layers have matrices of 4,096 and 8,192 numbers."""
    model: Any = tiny_llama(100)
    model.to(dtype)
    optimizer = Trainer(model, arguments(folder, optim)).create_optimizer()
    if dtype == torch.bfloat16:
        optimizer = with_master_weights(optimizer)
    model(torch.arange(100)[None]).logits.float().pow(2).mean().backward()
    optimizer.step()
    return model, optimizer


@pytest.mark.parametrize("optim", ["adamw_torch_fused", "adamw_torch", "sgd", "adafactor", "adamw_8bit", "lion_8bit"])
def test_optimizers_that_run_here_are_accepted(tmp_path: Path, optim: str) -> None:
    require_optimizer(arguments(tmp_path, optim))


def test_the_default_is_fused(tmp_path: Path) -> None:
    _, optimizer = one_step(tmp_path, TrainingArguments(output_dir=str(tmp_path), use_cpu=True).optim)
    assert type(optimizer) is torch.optim.AdamW
    assert all(group["fused"] for group in optimizer.param_groups)


@pytest.mark.parametrize("optim", ["paged_adamw_8bit", "paged_adamw_32bit"])
def test_paging_without_a_gpu_gives_a_warning(tmp_path: Path, optim: str, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, logger="sft"):
        require_optimizer(arguments(tmp_path, optim))
    assert "no GPU memory to page out of" in caplog.text


@pytest.mark.parametrize("optim", ["galore_adamw", "lomo", "adamw_torch_npu_fused"])
def test_optimizers_that_do_not_run_here_are_refused(tmp_path: Path, optim: str) -> None:
    with pytest.raises(UserError) as caught:
        require_optimizer(arguments(tmp_path, optim))
    problem = caught.value.problems[0]
    assert problem.key == "optim"
    assert optim in problem.message


def test_an_optimizer_that_fails_in_its_step_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise RuntimeError("no kernel for this device\nand much more")

    monkeypatch.setattr(torch.optim.SGD, "step", fail)
    with pytest.raises(UserError, match=r"'sgd' does not run on the CPU: no kernel for this device\n    remove"):
        require_optimizer(arguments(tmp_path, "sgd"))


@pytest.mark.parametrize("optim", ["adamw_8bit", "paged_adamw_8bit"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_states_of_8_bits_are_bytes(tmp_path: Path, optim: str, dtype: torch.dtype) -> None:
    """Except those of the embeddings, by the Trainer's choice, and of tensors with fewer than 4,096 elements."""
    model, optimizer = one_step(tmp_path, optim, dtype)
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    assert len(parameters) == len(list(model.parameters()))
    kinds = {tuple(p.shape): optimizer.state[p]["state1"].dtype for p in parameters}
    assert kinds[128, 64] == kinds[64, 128] == kinds[64, 64] == torch.uint8
    assert kinds[64,] == torch.float32
    embedding_bytes = [optimizer.state[p]["state1"].dtype for p in parameters if tuple(p.shape) == (100, 64)]
    assert sorted(map(str, embedding_bytes)) == ["torch.float32", "torch.uint8"]  # the head's are bytes


def test_8_bit_states_resume_from_a_checkpoint(tmp_path: Path) -> None:
    model, optimizer = one_step(tmp_path, "adamw_8bit", torch.bfloat16)
    saved = copy.deepcopy(optimizer.state_dict())
    other_model, other = one_step(tmp_path, "adamw_8bit", torch.bfloat16)
    other.load_state_dict(saved)
    for parameter in other_model.parameters():
        parameter.grad = None
    for each, its in ((model, optimizer), (other_model, other)):
        its.zero_grad()
        each(torch.arange(50)[None]).logits.float().pow(2).mean().backward()
        its.step()
    assert all(a.equal(b) for a, b in zip(model.parameters(), other_model.parameters(), strict=True))
