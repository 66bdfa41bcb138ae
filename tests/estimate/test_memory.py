"""The estimate of a rank's memory against what is really allocated."""

from __future__ import annotations

from functools import partial
from typing import Any

import bitsandbytes as bnb
import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import Adafactor

from sft.data.loading.collator import Collator
from sft.estimate.memory import OptimizerMemory, estimate_memory, optimizer_memory
from sft.estimate.memory_trace import AllocationTrace, as_fake, fake_batch, trace_pass
from sft.model.meta_quantization import fake_quantize, packed_bytes
from tests.builders import tiny_llama
from tests.training.test_oom_retry import rows

CPU = torch.device("cpu")
NOTHING = OptimizerMemory()


def fake_llama(mode: FakeTensorMode, lora: bool = False, **overrides: Any) -> nn.Module:
    """The tiny Llama on fake tensors."""
    with torch.device("meta"):
        model: Any = tiny_llama(400, attn_implementation="eager", **overrides)
        if lora:
            model = get_peft_model(model, LoraConfig(r=4, target_modules="all-linear"))
    return as_fake(model, mode, CPU).train()


def batch_of(mode: FakeTensorMode | None = None) -> dict[str, Any]:
    batch = Collator(0)(rows(100, 90))
    return fake_batch(batch, mode, CPU) if mode else batch


def loss_of(model: nn.Module, batch: dict[str, Any]) -> torch.Tensor:
    inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
    return model(**inputs, use_cache=False).logits.float().logsumexp(-1).sum()


# One micro-batch


def test_a_pass_is_counted_to_the_byte() -> None:
    """y = x Wᵀ and y² of 1000 × 512 numbers, and the sum, one number; backward makes dy, then dW of 512 × 256."""
    mode = FakeTensorMode()
    with torch.device("meta"):
        model = nn.Linear(256, 512, bias=False)
    as_fake(model, mode, CPU)
    with mode:
        x = torch.empty(1000, 256)
    trace = trace_pass(model, lambda: model(x).square().sum(), mode)
    y, weight = 4 * 1000 * 512, 4 * 512 * 256
    assert trace.activations == y
    assert trace.head == y + 4
    assert 2 * y + weight < trace.peak < 4 * y + weight + 4096
    assert trace.kept == weight, "its gradient"


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("lora", [False, True])
def test_a_fake_pass_allocates_what_a_real_one_does(lora: bool, checkpointing: bool) -> None:
    real: Any = tiny_llama(400, attn_implementation="eager")
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    fake: Any = fake_llama(mode, lora)
    if lora:
        real = get_peft_model(real, LoraConfig(r=4, target_modules="all-linear"))
    real.train()
    if checkpointing:
        for model in (real, fake):
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    batch = batch_of()
    trace = AllocationTrace()
    trace.ignore([*real.parameters(), *real.buffers()])
    with trace:
        loss_of(real, batch).backward()
    inputs = batch_of(mode)
    traced = trace_pass(fake, lambda: loss_of(fake, inputs), mode)
    assert traced.peak == pytest.approx(trace.peak, rel=0.02)
    assert traced.peak > 4 * 2 * 100 * 400 * 3, "less than three times the logits: something was not counted"


def test_checkpointing_holds_less() -> None:
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    model: Any = fake_llama(mode, num_hidden_layers=8)
    batch = batch_of(mode)
    whole = trace_pass(model, lambda: loss_of(model, batch), mode)
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    checkpointed = trace_pass(model, lambda: loss_of(model, batch), mode)
    assert checkpointed.activations < whole.activations / 5
    assert checkpointed.peak < whole.peak


def test_tied_weights_count_once_and_stay_tied() -> None:
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    tied, untied = fake_llama(mode, tie_word_embeddings=True), fake_llama(mode)
    batch = batch_of(mode)
    weights = []
    for model in (tied, untied):
        estimate = estimate_memory(model, partial(loss_of, model, batch), mode, NOTHING, process=0)
        weights.append(estimate.weights)
    assert weights[1] - weights[0] == 4 * 400 * 64


# The peak of a rank


@pytest.mark.parametrize("accumulation_steps", [1, 2])
@pytest.mark.parametrize("kind", ["full", "lora", "checkpointing", "bfloat16"])
def test_the_peak_is_that_of_real_optimizer_steps(kind: str, accumulation_steps: int) -> None:
    """Two steps, the second of which finds the optimizer's states; counted are the bytes of all tensors they make."""

    def prepared(model: Any) -> Any:
        if kind == "lora":
            model = get_peft_model(model, LoraConfig(r=4, target_modules="all-linear"))
        if kind == "checkpointing":
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        return (model.bfloat16() if kind == "bfloat16" else model).train()

    settings: dict[str, Any] = {"attn_implementation": "eager"}
    real = prepared(tiny_llama(400, **settings))
    trace = AllocationTrace()
    trace.ignore([*real.parameters(), *real.buffers()])
    trainable = [p for p in real.parameters() if p.requires_grad]
    batch = batch_of()
    adam = torch.optim.AdamW(trainable, fused=True)
    with trace:
        for _ in range(2):
            for _ in range(accumulation_steps):
                loss_of(real, batch).backward()
            adam.step()
            adam.zero_grad()
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    with torch.device("meta"):
        fake = prepared(tiny_llama(400, **settings))
    as_fake(fake, mode, CPU)
    inputs = batch_of(mode)
    estimate = estimate_memory(
        fake,
        lambda: loss_of(fake, inputs),
        mode,
        optimizer_memory("adamw_torch_fused", trainable, device=CPU),
        process=10,
        accumulation_steps=accumulation_steps,
    )
    assert estimate.peak - estimate.weights - 10 == pytest.approx(trace.peak, rel=0.02)


