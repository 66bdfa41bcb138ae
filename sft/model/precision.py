"""Chooses the dtype of the weights and of the computation, and whether the optimizer keeps master weights."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from sft.distributed.device import DeviceFacts
from sft.errors import Problem, UserError

if TYPE_CHECKING:
    import torch

DTYPES = ("float32", "bfloat16", "float16")
WORTHWHILE = 1.3
"""The speedup from which a CPU computes in bfloat16. Native kernels give 3 to 5, emulated ones 0.1 to 0.5: the
threshold is far from both, so noise in the measurement does not change the choice."""


@dataclass(frozen=True)
class Precision:
    """The dtypes of one run.

    Attributes:
        dtype: of the weights: `float32`, `bfloat16` or `float16`.
        bf16, fp16: whether the Trainer computes under autocast in that dtype.
        reason: for the console.
        master_weights: whether the optimizer keeps float32 values of them (`sft.training.optim.master_weights`).
    """

    dtype: str
    bf16: bool
    fp16: bool
    reason: str
    master_weights: bool = False

    def torch_dtype(self) -> torch.dtype:
        """Returns `dtype` as a `torch.dtype`."""
        import torch

        dtype: torch.dtype = getattr(torch, self.dtype)
        return dtype


def _check_flags(
    dtype_key: str, trains_everything: bool, bf16: bool | None, fp16: bool | None, device: DeviceFacts
) -> None:
    if dtype_key not in ("auto", *DTYPES):
        key, message, hint = "dtype", f"no such dtype: {dtype_key!r}", f"One of auto, {', '.join(DTYPES)}."
    elif bf16 and not device.bf16:
        key, message, hint = "bf16", "bf16 is true, and this GPU does not compute in bfloat16", "Use `fp16: true`."
    elif device.kind == "cpu" and (fp16 or dtype_key == "float16"):
        key, message = "fp16" if fp16 else "dtype", "float16 training needs a GPU"
        hint = "On a CPU leave the precision on auto, or use `dtype: bfloat16`."
    elif trains_everything and dtype_key == "bfloat16" and fp16:
        key, message = "fp16", "fp16 is true, and dtype: bfloat16 trains bfloat16 weights"
        hint = "Remove `dtype`: fp16 trains float32 weights under float16 autocast. Or remove `fp16`."
    elif trains_everything and dtype_key == "float16":
        # Gradients have the format of their weights, and small ones vanish in float16: at once, or when scaled ones are
        # scaled back. torch's GradScaler raises "Attempting to unscale FP16 gradients".
        key, message = "dtype", "float16 weights can be held frozen under an adapter, but not trained"
        hint = "Use `dtype: auto`, which with `fp16: true` trains float32 weights under float16 autocast."
    else:
        return
    raise UserError(Problem(message, hint, key=key))


def choose_precision(
    dtype_key: str,
    trains_everything: bool,
    bf16: bool | None,
    fp16: bool | None,
    device: DeviceFacts,
    *,
    sharded: bool = False,
) -> Precision:
    """Chooses weights, autocast and master weights for one run.

    Frozen weights do not change, so adapters (float32 themselves) are attached to a bfloat16 base. When every weight
    is trained, updates are smaller than bfloat16's 8 bits of mantissa can hold (a step of 1e-5 on a weight of 1.0
    rounds to nothing). The optimizer therefore keeps float32 master weights, of which the bfloat16 weights are the
    rounding (Micikevicius et al., "Mixed Precision Training", 2018, section 3.1). float32 weights under autocast would
    need the same memory, because autocast's casts live until the backward pass; but they are cast again in each forward
    pass, and the activations between the matrix multiplications would take 4 bytes per number instead of 2.

    Args:
        dtype_key: the `dtype` setting: `auto` or a dtype, which is honoured.
        trains_everything: full fine-tuning or pretraining, as opposed to an adapter on frozen weights.
        bf16, fp16: the settings of that name, None if not set. `bf16` without a dtype means computing in bfloat16 in
            the fastest way, with `dtype: float32` it means autocast.
        sharded: whether FSDP shards the weights: its mixed precision keeps float32 shards and gathers them in
            bfloat16, so the optimizer needs no master weights.

    Raises:
        UserError: the settings exclude each other, the device cannot do it, or float16 weights would be trained.
    """
    _check_flags(dtype_key, trains_everything, bf16, fp16, device)
    if device.kind == "cpu" and not sharded:
        return _on_cpu(dtype_key, trains_everything, bf16, device.bf16_speedup)
    undecided = bf16 is None and fp16 is None and dtype_key in ("auto", "bfloat16" if device.bf16 else "float16")
    use_bf16 = bool(bf16) or (undecided and device.bf16)
    use_fp16 = bool(fp16) or (undecided and not device.bf16)
    autocast = ", bf16 autocast" if use_bf16 else ", fp16 autocast" if use_fp16 else ""
    keeps_masters = trains_everything and not sharded
    if keeps_masters and use_bf16 and dtype_key == "auto":
        return _half_weights(trains_everything, "the GPU computes in bfloat16, without casts")
    if keeps_masters and not use_fp16 and dtype_key == "bfloat16":
        return _half_weights(trains_everything, "as the config says")
    if dtype_key != "auto":
        dtype, why = dtype_key, "as the config says"
    elif trains_everything:
        dtype, why = "float32", "because every weight is trained and small updates need its mantissa"
    elif use_bf16 or use_fp16:
        dtype, why = "bfloat16" if use_bf16 else "float16", "because the base is frozen"
    else:
        dtype, why = "float32", "because bf16 and fp16 are off"
    return Precision(dtype, use_bf16, use_fp16, f"{dtype} weights {why}{autocast}")


def keep_precision(chosen: Precision, kept: str, trains_everything: bool, device: DeviceFacts) -> Precision:
    """Returns the precision of a run that resumes with `dtype: auto`: the dtype of its checkpoint's weights.

    Otherwise another result of the measurement, or another machine, would change the numbers in the middle of a run;
    if all weights are trained the optimizer's state would not even fit.

    Args:
        chosen: the choice for a new run.
        kept: the dtype of the weights in the checkpoint; float16 is kept only if it is also the machine's choice.
    """
    if kept == chosen.dtype or kept == "float16" or (kept == "bfloat16" and not device.bf16):
        return chosen
    reason = f"{kept} weights as in the checkpoint; a new run would have {chosen.dtype} ones here"
    return replace(choose_precision(kept, trains_everything, None, None, device), reason=reason)


def _on_cpu(dtype_key: str, trains_everything: bool, bf16: bool | None, speedup: float) -> Precision:
    """Chooses between float32 and bfloat16 by which of them the CPU multiplies faster."""
    measured = f"this CPU multiplies {speedup:.1f} times as fast in bfloat16 as in float32"
    if dtype_key == "bfloat16":
        return _half_weights(trains_everything, "as the config says")
    if dtype_key == "float32":
        autocast = ", bf16 autocast" if bf16 else ""
        return Precision("float32", bool(bf16), False, f"float32 weights as the config says{autocast}")
    if bf16 is False:
        return Precision("float32", False, False, "float32 weights because bf16 is off")
    if speedup >= WORTHWHILE or bf16:
        return _half_weights(trains_everything, measured if bf16 is None else f"because bf16 is on; {measured}")
    return Precision("float32", False, False, f"float32 weights: {measured}")


def _half_weights(trains_everything: bool, why: str) -> Precision:
    """Returns bfloat16 weights without autocast, which would have nothing to cast."""
    masters = "of which the optimizer keeps float32 values so that no update is lost"
    held = masters if trains_everything else "which are frozen, under float32 adapters"
    return Precision("bfloat16", False, False, f"bfloat16 weights, {held}: {why}", master_weights=trains_everything)
