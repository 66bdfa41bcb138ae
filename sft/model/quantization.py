"""Prepares 4-bit and 8-bit base models of bitsandbytes for training, on GPUs and CPUs.

`prepare_quantized` guards against three silent traps:

- On CPUs with AVX512-BF16, `Linear4bit` repacks its weights at the first forward pass in evaluation mode, for good:
  from then on each result is rounded to bfloat16 and, worse, has no gradient, so that after the first evaluation only
  the adapters of the last layer would be trained. The repacking is switched off.
- `peft.prepare_model_for_kbit_training` casts every weight that is not quantized to float32, and freezes all. Only the
  freezing is needed. The embeddings and the head are the largest of those weights: they are frozen, a bfloat16 number
  is the same number in float32, and twice the memory buys nothing. The norms compute in float32 internally whatever
  their dtype; float32 weights would only turn the residual stream into float32. And the gradient hook on the embeddings
  is for reentrant checkpointing, which is not used here.
- A quantization that had no effect (nothing matched, or everything was skipped) would train at full memory: the
  quantized layers are counted.
"""

from __future__ import annotations

import functools
import logging
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from sft.errors import Problem, UserError

if TYPE_CHECKING:
    from torch import nn
    from transformers import BitsAndBytesConfig, PreTrainedConfig, PreTrainedModel

    from sft.config.schema import LoraKeys, QuantizationKeys
    from sft.model.precision import Precision


@contextmanager
def _without_hub_kernels() -> Iterator[None]:
    """Makes `import kernels` fail.

    Where that package is installed, the CPU backend of bitsandbytes fetches a kernel from the hub when it is imported,
    in each process; without a network it waits for a timeout. The kernel is for repacked weights, which are not used
    here.
    """
    before = sys.modules.get("kernels", ...)
    sys.modules["kernels"] = None  # type: ignore[assignment]
    try:
        yield
    finally:
        if before is ...:
            del sys.modules["kernels"]
        else:
            sys.modules["kernels"] = before  # type: ignore[assignment]


@contextmanager
def _lazy_compile() -> Iterator[None]:
    """Makes `torch.compile` defer its work to the first call.

    bitsandbytes compiles functions when it is imported, which imports torch's inductor: 0.9 s of CPU time in each
    process, even if nothing is quantized.
    """
    import torch

    compile_now: Any = torch.compile

    def compile_late(function: Callable[..., Any], **options: Any) -> Callable[..., Any]:
        compiled = functools.cache(lambda: compile_now(function, **options))
        return functools.wraps(function)(lambda *args, **kwargs: compiled()(*args, **kwargs))

    torch.compile = compile_late  # type: ignore[assignment]
    try:
        yield
    finally:
        torch.compile = compile_now


def import_bitsandbytes() -> Any:
    """Imports bitsandbytes without its call to the hub and the warning that the call failed.

    `import peft` and `from transformers import Trainer` import bitsandbytes too: call this before either. Later calls
    cost nothing.

    Raises:
        UserError: it is not installed, or does not load on this machine.
    """
    if "bitsandbytes" in sys.modules:
        return sys.modules["bitsandbytes"]
    logger = logging.getLogger("bitsandbytes.backends.cpu.ops")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with _without_hub_kernels(), _lazy_compile():
            import bitsandbytes
    except (ImportError, OSError, RuntimeError) as error:
        message = f"bitsandbytes does not load here: {error}"
        raise UserError(Problem(message, "pip install bitsandbytes", key="quantization_config")) from error
    finally:
        logger.setLevel(level)
    # 8-bit layers round their inputs by design, and warn of it in each layer.
    warns_of_casts = logging.getLogger("bitsandbytes.autograd._functions")
    warns_of_casts.addFilter(lambda record: "inputs will be cast" not in record.getMessage())
    return bitsandbytes