def estimated(mode: FakeTensorMode, **options: Any) -> Any:
    model, batch = fake_llama(mode), batch_of(mode)
    return estimate_memory(model, lambda: loss_of(model, batch), mode, NOTHING, process=0, **options)


def test_accumulation_and_ranks_hold_gradients_longer() -> None:
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    one, accumulating, two = (
        estimated(mode, **options) for options in ({}, {"accumulation_steps": 2}, {"world_size": 2})
    )
    assert (
        one.gradients == accumulating.gradients == one.weights - 2 * 4 * 8
    )  # the rotary frequencies, held twice, have none
    assert one.peak < accumulating.peak
    assert two.peak == one.peak + one.gradients
    assert two.gradients == 2 * one.gradients


def test_masters_make_the_gradients_of_half_precision_weights_float32() -> None:
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    with torch.device("meta"):
        model = tiny_llama(400, attn_implementation="eager").bfloat16()
    as_fake(model, mode, CPU).train()
    batch = batch_of(mode)
    options: dict[str, Any] = {"process": 0}
    half = estimate_memory(model, lambda: loss_of(model, batch), mode, NOTHING, **options)
    masters = estimate_memory(model, lambda: loss_of(model, batch), mode, NOTHING, **options, master_weights=True)
    assert masters.gradients == 2 * half.gradients


# Optimizers and quantized weights, against the real ones


def bytes_of_states(optimizer: torch.optim.Optimizer) -> int:
    """Without the counters of steps and the tables of the 8-bit format, which all tensors share."""
    tensors = [
        value
        for state in optimizer.state.values()
        for name, value in state.items()
        if isinstance(value, torch.Tensor) and value.dim() and not name.startswith("qmap")
    ]
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


@pytest.mark.parametrize(
    ("optim", "make"),
    [
        ("adamw_torch_fused", torch.optim.AdamW),
        ("sgd", torch.optim.SGD),
        ("rmsprop", torch.optim.RMSprop),
        ("adagrad", torch.optim.Adagrad),
        ("adafactor", Adafactor),
        ("adamw_8bit", bnb.optim.AdamW8bit),
        ("paged_adamw_8bit", bnb.optim.AdamW8bit),
        ("paged_adamw_32bit", bnb.optim.AdamW),
        ("lion_8bit", bnb.optim.Lion8bit),
        ("lion_32bit", bnb.optim.Lion),
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_states_of_real_optimizers_are_counted(optim: str, make: Any, dtype: torch.dtype) -> None:
    weights = [nn.Parameter(torch.randn(shape).to(dtype)) for shape in ((300, 70), (128, 64), (50,))]
    for weight in weights:
        weight.grad = torch.randn_like(weight)
    optimizer = make(weights) if make is Adafactor else make(weights, lr=1e-3)
    optimizer.step()
    assert optimizer_memory(optim, weights, device=CPU).states == bytes_of_states(optimizer)


def test_masters_and_their_states_are_float32() -> None:
    weights = [nn.Parameter(torch.zeros(1000, dtype=torch.bfloat16)), nn.Parameter(torch.zeros(10))]
    memory = optimizer_memory("adamw_torch_fused", weights, device=CPU, master_weights=True)
    assert memory.states == 4 * 1000 + 8 * 1010


def test_an_unknown_optimizer_is_counted_as_adam_with_a_warning(caplog: pytest.LogCaptureFixture) -> None:
    memory = optimizer_memory("lomo", [torch.zeros(10)], device=CPU)
    assert memory.states == 80
    assert "lomo is not known" in caplog.text


@pytest.mark.parametrize("double", [False, True])
def test_a_4_bit_weight_is_as_large_as_the_real_one(double: bool) -> None:
    layer: Any = bnb.nn.Linear4bit(192, 320, bias=False, compress_statistics=double, quant_type="nf4")
    layer = layer.to("cpu")
    parts = [layer.weight.data, *layer.weight.quant_state.as_dict(packed=False).values()]
    real = sum(part.numel() * part.element_size() for part in parts if isinstance(part, torch.Tensor))
    assert packed_bytes(192 * 320, 320, 4, double) == pytest.approx(real, abs=8)


def test_frozen_layers_but_the_head_take_the_memory_of_quantized_ones() -> None:
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    with torch.device("meta"):
        model: Any = tiny_llama(400).requires_grad_(False)
        model = get_peft_model(model, LoraConfig(r=4, target_modules="all-linear"))
        assert fake_quantize(model, 4, True, skipped=("o_proj",)) == 2 * 6
    as_fake(model, mode, CPU).train()
    batch = batch_of(mode)
    estimate = estimate_memory(model, lambda: loss_of(model, batch), mode, NOTHING, process=0)
    linear = 2 * (64 * 64 + 2 * 32 * 64 + 3 * 64 * 128)  # q, k and v, and the MLP's three
    adapters = sum(p.numel() for p in model.parameters() if p.requires_grad)
    others = 2 * 400 * 64 + 2 * 64 * 64 + 5 * 64
    tables = 12 * (64 + 1024 + 4)
    assert estimate.weights == pytest.approx(4 * (adapters + others) + linear / 2 * (1 + 2 / 64) + tables, rel=0.001)
    assert estimate.gradients == 4 * adapters
