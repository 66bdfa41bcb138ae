"""Which number format the weights and the computation have, and which attention kernel runs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from sft.errors import Problem, UserError

if TYPE_CHECKING:
    import torch

DTYPES = ("float32", "bfloat16", "float16")


@dataclass(frozen=True)
class DeviceFacts:
    """What of the machine decides the precision; a value, so that the choice is tested on any machine.

    Attributes:
        kind: `cuda` or `cpu`.
        bf16: whether the device computes in bfloat16 natively (not emulated).
    """

    kind: str
    bf16: bool


@dataclass(frozen=True)
class Precision:
    """The choice.

    Attributes:
        dtype: of the weights at rest: `float32`, `bfloat16` or `float16`.
        bf16, fp16: whether the Trainer is to compute under autocast in that format.
        reason: in words, for the console.
    """

    dtype: str
    bf16: bool
    fp16: bool
    reason: str

    def torch_dtype(self) -> torch.dtype:
        """`dtype` as torch's own object."""
        import torch

        dtype: torch.dtype = getattr(torch, self.dtype)
        return dtype

    @property
    def computes_in_half(self) -> bool:
        """Whether matrix products run in 16 bits, which is what flash attention needs."""
        return self.bf16 or self.fp16 or self.dtype != "float32"


def device_facts() -> DeviceFacts:
    """The machine this process runs on."""
    import torch

    if torch.cuda.is_available():
        return DeviceFacts("cuda", torch.cuda.is_bf16_supported(including_emulation=False))
    return DeviceFacts("cpu", bf16=True)


def _check_flags(dtype_key: str, bf16: bool | None, fp16: bool | None, device: DeviceFacts) -> None:
    if dtype_key not in ("auto", *DTYPES):
        raise UserError(Problem(f"no such dtype: {dtype_key!r}", f"One of auto, {', '.join(DTYPES)}.", key="dtype"))
    if bf16 and fp16:
        raise UserError(Problem("bf16 and fp16 are both true", "Keep one of them.", key="fp16"))
    if bf16 and not device.bf16:
        raise UserError(
            Problem("bf16 is true, and this GPU does not compute in bfloat16", "Use `fp16: true`.", key="bf16")
        )
    if device.kind == "cpu" and (fp16 or dtype_key == "float16"):
        raise UserError(
            Problem(
                "float16 training needs a GPU",
                "On a CPU leave the precision on auto, or use `dtype: bfloat16`.",
                key="fp16" if fp16 else "dtype",
            )
        )


def choose_precision(
    dtype_key: str, trains_everything: bool, bf16: bool | None, fp16: bool | None, device: DeviceFacts
) -> Precision:
    """Weights and autocast for one run.

    Frozen weights lose nothing in 16 bits, so that adapters sit on a bfloat16 base (and are float32 themselves). When
    every weight is trained, updates are smaller than bfloat16's 8 bits of mantissa can hold (a step of 1e-5 on a weight
    of 1.0 rounds to nothing), so that the master weights stay float32 and only the computation is in 16 bits
    (Micikevicius et al., "Mixed Precision Training", 2018).

    Args:
        dtype_key: the `dtype` setting: `auto` or a format, which is honoured.
        trains_everything: full fine-tuning or pretraining, as opposed to an adapter on frozen weights.
        bf16, fp16: the settings of that name; None where the user has said nothing.

    Raises:
        UserError: the settings exclude each other, or the device cannot do it.
    """
    _check_flags(dtype_key, bf16, fp16, device)
    if device.kind == "cpu":
        dtype = "float32" if dtype_key == "auto" else dtype_key
        return Precision(dtype, bool(bf16), False, f"{dtype} weights{', bf16 autocast' if bf16 else ''} on the CPU")
    undecided = bf16 is None and fp16 is None and dtype_key in ("auto", "bfloat16" if device.bf16 else "float16")
    use_bf16 = bool(bf16) or (undecided and device.bf16)
    use_fp16 = bool(fp16) or (undecided and not device.bf16)
    if dtype_key != "auto":
        dtype, why = dtype_key, "as the config says"
    elif trains_everything:
        dtype, why = "float32", "because every weight is trained and small updates need its mantissa"
    elif use_bf16 or use_fp16:
        dtype, why = "bfloat16" if use_bf16 else "float16", "because the base is frozen"
    else:
        dtype, why = "float32", "because bf16 and fp16 are off"
    autocast = ", bf16 autocast" if use_bf16 else ", fp16 autocast" if use_fp16 else ""
    return Precision(dtype, use_bf16, use_fp16, f"{dtype} weights {why}{autocast}")


def choose_attention(key: str, model_class: Any, precision: Precision, device: DeviceFacts) -> str:
    """The `attn_implementation` for `auto`: flash attention where it is installed and can run, else SDPA, else eager.

    Args:
        model_class: the class of the model, or None where only transformers can tell (remote code): then SDPA is
            left to it.
    """
    if key != "auto":
        return key
    from transformers.utils import is_flash_attn_2_available

    can_flash = device.kind == "cuda" and precision.computes_in_half and is_flash_attn_2_available()
    if can_flash and getattr(model_class, "_supports_flash_attn", False):
        return "flash_attention_2"
    return "sdpa" if getattr(model_class, "_supports_sdpa", True) else "eager"
