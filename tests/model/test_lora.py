"""An adapter under autocast gives the same bits as peft's, without casting activations to float32 and back."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch.utils._python_dispatch import TorchDispatchMode

from sft.config.schema import LoraKeys
from sft.model.activation_checkpointing import checkpoint_activations
from sft.model.lora import attach_adapter
from tests.builders import tiny_llama

TOKENS, WIDTH = 48, 64
SETTINGS: dict[str, Any] = {"r": 4, "target_modules": "all-linear", "init_lora_weights": False}


class Casts(TorchDispatchMode):
    """Counts the casts of activations of the hidden state's shape to float32."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        self.count += func is torch.ops.aten._to_copy.default and (out.dtype, out.ndim) == (torch.float32, 3)
        return out


def base() -> Any:
    return tiny_llama(100).bfloat16()


def ours(**overrides: Any) -> Any:
    return attach_adapter(base(), LoraKeys(**{**SETTINGS, **overrides}))[0].train()


def peft_s(like: Any, **overrides: Any) -> Any:
    """The same weights in an adapter as peft makes it."""
    keys = LoraKeys(**{**SETTINGS, **overrides})
    model = get_peft_model(base(), LoraConfig(**keys.kwargs())).train()
    model.load_state_dict(like.state_dict())
    return model


def trained(model: Any) -> tuple[list[torch.Tensor], int]:
    """Logits and gradients under autocast, and the number of casts in the forward pass."""
    ids = torch.randint(0, 100, (2, TOKENS), generator=torch.Generator().manual_seed(0))
    torch.manual_seed(1)  # of dropout
    with torch.autocast("cpu", torch.bfloat16), Casts() as casts:
        logits = model(input_ids=ids, use_cache=False).logits
    logits.float().pow(2).mean().backward()
    gradients = [p.grad for p in model.parameters() if p.requires_grad]
    assert all(gradient.abs().max() > 0 for gradient in gradients)
    return [logits.detach(), *gradients], casts.count


@pytest.mark.parametrize("is_checkpointed", [False, True])
def test_autocast_gets_the_input_uncast_and_every_bit_is_the_same(is_checkpointed: bool) -> None:
    """Two layers of seven adapted linear maps: fourteen casts fewer."""
    model = ours()
    expected, casts = trained(peft_s(model))
    mine = copy.deepcopy(model)
    if is_checkpointed:
        checkpoint_activations(mine, "full")
    found, fewer = trained(mine)
    assert len(found) == len(expected) == 1 + 2 * 7 * 2
    assert all(one.equal(other) for one, other in zip(found, expected, strict=True))
    assert casts - fewer == 14


def test_without_autocast_the_adapter_computes_in_float32() -> None:
    model = ours()
    ids = torch.arange(TOKENS)[None]
    with torch.no_grad():
        assert model(input_ids=ids).logits.equal(peft_s(model)(input_ids=ids).logits)


@pytest.mark.parametrize("overrides", [{"lora_dropout": 0.3}, {"use_dora": True}])
def test_dropout_and_dora_keep_the_input_in_float32(overrides: dict[str, Any]) -> None:
    model = ours(**overrides)
    expected, casts = trained(peft_s(model, **overrides))
    found, same = trained(model)
    assert all(one.equal(other) for one, other in zip(found, expected, strict=True))
    assert same == casts


def initial(seed: int, drawn_before: int = 0, **overrides: Any) -> dict[str, torch.Tensor]:
    """The initial A matrices of the adapter in a run of that seed."""
    model = base().float()
    torch.manual_seed(seed)
    torch.rand(drawn_before)
    adapted, _ = attach_adapter(model, LoraKeys(r=4, **overrides))
    return {name: weight.detach().clone() for name, weight in adapted.named_parameters() if "lora_A" in name}


def are_equal(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return all(torch.equal(one[name], other[name]) for name in one)


def test_an_adapter_is_initialized_from_the_seed_of_its_run() -> None:
    assert are_equal(initial(1), initial(1, drawn_before=7))
    assert not are_equal(initial(1), initial(2))


def test_an_initialization_that_changes_the_base_is_the_same_in_each_run() -> None:
    """It is repeated, without the run's seed, when the adapter is loaded."""
    assert are_equal(initial(1, init_lora_weights="pissa_niter_2"), initial(2, init_lora_weights="pissa_niter_2"))


def test_the_random_state_is_restored() -> None:
    model = base()
    torch.manual_seed(3)
    expected = torch.rand(2)
    torch.manual_seed(3)
    attach_adapter(model, LoraKeys(r=4))
    assert torch.equal(torch.rand(2), expected)