def bits_and_bytes_config(keys: QuantizationKeys, precision: Precision) -> BitsAndBytesConfig:
    """Returns the config for transformers; the compute dtype defaults to the run's, not to float32.

    Raises:
        UserError: neither 4 nor 8 bits are set, or both.
    """
    if keys.load_in_4bit == keys.load_in_8bit:
        message = f"{'both' if keys.load_in_4bit else 'neither'} of load_in_4bit and load_in_8bit is true"
        raise UserError(Problem(message, "Set exactly one of them.", key="quantization_config"))
    from transformers import BitsAndBytesConfig

    kwargs = keys.kwargs()
    if keys.bnb_4bit_compute_dtype is None:
        computes = "bfloat16" if precision.bf16 else "float16" if precision.fp16 else precision.dtype
        kwargs["bnb_4bit_compute_dtype"] = computes
    return BitsAndBytesConfig(**kwargs)


def quantization_settings(config: Any) -> dict[str, Any] | None:
    """Returns how a model's weights are quantized, from its config; None if they are not."""
    quantization: Any = getattr(config, "quantization_config", None)
    if quantization is None:
        return None
    values = quantization if isinstance(quantization, Mapping) else quantization.to_dict()
    return {name: value for name, value in values.items() if not name.startswith("_")}


def require_adapter_if_quantized(config: PreTrainedConfig, lora: LoraKeys | None) -> None:
    """Raises `UserError` if a model whose files hold weights quantized by bitsandbytes gets no adapter."""
    settings = quantization_settings(config) or {}
    method = settings.get("quant_method")
    if lora is None and str(getattr(method, "value", method)) == "bitsandbytes":
        bits = 8 if settings.get("load_in_8bit") else 4
        message = f"its weights are quantized to {bits} bits, and cannot be trained without an adapter"
        hint = "Add a lora_config section (`lora_config: {}` takes every default), or name the unquantized model."
        raise UserError(Problem(message, hint, key="model_name_or_path"))


def require_trainable_quantization(model: nn.Module) -> None:
    """Checks what upstream's Trainer checks of a loaded model, whatever quantized it.

    The config does not tell it before: without kernels for it, some quantization is undone by loading the model.

    Raises:
        UserError: the model is quantized and has no adapter, or no adapter can be trained on its quantization.
    """
    from transformers.trainer_utils import validate_quantization_for_training

    try:
        validate_quantization_for_training(model)
    except ValueError as error:
        method = getattr(model.config.quantization_config, "quant_method", "unknown")  # type: ignore[union-attr]
        message = f"its weights are quantized ({getattr(method, 'value', method)}), and cannot be trained"
        hint = "Name the unquantized model; one that bitsandbytes quantized is trained with a lora_config section."
        raise UserError(Problem(message, hint, key="model_name_or_path")) from error


def quantized_layers(model: nn.Module) -> dict[str, Any]:
    """Returns the layers whose weights are held in 4 or 8 bits, by name."""
    if "bitsandbytes" not in sys.modules:
        return {}
    bnb = sys.modules["bitsandbytes"].nn
    kinds = (bnb.Linear4bit, bnb.Linear8bitLt)
    return {name: module for name, module in model.named_modules() if isinstance(module, kinds)}


def prepare_quantized(model: PreTrainedModel) -> int:
    """Freezes a model that was loaded quantized, and makes it compute the same in training and evaluation mode.

    Returns:
        How many layers are quantized.

    Raises:
        UserError: none is: the setting had no effect.
    """
    layers = quantized_layers(model)
    if not layers:
        kind = "Its linear layers are of a kind that bitsandbytes does not replace"
        hint = f"{kind}, or llm_int8_skip_modules skips all of them."
        raise UserError(Problem("no layer of the model was quantized", hint, key="quantization_config"))
    for layer in layers.values():
        if hasattr(layer, "support_avx512bf16_for_cpu"):
            layer.support_avx512bf16_for_cpu = False  # see the module's docstring
    model.requires_grad_(False)
    return len(layers)
