"""Activation checkpointing keeps less memory and changes no number."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Collection
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch.autograd.graph import saved_tensors_hooks
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from model_manager import load_model, load_tokenizer, plan_precision
from sft.config.schema import LoraKeys, ModelKeys, QuantizationKeys
from sft.errors import UserError
from sft.model import activation_checkpointing
from sft.model.activation_checkpointing import HostMemory, checkpoint_activations, costly_operators
from sft.model.attention import document_attention
from tests.builders import tiny_llama

TOKENS = 96


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of all live tensors that were made inside; `peak` is the most at any time."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._refs: dict[int, weakref.ref[Any]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if (
                isinstance(tensor, torch.Tensor)
                and (key := (storage := tensor.untyped_storage())._cdata) not in self._refs
            ):
                size = storage.nbytes()
                self._refs[key] = weakref.ref(storage, partial(self._forget, key, size))
                self.now += size
                self.peak = max(self.peak, self.now)
        return out

    def _forget(self, key: int, size: int, _: object) -> None:
        self._refs.pop(key, None)
        self.now -= size


class Calls(TorchDispatchMode):
    """Counts the calls of some operators, by default of the costly ones."""

    def __init__(self, operators: Collection[Any] | None = None) -> None:
        super().__init__()
        self._operators = costly_operators() if operators is None else operators
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += func in self._operators
        return func(*args, **(kwargs or {}))


def llama(**overrides: Any) -> Any:
    return tiny_llama(100, attention_dropout=0.1, **overrides).train()


def adapted() -> Any:
    """Dropout in the adapter as well: a recomputation must draw the same numbers."""
    torch.manual_seed(1)
    lora = LoraConfig(r=4, target_modules="all-linear", lora_dropout=0.2, init_lora_weights=False)
    return get_peft_model(llama().bfloat16(), lora).train()


def forward(model: Any) -> torch.Tensor:
    """The loss of two documents in one row, separated by `position_ids`, a keyword."""
    torch.manual_seed(0)
    ids = torch.randint(0, 100, (1, TOKENS))
    positions = torch.cat([torch.arange(TOKENS // 3), torch.arange(TOKENS - TOKENS // 3)])[None]
    return model(ids, position_ids=positions, use_cache=False).logits.float().pow(2).mean()


def gradients(model: Any) -> list[torch.Tensor]:
    forward(model).backward()
    return [parameter.grad for parameter in model.parameters() if parameter.requires_grad]


@pytest.mark.parametrize("make", [llama, adapted])
@pytest.mark.parametrize("mode", ["selective", "full"])
def test_gradients_are_the_same_to_the_last_bit(make: Callable[[], Any], mode: Any) -> None:
    plain, model = make(), make()
    checkpoint_activations(model, mode)
    pairs = list(zip(gradients(plain), gradients(model), strict=True))
    assert len(pairs) > 10
    assert any(one.abs().max() > 0 for one, _ in pairs)
    assert all(one.equal(other) for one, other in pairs)


def held_after_forward(mode: Any) -> int:
    model = llama(num_hidden_layers=4)
    checkpoint_activations(model, mode)
    with LiveBytes() as live:
        loss = forward(model)
        held = live.now
        loss.backward()
    return held


def test_selective_keeps_less_and_full_the_least() -> None:
    none, selective, full = (held_after_forward(mode) for mode in ("none", "selective", "full"))
    assert selective < 0.75 * none
    assert full < 0.55 * selective


@pytest.mark.parametrize(("mode", "repeated"), [("none", 0), ("selective", 0), ("full", 14)])
def test_selective_recomputes_no_costly_operator(mode: Any, repeated: int) -> None:
    """Two layers of seven linear maps and an attention. No gradient in a layer needs the result of its last map: even
    `full` does not recompute that one.
    """
    counts = []
    for each in ("none", mode):
        model = tiny_llama(100).train()
        checkpoint_activations(model, each)
        loss = forward(model)
        with Calls() as backward:
            loss.backward()
        counts.append(backward.count)
    assert counts[1] - counts[0] == repeated


@pytest.mark.parametrize(("mode", "repeated"), [("selective", 0), ("full", 14)])
def test_results_of_4_bit_layers_are_kept_too(model_dir: Path, mode: Any, repeated: int) -> None:
    """Two layers of seven linear maps, each of which dequantizes its weights first."""
    calls = []
    for each in ("none", mode):
        keys, lora = ModelKeys(model_name_or_path=str(model_dir)), LoraKeys(r=2)
        quantization = QuantizationKeys(load_in_4bit=True)
        tokenizer, precision = load_tokenizer(keys), plan_precision(keys, lora, quantization)
        model = load_model(keys, tokenizer, precision=precision, lora=lora, quantization=quantization).train()
        checkpoint_activations(model, each)
        loss = forward(model)
        with Calls([torch.ops.bitsandbytes.gemm_4bit.default]) as backward:
            loss.backward()
        calls.append(backward.count)
    assert calls[1] - calls[0] == repeated


def test_results_of_document_attention_are_kept_on_cpu_and_gpu() -> None:
    """The operators exist before the first layer runs, when they are listed for the whole run."""
    document_attention.register()
    costly_operators.cache_clear()
    names = {str(operator) for operator in costly_operators()}
    assert {"torch_attn._varlen_attn.default", "sft.document_attention.default"} <= names
    assert {"aten.mm.default", "aten._scaled_dot_product_flash_attention.default"} <= names


def test_graph_saves_only_the_inputs_of_layers_under_full() -> None:
    saved: list[int] = []

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        saved.append(tensor.nbytes)
        return tensor

    def counted(mode: Any) -> tuple[int, int]:
        model = llama(num_hidden_layers=4)
        checkpoint_activations(model, mode)
        saved.clear()
        with saved_tensors_hooks(pack, lambda tensor: tensor):
            forward(model)
        return len(saved), sum(saved)

    (many, large), (few, small) = counted("none"), counted("full")
    assert few < many / 3
    assert small < large / 3


def test_none_turns_checkpointing_off() -> None:
    model = llama()
    checkpoint_activations(model, "full")
    checkpoint_activations(model, "none")
    assert not model.is_gradient_checkpointing


def test_impossible_settings_are_refused() -> None:
    with pytest.raises(UserError, match="cannot be recomputed"):
        checkpoint_activations(torch.nn.Linear(2, 2), "full")
    with pytest.raises(UserError, match="in main memory already") as caught:
        checkpoint_activations(llama(), "full", offload=True)
    assert caught.value.problems[0].key == "activation_checkpoint.offload"
    with pytest.raises(UserError, match="every activation"):
        checkpoint_activations(llama(), "none", offload=True)


def test_offload_depends_on_where_the_model_will_be_trained(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A model for a GPU is in main memory or on the meta device at that time; a meta model has nothing to copy."""
    gpu = torch.device("cuda", 0)
    hosts: list[torch.device] = []
    monkeypatch.setattr(activation_checkpointing, "HostMemory", hosts.append)
    checkpoint_activations(llama(), "full", offload=True, device=gpu)
    assert hosts == [gpu]
    with torch.device("meta"):
        meta = tiny_llama(100).train()
    checkpoint_activations(meta, "full", offload=True, device=gpu)
    assert meta.is_gradient_checkpointing
    assert hosts == [gpu]
    for model in (meta, llama()):
        with pytest.raises(UserError, match="trained on the CPU"):  # by an estimate as by a run
            checkpoint_activations(model, "full", offload=True, device=torch.device("cpu"))


