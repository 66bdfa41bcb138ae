"""Master weights of sharded bfloat16 weights are those of one process, to the last bit."""

from __future__ import annotations

import copy
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

from sft.distributed.dtensor import to_full
from sft.loss.forward import TokenForward
from sft.loss.token_loss import LossSettings
from sft.training.optim.factory import find_fused_adam, with_master_weights
from sft.training.optim.grad_norm import gradient_norms, total_norm
from sft.training.optim.split_master_weights import SplitMasters
from tests.loss.test_fused_linear import batch, llama
from tests.loss.test_vocab_parallel import fully_sharded, tensor_parallel
from tests.ranks import spawn_ranks

pytestmark = pytest.mark.slow

STEPS = 5
SCALE = torch.tensor(1 / 32)  # a power of 2: scaling changes no rounding


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


def skip_a_step(model: Any, optimizer: Any) -> None:
    """A step with NaN gradients, which the optimizer skips."""
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
    """Sharded parameters are a group of their own: a fused step cannot mix them with others."""
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
    """The weights are stored in float32 and gathered in bfloat16: they are their own masters."""
    model = llama().bfloat16().float()
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    fully_sharded(model, "own", mesh, mp_policy=policy)
    optimizer = with_master_weights(adamw(model))
    trained(model, optimizer, [rank], 2 * SCALE)
    skip_a_step(model, optimizer)
    assert all(isinstance(p, DTensor) for p in model.parameters())
    return {name: to_full(p.detach()) for name, p in model.named_parameters()}


def stepped(model: Any, start: int, state: dict[str, Any] | None = None) -> Any:
    """Steps on random gradients, the same whatever mesh the weights are sharded over."""
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
    """The weights are in bfloat16, some of them sharded; a second optimizer resumes from the state of the first."""
    model = llama().bfloat16()
    tensor_parallel(model, "slices", mesh)
    state = stepped(model, 0).state_dict()
    assert len({type(p) for p in model.parameters()}) == 2
    skip_a_step(model, stepped(model, STEPS, state))
    return {name: to_full(p.detach()) for name, p in model.named_parameters()}


def split_masters(mesh: DeviceMesh | None = None) -> dict[str, torch.Tensor]:
    """Steps of `SplitMasters` over linear layers with an odd number of rows, whose shards differ in size."""
    torch.manual_seed(0)
    model: Any = torch.nn.Sequential(torch.nn.Linear(64, 33), torch.nn.Linear(33, 17)).bfloat16()
    if mesh:
        fully_shard(model, mesh=mesh, reshard_after_forward=False)
        assert isinstance(model[0].weight, DTensor)
    masters = SplitMasters(torch.optim.AdamW(model.parameters(), lr=1e-3, fused=True), summed=[])
    for step in range(STEPS):
        inputs = torch.randn(8, 64, generator=torch.Generator().manual_seed(step)).bfloat16()
        model(inputs).float().pow(2).sum().backward()  # the same rows on each rank: the mean is each one's gradient
        masters.step()
        masters.zero_grad()
    return {name: to_full(p.detach()) if mesh else p.detach() for name, p in model.named_parameters()}


def _on_rank(rank: int, folder: Path) -> None:
    mesh = init_device_mesh("cpu", (2,))
    runs = (("fsdp", partial(_fully_sharded, rank)), ("tp", _tensor_parallel), ("split", split_masters))
    for name, run in runs:
        torch.save(run(mesh), f"{folder}/{name}{rank}.pt")


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("two")
    spawn_ranks(_on_rank, folder, 2)
    return folder


def test_fully_sharded_float32_weights_gathered_in_bfloat16_are_their_own_masters(two_ranks: Path) -> None:
    expected = on_one_process([0, 1])
    for rank in range(2):
        found = torch.load(two_ranks / f"fsdp{rank}.pt")
        assert found.keys() == expected.keys()
        for name, value in expected.items():
            assert found[name].equal(value), name


def test_masters_of_tensor_parallel_weights_are_sharded_likewise(two_ranks: Path) -> None:
    model = llama().bfloat16()
    state = stepped(model, 0).state_dict()
    stepped(model, STEPS, state)
    for rank in range(2):
        found = torch.load(two_ranks / f"tp{rank}.pt")
        for name, value in model.named_parameters():
            assert found[name].equal(value), name


def test_split_masters_of_sharded_weights_are_stepped_in_place(two_ranks: Path) -> None:
    expected = split_masters()
    for rank in range(2):
        found = torch.load(two_ranks / f"split{rank}.pt")
        assert all(found[name].equal(value) for name, value in expected.items())
