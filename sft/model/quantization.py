"""4-bit and 8-bit base models through bitsandbytes, on GPUs and CPUs, without its silent traps.

Three things here are more than a call:

- On CPUs with AVX512-BF16, `Linear4bit` repacks its weights at the first forward in evaluation mode, and for good: from
  then on each product is rounded to bfloat16 and, worse, has no gradient, so that training after the first evaluation
  would go on with the adapters of the upper layer only. `settle` switches the repacking off.
- `peft.prepare_model_for_kbit_training` casts every weight that is not quantized to float32. Of what it does only the
  freezing is needed. The embeddings and the head are the largest of those weights and doubling them buys nothing: they
  are frozen, and a bfloat16 number is the same number in float32. The norms compute in float32 internally whatever
  their weights are stored in; float32 weights would only turn the whole residual stream into float32. And the gradient
  hook on the embeddings is for reentrant checkpointing, which is not used here.
- A quantization that did not happen (nothing matched, or everything was skipped) would train at full memory; `settle`
  counts the layers.
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
    import torch
    from torch import nn
    from transformers import BitsAndBytesConfig, PreTrainedConfig, PreTrainedModel

    from sft.config.schema import LoraKeys, QuantizationKeys
    from sft.model.precision import Precision

_CPU_LOGGER = "bitsandbytes.backends.cpu.ops"
_CAST_LOGGER = "bitsandbytes.autograd._functions"


@contextmanager
def _without_hub_kernels() -> Iterator[None]:
    """While this lasts `import kernels` fails at once.

    The CPU backend of bitsandbytes fetches a kernel from the hub at import time where that package is installed, in
    each process, with the waiting that a machine without network has. The kernel is for repacked weights, which are
    never used here.
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
def _compiling_late() -> Iterator[None]:
    """While this lasts `torch.compile` puts off its work to the first call.

    bitsandbytes compiles functions at import, which imports torch's inductor: 0.9 s of CPU time for each process,
    whether it quantizes anything or not.
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
    """The bitsandbytes module, imported without its call to the hub and the warning that the call failed.

    `import peft` and `from transformers import Trainer` import bitsandbytes too, so that a program calls this before
    either. Later calls cost nothing.

    Raises:
        UserError: it is not installed, or does not load on this machine.
    """
    if "bitsandbytes" in sys.modules:
        return sys.modules["bitsandbytes"]
    logger = logging.getLogger(_CPU_LOGGER)
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with _without_hub_kernels(), _compiling_late():
            import bitsandbytes
    except (ImportError, OSError, RuntimeError) as error:
        raise UserError(
            Problem(f"bitsandbytes does not load here: {error}", "pip install bitsandbytes", key="quantization_config")
        ) from error
    finally:
        logger.setLevel(level)
    # 8-bit layers round their inputs by design, and say so for each layer.
    logging.getLogger(_CAST_LOGGER).addFilter(lambda record: "inputs will be cast" not in record.getMessage())
    return bitsandbytes


def bits_and_bytes_config(keys: QuantizationKeys, precision: Precision) -> BitsAndBytesConfig:
    """What transformers takes; the compute dtype defaults to what the machine computes in, not to float32.

    Raises:
        UserError: neither 4 nor 8 bits are asked for, or both.
    """
    if keys.load_in_4bit == keys.load_in_8bit:
        said = "both" if keys.load_in_4bit else "neither"
        raise UserError(
            Problem(
                f"{said} of load_in_4bit and load_in_8bit is true",
                "Set exactly one of them.",
                key="quantization_config",
            )
        )
    from transformers import BitsAndBytesConfig

    kwargs = keys.kwargs()
    if keys.bnb_4bit_compute_dtype is None:
        half = "bfloat16" if precision.bf16 else "float16" if precision.fp16 else precision.dtype
        kwargs["bnb_4bit_compute_dtype"] = half
    return BitsAndBytesConfig(**kwargs)


def held_as(config: Any) -> dict[str, Any] | None:
    """The settings by which a model's weights are quantized, from its config; None where they are not."""
    quantization: Any = getattr(config, "quantization_config", None)
    if quantization is None:
        return None
    values = quantization if isinstance(quantization, Mapping) else quantization.to_dict()
    return {name: value for name, value in values.items() if not name.startswith("_")}


def require_trained_weights(config: PreTrainedConfig, lora: LoraKeys | None) -> None:
    """Checks that a model whose files hold weights of bitsandbytes is to get an adapter.

    Raises:
        UserError: it is not.
    """
    facts = held_as(config) or {}
    if lora is None and str(getattr(facts.get("quant_method"), "value", facts.get("quant_method"))) == "bitsandbytes":
        bits = 8 if facts.get("load_in_8bit") else 4
        message = f"its weights are quantized to {bits} bits, and cannot be trained without an adapter"
        hint = "Add a lora_config section (`lora_config: {}` takes every default), or name the model it was made of."
        raise UserError(Problem(message, hint, key="model_name_or_path"))


def require_trainer_takes(model: nn.Module) -> None:
    """Checks what upstream's Trainer does of a loaded model, whatever quantized it.

    Some kinds of quantization are undone by the load where the machine has no kernels for them, so that their name in
    the model's config does not say it yet.

    Raises:
        UserError: the model is quantized and has no adapter, or in a way that no adapter can be trained on.
    """
    from transformers.trainer_utils import validate_quantization_for_training

    try:
        validate_quantization_for_training(model)
    except ValueError as error:
        method = getattr(model.config.quantization_config, "quant_method", "unknown")  # type: ignore[union-attr]
        message = f"its weights are quantized ({getattr(method, 'value', method)}), and cannot be trained so"
        hint = "Name the model it was made of; what bitsandbytes quantized is trained with a lora_config section."
        raise UserError(Problem(message, hint, key="model_name_or_path")) from error


def quantized_layers(model: nn.Module) -> dict[str, Any]:
    """The layers whose weights are held in 4 or 8 bits, by name."""
    if "bitsandbytes" not in sys.modules:
        return {}
    bnb = sys.modules["bitsandbytes"].nn
    return {
        name: module for name, module in model.named_modules() if isinstance(module, (bnb.Linear4bit, bnb.Linear8bitLt))
    }


def settle(model: PreTrainedModel) -> int:
    """Make a model that was just loaded quantized ready: checked, frozen, and with one arithmetic for all modes.

    Returns:
        How many layers are quantized.

    Raises:
        UserError: no layer is: the setting had no effect.
    """
    layers = quantized_layers(model)
    if not layers:
        raise UserError(
            Problem(
                "no layer of the model was quantized",
                "Its linear layers are of a kind that bitsandbytes does not replace, or llm_int8_skip_modules leaves "
                "all of them out.",
                key="quantization_config",
            )
        )
    for layer in layers.values():
        if hasattr(layer, "support_avx512bf16_for_cpu"):
            layer.support_avx512bf16_for_cpu = False  # see the module's docstring
    model.requires_grad_(False)
    return len(layers)


def dequantize(model: PreTrainedModel, dtype: torch.dtype) -> PreTrainedModel:
    """The same function in plain linear layers: each weight becomes exactly the number its 4 or 8 bits stand for.

    Args:
        dtype: of all weights afterwards; no less precise than the model's own for the function to stay the same.
    """
    plain: Any = model.dequantize(dtype=dtype)
    return plain.to(dtype=dtype)  # type: ignore[no-any-return]
