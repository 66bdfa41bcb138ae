"""Master weights that are split into weight and remainder, and stepped as whole ones are."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from bitsandbytes.optim import AdamW, AdamW8bit, Lion8bit
from safetensors.torch import load_file
from transformers import Adafactor

import sft_main
from sft.errors import UserError
from sft.training.optim.master_weights import MASTERS, MasterWeights
from sft.training.optim.split_master_weights import LARGEST_PIECE, SplitMasters, join, split
from tests import builders
from tests.runs import arithmetic, write_config, write_rows

EVERY_LOWER_HALF = torch.arange(2**16)
UPPER_HALVES = {
    "zero and denormals": range(0x0082),
    "numbers": (*range(0x3F7E, 0x3F83), *range(0x00FE, 0x0103)),
    "the largest, infinity and NaN": range(0x7F7E, 0x7F83),
    "the last NaN": (0x7FFE, 0x7FFF),
}


def floats(uppers: Any) -> torch.Tensor:
    """Every float32 number with one of these upper halves, of both signs."""
    halves = torch.tensor([upper | sign for upper in uppers for sign in (0, 0x8000)])
    bits = (halves[:, None] * 2**16 + EVERY_LOWER_HALF).flatten()
    return torch.where(bits >= 2**31, bits - 2**32, bits).to(torch.int32).view(torch.float32)


def halves_of(values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    weights, remainders = torch.empty_like(values, dtype=torch.bfloat16), torch.empty_like(values, dtype=torch.int16)
    split(values.clone(), weights, remainders)
    return weights, remainders


@pytest.mark.parametrize("kind", UPPER_HALVES)
@pytest.mark.parametrize("length", [None, 1, 7, 31])
def test_every_number_is_restored_to_the_last_bit(kind: str, length: int | None) -> None:
    """Also in tensors too short for vector instructions."""
    values = floats(UPPER_HALVES[kind])
    if length is not None:
        values = values[:: len(values) // length][:length]
    weights, remainders = halves_of(values)
    back = torch.empty_like(values)
    join(weights, remainders, back)
    is_nan = values.isnan()
    assert back.view(torch.int32)[~is_nan].equal(values.view(torch.int32)[~is_nan])
    assert back.isnan().equal(is_nan)


@pytest.mark.parametrize("kind", UPPER_HALVES)
def test_a_weight_is_the_rounding_of_its_value(kind: str) -> None:
    """Halfway between two bfloat16 numbers it is the larger one, unlike with rounding to even."""
    values = floats(UPPER_HALVES[kind])
    weights, _ = halves_of(values)
    is_nan = values.isnan()
    is_halfway = (values.view(torch.int32) & 0xFFFF) == 0x8000
    rounded = values.bfloat16()
    clear = ~is_nan & ~is_halfway
    assert weights.view(torch.int16)[clear].equal(rounded.view(torch.int16)[clear])
    assert weights.isnan().equal(is_nan)
    halfway = ~is_nan & is_halfway
    further = ((values.view(torch.int32)[halfway] >> 16) + 1).to(torch.int16)
    assert weights.view(torch.int16)[halfway].equal(further)


# Steps


def layers() -> torch.nn.Module:
    """Weights of several sizes, one without gradient, one in float32, one of a single number."""
    torch.manual_seed(0)
    model: Any = torch.nn.Sequential(torch.nn.Linear(64, 96), torch.nn.Linear(96, 48), torch.nn.LayerNorm(48))
    model.bfloat16()
    model[2].weight = torch.nn.Parameter(torch.ones(48))
    model.unused = torch.nn.Parameter(torch.ones(5, dtype=torch.bfloat16))
    model.single = torch.nn.Parameter(torch.ones((), dtype=torch.bfloat16))
    return model  # type: ignore[no-any-return]


def gradients_of(model: Any, step: int) -> None:
    generator = torch.Generator().manual_seed(step)
    for parameter in model.parameters():
        if parameter is not model.unused:
            gradient = torch.randn(parameter.shape, generator=generator).bfloat16()
            parameter.grad = gradient.to(parameter.grad_dtype or parameter.dtype)


def groups(model: Any) -> list[dict[str, Any]]:
    return [
        {"params": [p for p in model.parameters() if p.ndim > 1], "weight_decay": 0.1},
        {"params": [p for p in model.parameters() if p.ndim <= 1], "weight_decay": 0.0},
    ]


OPTIMIZERS: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "fused": lambda params: torch.optim.AdamW(params, lr=1e-4, fused=True),
    "foreach": lambda params: torch.optim.AdamW(params, lr=1e-4, foreach=True),
    "momentum": lambda params: torch.optim.SGD(params, lr=1e-3, momentum=0.9),
    "adafactor": lambda params: Adafactor(params, lr=1e-3, relative_step=False, scale_parameter=False),
    "adamw 8 bits": lambda params: AdamW8bit(params, lr=1e-4, min_8bit_size=256),
    "lion 8 bits": lambda params: Lion8bit(params, lr=1e-4, min_8bit_size=256),
    "adamw 32 bits": lambda params: AdamW(params, lr=1e-4),
    "a strange one": lambda params: Counting(params, lr=1e-3),
}


class Counting(torch.optim.SGD):
    """Scales updates by the number of its steps: stepped in buckets, it would count too many."""

    __module__ = "somewhere.else"

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        self.count = getattr(self, "count", 0) + 1
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    parameter.data.add_(parameter.grad, alpha=-group["lr"] / self.count)


def values_in(masters: MasterWeights) -> dict[int, torch.Tensor]:
    if not isinstance(masters, SplitMasters):
        return {id(weight): master.detach() for weight, master in masters.pairs}
    remainders: dict[torch.nn.Parameter, list[torch.Tensor]] = {}
    for (weight, _), remainder in zip(masters.pairs, masters.state_dict()[MASTERS], strict=True):
        remainders.setdefault(weight, []).append(remainder.flatten())
    values = {id(weight): torch.empty_like(weight, dtype=torch.float32) for weight in remainders}
    for weight, parts in remainders.items():
        join(weight.detach(), torch.cat(parts).view_as(weight), values[id(weight)])
    return values


@pytest.mark.parametrize("is_one_pass", [False, True])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_steps_are_those_over_whole_values(name: str, is_one_pass: bool) -> None:
    """To the last bit, in buckets of a few weights and pieces of a few rows."""
    # 8-bit states have a scale for each block of 256 elements: slices would have other blocks.
    largest = LARGEST_PIECE if "8 bits" in name else 640
    model, twin = layers(), layers()
    optimizer = OPTIMIZERS[name](groups(model))
    summed: list[Any] | None = [] if is_one_pass else None
    ours = SplitMasters(optimizer, summed, largest_piece=largest, bucket_size=1000)
    whole = MasterWeights(OPTIMIZERS[name](groups(twin)))
    for step in range(12):
        for each, masters in ((model, ours), (twin, whole)):
            gradients_of(each, step)
            masters.scale_gradients(torch.tensor(0.37))
            masters.step()
            masters.zero_grad()
    halves, exact = values_in(ours), values_in(whole)
    for (label, mine), theirs in zip(model.named_parameters(), twin.parameters(), strict=True):
        if mine.dtype == torch.bfloat16:
            assert halves[id(mine)].equal(exact[id(theirs)]), label
            assert mine.equal(theirs)
            assert mine.grad_dtype == (torch.bfloat16 if is_one_pass else torch.float32)
        else:
            assert mine.equal(theirs)
    assert not model[0].weight.equal(layers()[0].weight)  # type: ignore[index]


def test_the_optimizer_holds_all_parameters_between_steps_but_values_only_during_a_step() -> None:
    model: Any = layers()
    masters = SplitMasters(torch.optim.AdamW(groups(model), fused=True))
    gradients_of(model, 0)
    masters.step()
    held = [p for group in masters.param_groups for p in group["params"]]
    assert len(held) == len(list(model.parameters()))
    stand_ins = [master for _, master in masters.pairs]
    assert all(p.untyped_storage().nbytes() == 4 and p.grad is None for p in stand_ins)
    assert {id(p) for p in masters.state} == {id(p) for p in held if p.shape != (5,)}


def test_a_weight_takes_eight_bytes_with_8_bit_states() -> None:
    """Weight, remainder, gradient and two states of a byte; and of 256 numbers two scales."""
    model = torch.nn.Linear(1024, 1024, bias=False).bfloat16()
    masters = SplitMasters(AdamW8bit(model.parameters()), summed=[])
    model(torch.randn(4, 1024).bfloat16()).sum().backward()
    masters.step()
    kept: list[Any] = [model.weight, model.weight.grad, *masters.state_dict()[MASTERS], *(m for _, m in masters.pairs)]
    kept += [value for state in masters.state.values() for value in state.values() if isinstance(value, torch.Tensor)]
    of_this_weight = sum(t.untyped_storage().nbytes() for t in kept if t.shape != (256,))  # not the table of all states
    assert of_this_weight == 2**20 * (2 + 2 + 2 + 1 + 1) + 2 * 4 * 2**20 // 256 + 4


# A resume


@pytest.mark.parametrize("name", [name for name in OPTIMIZERS if name != "a strange one"])  # which saves no count
def test_a_resume_is_exact(name: str, tmp_path: Path) -> None:
    def made(model: Any, masters: SplitMasters, steps: range) -> None:
        for step in steps:
            gradients_of(model, step)
            masters.step()
            masters.zero_grad()

    whole, stopped, resumed = layers(), layers(), layers()
    optimizers = [SplitMasters(OPTIMIZERS[name](groups(model))) for model in (whole, stopped, resumed)]
    made(whole, optimizers[0], range(10))
    made(stopped, optimizers[1], range(6))
    torch.save((stopped.state_dict(), optimizers[1].state_dict()), tmp_path / "saved.pt")
    weights, state = torch.load(tmp_path / "saved.pt", weights_only=True)
    resumed.load_state_dict(weights)
    optimizers[2].load_state_dict(state)
    made(resumed, optimizers[2], range(6, 10))
    assert all(a.equal(b) for a, b in zip(whole.parameters(), resumed.parameters(), strict=True))
    for a, b in zip(values_in(optimizers[0]).values(), values_in(optimizers[2]).values(), strict=True):
        assert a.equal(b)


def test_a_state_is_refused_for_other_weights_than_it_was_saved_with() -> None:
    model, other = layers(), layers()
    masters = SplitMasters(OPTIMIZERS["fused"](groups(model)))
    gradients_of(model, 0)
    masters.step()
    with pytest.raises(UserError, match="the optimizer state belongs to other weights"):
        SplitMasters(OPTIMIZERS["fused"](groups(other))).load_state_dict(masters.state_dict())


def test_a_state_with_float32_masters_is_loaded_but_not_the_other_way_round() -> None:
    model, later = layers(), layers()
    whole = MasterWeights(OPTIMIZERS["fused"](groups(model)))
    gradients_of(model, 0)
    whole.step()
    halves = SplitMasters(OPTIMIZERS["fused"](groups(later)))
    halves.load_state_dict(copy.deepcopy(whole.state_dict()))
    assert [value.tolist() for value in values_in(halves).values()] == [
        value.tolist() for value in values_in(whole).values()
    ]
    assert all(
        a.equal(b) for a, b in zip(model.parameters(), later.parameters(), strict=True) if a.dtype != torch.float
    )
    with pytest.raises(UserError, match="of an optimizer with 8-bit states"):
        whole.load_state_dict(halves.state_dict())
    plain = OPTIMIZERS["fused"](groups(layers())).state_dict()
    with pytest.raises(UserError, match="no float32 values"):
        halves.load_state_dict(plain)


# Real runs


def weights_after_a_run(folder: Path, name: str, *overrides: str) -> dict[str, torch.Tensor]:
    """Ten steps in bfloat16 with 8-bit states: learned quickly enough that clipping and all digits matter."""
    if not (folder / "run.yaml").exists():
        write_config(
            folder / "run.yaml",
            model_name_or_path=str(builders.save_model_dir(folder / "model")),
            dtype="bfloat16",
            train_file=str(write_rows(folder / "train.jsonl", arithmetic(40))),
            cache_dir=str(folder / "cache"),
            max_seq_length=128,
            optim="adamw_8bit",
            per_device_train_batch_size=4,
            gradient_accumulation_steps=1,
            max_grad_norm=0.5,
            learning_rate=1e-3,
            loss_chunk_size=16,
            max_steps=10,
            logging_steps=1,
            save_steps=5,
            eval_strategy="no",
        )
    out = folder / name
    assert sft_main.main(["--config_file", str(folder / "run.yaml"), f"output_dir={out}", *overrides]) == 0
    return load_file(out / "model.safetensors")


@pytest.mark.parametrize("is_tied", [False, True])
def test_bfloat16_gradients_of_one_micro_batch_change_no_bit(
    is_tied: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Against gradients in float32 throughout, with a head whose loss is made in chunks, or that embeds as well."""
    monkeypatch.setattr(builders, "tiny_llama", partial(builders.tiny_llama, tie_word_embeddings=is_tied))
    dtypes: list[set[torch.dtype | None]] = []
    build = SplitMasters.__init__

    def build_and_note(self: SplitMasters, inner: Any, summed: Any = None) -> None:
        build(self, inner, summed if not dtypes else None)  # in the second run all gradients are in float32
        dtypes.append({weight.grad_dtype for weight, _ in self.pairs})

    monkeypatch.setattr(SplitMasters, "__init__", build_and_note)
    ours = weights_after_a_run(tmp_path, "bfloat16")
    exact = weights_after_a_run(tmp_path, "float32")
    assert dtypes == [{torch.bfloat16, torch.float32}, {torch.float32}]
    assert ours.keys() == exact.keys()
    assert all(ours[name].equal(exact[name]) for name in ours)


def test_a_resumed_run_is_exact(tmp_path: Path) -> None:
    whole = weights_after_a_run(tmp_path, "whole")
    resumed = weights_after_a_run(tmp_path, "resumed", f"resume_from_checkpoint={tmp_path}/whole/checkpoint-5")
    assert all(whole[name].equal(resumed[name]) for name in whole)