def test_offloaded_tensors_come_back_unchanged_and_are_fetched_one_ahead() -> None:
    """The CPU's streams do nothing: this tests the bookkeeping; copies overlap on a GPU alone."""
    host = HostMemory(torch.device("cpu"))
    tensors = [torch.randn(600, 600) for _ in range(3)]
    offloaded: Any = [host.pack(tensor) for tensor in tensors]
    assert all(entry.host is not tensor for entry, tensor in zip(offloaded, tensors, strict=True))
    assert host.unpack(offloaded[2]).equal(tensors[2])
    assert offloaded[1].fetched is not None
    assert offloaded[0].fetched is None
    assert host.unpack(offloaded[1]).equal(tensors[1])
    assert host.unpack(offloaded[0]).equal(tensors[0])
    small, weight = torch.ones(3), torch.nn.Parameter(torch.zeros(600, 600))
    assert host.pack(small) is small
    assert host.pack(weight) is weight


def test_offloaded_inputs_give_the_same_gradients() -> None:
    wide = {"hidden_size": 512, "num_attention_heads": 8, "max_position_embeddings": 1024}
    plain, model = (tiny_llama(50, **wide).train() for _ in range(2))
    host = HostMemory(torch.device("cpu"))
    packed = []

    def pack(tensor: torch.Tensor) -> Any:
        packed.append(host.pack(tensor))
        return packed[-1]

    def unpack(entry: Any) -> torch.Tensor:
        return host.unpack(entry)

    checkpoint_activations(model, "full")
    ids = torch.arange(1024)[None] % 50
    plain(ids, use_cache=False).logits.pow(2).mean().backward()
    with saved_tensors_hooks(pack, unpack):
        loss = model(ids, use_cache=False).logits.pow(2).mean()
    loss.backward()
    assert any(not isinstance(entry, torch.Tensor) for entry in packed)
    pairs = zip(plain.parameters(), model.parameters(), strict=True)
    assert all(one.grad.equal(other.grad) for one, other in pairs if one.grad is not None and other.grad is not None)
