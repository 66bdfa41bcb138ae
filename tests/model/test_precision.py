"""The choice of dtypes and attention, for machines that need not be there."""

from __future__ import annotations

import pytest
from transformers import Gemma2Config, Gemma2ForCausalLM, LlamaConfig, LlamaForCausalLM, MambaConfig, MambaForCausalLM

from sft.distributed.device import DeviceFacts, device_facts
from sft.errors import UserError
from sft.model.attention.selection import choose_attention
from sft.model.precision import choose_precision, keep_precision

CPU, OLD_GPU, GPU = DeviceFacts("cpu", True, 3.0), DeviceFacts("cuda", False), DeviceFacts("cuda", True)
SLOW_CPU = DeviceFacts("cpu", True, 0.3)
MASTERS = ("bfloat16", False, False, True)
"""Weights in bfloat16 without autocast, and float32 master weights."""


@pytest.mark.parametrize(
    ("dtype", "everything", "bf16", "fp16", "device", "expected"),
    [
        ("auto", True, None, None, CPU, MASTERS),
        ("auto", False, None, None, CPU, ("bfloat16", False, False, False)),
        ("auto", True, None, None, SLOW_CPU, ("float32", False, False, False)),
        ("auto", False, None, None, SLOW_CPU, ("float32", False, False, False)),
        ("auto", True, True, None, CPU, MASTERS),
        ("auto", True, True, None, SLOW_CPU, MASTERS),
        ("auto", True, False, None, CPU, ("float32", False, False, False)),
        ("auto", False, False, None, CPU, ("float32", False, False, False)),
        ("bfloat16", False, None, None, SLOW_CPU, ("bfloat16", False, False, False)),
        ("bfloat16", True, None, None, SLOW_CPU, MASTERS),
        ("float32", True, None, None, CPU, ("float32", False, False, False)),
        ("float32", True, True, None, CPU, ("float32", True, False, False)),
        ("auto", True, None, None, GPU, MASTERS),
        ("auto", True, True, None, GPU, MASTERS),
        ("auto", False, None, None, GPU, ("bfloat16", True, False, False)),
        ("auto", True, False, None, GPU, ("float32", False, False, False)),
        ("auto", False, False, None, GPU, ("float32", False, False, False)),
        ("auto", False, None, True, GPU, ("float16", False, True, False)),
        ("auto", True, None, True, GPU, ("float32", False, True, False)),
        ("float32", False, None, None, GPU, ("float32", False, False, False)),
        ("float32", True, True, None, GPU, ("float32", True, False, False)),
        ("bfloat16", True, None, None, GPU, MASTERS),
        ("bfloat16", True, True, None, GPU, MASTERS),
        ("auto", True, None, None, OLD_GPU, ("float32", False, True, False)),
        ("auto", False, None, None, OLD_GPU, ("float16", False, True, False)),
    ],
)
def test_the_chosen_precision(
    dtype: str,
    everything: bool,
    bf16: bool | None,
    fp16: bool | None,
    device: DeviceFacts,
    expected: tuple[str, bool, bool, bool],
) -> None:
    chosen = choose_precision(dtype, everything, bf16, fp16, device)
    assert (chosen.dtype, chosen.bf16, chosen.fp16, chosen.master_weights) == expected
    assert chosen.reason.startswith(expected[0])


@pytest.mark.parametrize(
    ("everything", "kept", "device", "expected"),
    [
        (True, "bfloat16", SLOW_CPU, MASTERS),
        (True, "float32", CPU, ("float32", False, False, False)),
        (False, "bfloat16", SLOW_CPU, ("bfloat16", False, False, False)),
        (False, "float32", CPU, ("float32", False, False, False)),
        (True, "float32", GPU, ("float32", False, False, False)),
        (True, "float32", OLD_GPU, ("float32", False, True, False)),  # as in the run that saved it
        (False, "bfloat16", OLD_GPU, ("float16", False, True, False)),
        (False, "float16", CPU, ("bfloat16", False, False, False)),
    ],
)
def test_a_resumed_run_keeps_the_dtype_of_its_checkpoint(
    everything: bool, kept: str, device: DeviceFacts, expected: tuple[str, bool, bool, bool]
) -> None:
    """If the machine supports it: a GPU without bfloat16, and a CPU in float16, use what they would choose."""
    chosen = keep_precision(choose_precision("auto", everything, None, None, device), kept, everything, device)
    assert (chosen.dtype, chosen.bf16, chosen.fp16, chosen.master_weights) == expected
    assert chosen.reason.startswith(expected[0])


