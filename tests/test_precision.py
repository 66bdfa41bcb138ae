"""The number formats, for machines that are not at hand."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from sft.errors import UserError
from sft.precision import DeviceFacts, choose_attention, choose_precision

CPU, OLD_GPU, GPU = DeviceFacts("cpu", True), DeviceFacts("cuda", False), DeviceFacts("cuda", True)


@pytest.mark.parametrize(
    ("dtype", "everything", "bf16", "fp16", "device", "expected"),
    [
        ("auto", True, None, None, CPU, ("float32", False, False)),
        ("auto", False, None, None, CPU, ("float32", False, False)),
        ("bfloat16", False, None, None, CPU, ("bfloat16", False, False)),
        ("auto", True, True, None, CPU, ("float32", True, False)),
        ("auto", True, None, None, GPU, ("float32", True, False)),
        ("auto", False, None, None, GPU, ("bfloat16", True, False)),
        ("auto", True, False, None, GPU, ("float32", False, False)),
        ("auto", False, False, None, GPU, ("float32", False, False)),
        ("auto", False, None, True, GPU, ("float16", False, True)),
        ("auto", True, None, True, GPU, ("float32", False, True)),
        ("float32", False, None, None, GPU, ("float32", False, False)),
        ("float32", True, True, None, GPU, ("float32", True, False)),
        ("bfloat16", True, None, None, GPU, ("bfloat16", True, False)),
        ("auto", True, None, None, OLD_GPU, ("float32", False, True)),
        ("auto", False, None, None, OLD_GPU, ("float16", False, True)),
    ],
)
def test_the_choice(
    dtype: str,
    everything: bool,
    bf16: bool | None,
    fp16: bool | None,
    device: DeviceFacts,
    expected: tuple[str, bool, bool],
) -> None:
    chosen = choose_precision(dtype, everything, bf16, fp16, device)
    assert (chosen.dtype, chosen.bf16, chosen.fp16) == expected
    assert chosen.reason.startswith(expected[0])


@pytest.mark.parametrize(
    ("dtype", "bf16", "fp16", "device", "key"),
    [
        ("auto", True, True, GPU, "fp16"),
        ("auto", True, None, OLD_GPU, "bf16"),
        ("auto", None, True, CPU, "fp16"),
        ("float16", None, None, CPU, "dtype"),
        ("int8", None, None, GPU, "dtype"),
    ],
)
def test_what_excludes_itself(dtype: str, bf16: bool | None, fp16: bool | None, device: DeviceFacts, key: str) -> None:
    with pytest.raises(UserError) as caught:
        choose_precision(dtype, True, bf16, fp16, device)
    assert caught.value.problems[0].key == key


def test_attention_is_flash_only_where_it_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    both = SimpleNamespace(_supports_flash_attn=True, _supports_sdpa=True)
    eager = SimpleNamespace(_supports_flash_attn=False, _supports_sdpa=False)
    half = choose_precision("auto", True, None, None, GPU)
    full = choose_precision("float32", True, None, None, GPU)
    for installed, expected in ((False, "sdpa"), (True, "flash_attention_2")):
        monkeypatch.setattr("transformers.utils.is_flash_attn_2_available", lambda installed=installed: installed)
        assert choose_attention("auto", both, half, GPU) == expected
    assert choose_attention("auto", both, full, GPU) == "sdpa"
    assert choose_attention("auto", both, half, CPU) == "sdpa"
    assert choose_attention("auto", eager, half, GPU) == "eager"
    assert choose_attention("flex_attention", both, half, CPU) == "flex_attention"
