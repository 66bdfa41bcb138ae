"""Float32 values of bfloat16 weights that are spread over ranks: those of one process, to the last bit."""

from __future__ import annotations

import copy
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy
from torch.distributed.tensor import DTensor, distribute_tensor

from sft.distributed.dtensor import to_full
from sft.loss.forward import TokenForward
from sft.loss.token_loss import LossSettings
from sft.training.optim.factory import find_fused_adam, with_master_weights
from sft.training.optim.grad_norm import gradient_norms, total_norm
from tests.loss.test_fused_linear import batch, llama
from tests.loss.test_vocab_parallel import fully_sharded, tensor_parallel
from tests.ranks import spawn_ranks

pytestmark = pytest.mark.slow

STEPS = 5
SCALE = torch.tensor(1 / 32)  # a power of 2, so that a rank's share of it rounds as the whole does


def rows_of(step: int, rank: int) -> dict[str, Any]:
    return {**batch(2 * step + rank), "trained_positions": None}


def trained(model: Any, optimizer: Any, ranks: list[int], scale: torch.Tensor) -> None:
    """Steps over the rows of these ranks, a pass each."""
    forward = TokenForward(model.train(), LossSettings(chunk_size=64))
    for step in range(STEPS):
        for rank in ranks:
            (forward(model, rows_of(step, rank), scale).objective * scale).backward()
        optimizer.step()
        optimizer.zero_grad()


def leave_out_a_step(model: Any, optimizer: Any) -> None:
    """A step on gradients that are NaN, which the optimizer is told not to make."""
    fused: Any = find_fused_adam(optimizer)
    for parameter in model.parameters():
        parameter.grad = torch.full_like(parameter, torch.nan, dtype=torch.float32)
    norm = total_norm(gradient_norms(model.named_parameters()).values())
    assert norm.isnan()
    fused.found_inf = torch.ones(())
    optimizer.step()
    optimizer.zero_grad()
    fused.found_inf = torch.zeros(())


def adamw(model: Any) -> torch.optim.Optimizer:
    """Parameters that are spread over ranks are a group of their own: one fused step takes no others with them."""
    groups: dict[Any, list[Any]] = {}
    for parameter in model.parameters():
        groups.setdefault(getattr(parameter, "device_mesh", None), []).append(parameter)
    return torch.optim.AdamW([{"params": group} for group in groups.values()], lr=1e-3, fused=True)


def on_one_process(ranks: list[int]) -> dict[str, torch.Tensor]:
    """The float32 values of all weights, by name."""
    model = llama().bfloat16()
    optimizer = with_master_weights(adamw(model))
    trained(model, optimizer, ranks, SCALE)
    state = optimizer.state_dict()["master_weights"]
    return dict(zip((name for name, _ in model.named_parameters()), state, strict=True))


def _fully_sharded(rank: int, mesh: DeviceMesh) -> dict[str, torch.Tensor]:
    """The weights are held in float32 and gathered in bfloat16: they are their own masters."""
    model = llama().bfloat16().float()
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    fully_sharded(model, "own", mesh, mp_policy=policy)
    optimizer = with_master_weights(adamw(model))
    trained(model, optimizer, [rank], 2 * SCALE)
    leave_out_a_step(model, optimizer)
    assert all(isinstance(p, DTensor) for p in model.parameters())
    return {name: to_full(p.detach()) for name, p in model.named_parameters()}


def stepped(model: Any, start: int, state: dict[str, Any] | None = None) -> Any:
    """Steps on gradients drawn at random, the same whatever the weights are spread over."""
    optimizer = with_master_weights(adamw(model))
    if state:
        optimizer.load_state_dict(copy.deepcopy(state))
    for step in range(start, start + STEPS):
        generator = torch.Generator().manual_seed(step)
        for parameter in model.parameters():
            gradient = torch.randn(parameter.shape, generator=generator)
            spread = isinstance(parameter, DTensor)
            parameter.grad = (
                distribute_tensor(gradient, parameter.device_mesh, parameter.placements) if spread else gradient
            )
        optimizer.step()
        optimizer.zero_grad()
    return optimizer


def _tensor_parallel(mesh: DeviceMesh) -> dict[str, torch.Tensor]:
    """The weights are held in bfloat16, some spread over the ranks and some not; another optimizer goes on halfway."""
    model = llama().bfloat16()
    tensor_parallel(model, "slices", mesh)
    state = stepped(model, 0).state_dict()
    assert len({type(p) for p in model.parameters()}) == 2
    leave_out_a_step(model, stepped(model, STEPS, state))
    return {name: to_full(p.detach()) for name, p in model.named_parameters()}


def _on_rank(rank: int, folder: Path) -> None:
    mesh = init_device_mesh("cpu", (2,))
    for name, run in (("fsdp", partial(_fully_sharded, rank)), ("tp", _tensor_parallel)):
        torch.save(run(mesh), f"{folder}/{name}{rank}.pt")


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("two")
    spawn_ranks(_on_rank, folder, 2)
    return folder


def test_fully_sharded_weights_that_are_gathered_in_bfloat16_are_masters_of_their_own(two_ranks: Path) -> None:
    expected = on_one_process([0, 1])
    for rank in range(2):
        found = torch.load(two_ranks / f"fsdp{rank}.pt")
        assert found.keys() == expected.keys()
        for name, value in expected.items():
            assert found[name].equal(value), name


def test_masters_of_weights_that_tensor_parallel_splits_are_split_likewise(two_ranks: Path) -> None:
    model = llama().bfloat16()
    state = stepped(model, 0).state_dict()
    stepped(model, STEPS, state)
    for rank in range(2):
        found = torch.load(two_ranks / f"tp{rank}.pt")
        for name, value in model.named_parameters():
            assert found[name].equal(value), name