def test_the_reason_names_the_measured_speedup() -> None:
    assert "3.0 times as fast" in choose_precision("auto", True, None, None, CPU).reason
    assert "0.3 times as fast" in choose_precision("auto", True, None, None, SLOW_CPU).reason
    assert "float32 values" in choose_precision("auto", True, None, None, CPU).reason
    assert "frozen" in choose_precision("auto", False, None, None, CPU).reason


def test_sharded_weights_need_no_master_weights() -> None:
    chosen = choose_precision("auto", True, None, None, GPU, sharded=True)
    assert (chosen.dtype, chosen.bf16, chosen.master_weights) == ("float32", True, False)


def test_the_machine_is_measured_only_on_request(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    monkeypatch.setattr("sft.distributed.cpu.bf16_speedup", lambda: 2.5)
    assert device_facts() == DeviceFacts("cpu", True, 1.0)
    assert device_facts(measured=True) == DeviceFacts("cpu", True, 2.5)


@pytest.mark.parametrize(
    ("dtype", "bf16", "fp16", "device", "key"),
    [
        ("auto", True, None, OLD_GPU, "bf16"),
        ("auto", None, True, CPU, "fp16"),
        ("float16", None, None, CPU, "dtype"),
        ("bfloat16", None, True, GPU, "fp16"),
        ("int8", None, None, GPU, "dtype"),
    ],
)
def test_exclusive_settings(dtype: str, bf16: bool | None, fp16: bool | None, device: DeviceFacts, key: str) -> None:
    with pytest.raises(UserError) as caught:
        choose_precision(dtype, True, bf16, fp16, device)
    assert caught.value.problems[0].key == key


@pytest.mark.parametrize("device", [GPU, OLD_GPU])
@pytest.mark.parametrize("fp16", [None, True, False])
@pytest.mark.parametrize("sharded", [False, True])
def test_float16_weights_are_not_trained(device: DeviceFacts, fp16: bool | None, sharded: bool) -> None:
    with pytest.raises(UserError) as caught:
        choose_precision("float16", True, None, fp16, device, sharded=sharded)
    (problem,) = caught.value.problems
    assert problem.key == "dtype"
    assert "dtype: auto" in problem.hint
    remedy = choose_precision("auto", True, None, True, device)
    assert (remedy.dtype, remedy.fp16, remedy.master_weights) == ("float32", True, False)
    assert choose_precision("float16", False, None, fp16, device).dtype == "float16", "a frozen base may be"


def test_attention_is_sft_documents_or_flash_attn_where_torch_has_no_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    plain, capped = LlamaConfig(), Gemma2Config()
    for installed, of_capped in ((False, "sft_documents"), (True, "flash_attention_2")):
        monkeypatch.setattr("transformers.utils.is_flash_attn_2_available", lambda installed=installed: installed)
        assert choose_attention("auto", plain, LlamaForCausalLM, True, GPU) == ("sft_documents", None)
        assert choose_attention("auto", capped, Gemma2ForCausalLM, True, GPU) == (of_capped, None)
    assert (
        choose_attention("auto", LlamaConfig(attention_dropout=0.1), LlamaForCausalLM, True, GPU)[0] != "sft_documents"
    )
    assert choose_attention("auto", capped, Gemma2ForCausalLM, False, GPU) == ("sft_documents", None), "float32"
    assert choose_attention("auto", capped, Gemma2ForCausalLM, True, OLD_GPU) == ("sft_documents", None), "no Ampere"
    assert choose_attention("auto", plain, LlamaForCausalLM, True, CPU) == ("sft_documents", None)
    assert choose_attention("flex_attention", plain, LlamaForCausalLM, True, CPU) == ("flex_attention", None)
    name, reason = choose_attention("auto", MambaConfig(), MambaForCausalLM, True, GPU)
    assert name in ("sdpa", "eager")
    assert reason
    assert "Mamba" in reason
