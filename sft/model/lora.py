"""Attaches LoRA adapters by peft: exactly the weights that the config names are trained, and nothing else."""

from __future__ import annotations

import re
import types
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from sft.distributed.device import autocast_dtype
from sft.errors import Problem, UserError, first_line
from sft.model.embeddings import is_tied
from sft.model.quantization import import_bitsandbytes, quantized_layers

if TYPE_CHECKING:
    import torch
    from peft import PeftModel
    from torch import nn
    from transformers import PreTrainedModel

    from sft.config.schema import LoraKeys

# Initializations of peft that need a pass over data before training, which is not made here: with them peft would
# silently start from something else or fail in the first step.
_NEED_DATA = ("eva", "corda", "lora_ga")
# These subtract the adapter's initial value from the base weights.
_CHANGE_BASE = ("pissa", "olora", "loftq")
_INIT_SEED = 0


@dataclass(frozen=True)
class ParameterCount:
    """Numbers of weights; two weights that are packed in a byte count as two."""

    trainable: int
    total: int

    def __str__(self) -> str:
        share = 100 * self.trainable / max(self.total, 1)
        return f"{self.trainable:,} of {self.total:,} weights are trained ({share:.3g} %)"


def without_adapter(model: Any) -> Any:
    """Returns the causal LM that peft wraps, with its adapted layers; a model that is not wrapped is returned as is."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def count_parameters(model: nn.Module) -> ParameterCount:
    """Counts trainable and all weights; a tied weight counts once."""
    trainable = total = 0
    for parameter in model.parameters():
        count = parameter.numel()
        if type(parameter).__name__ == "Params4bit":  # two weights in a byte
            count *= 2 * parameter.element_size()
        total += count
        trainable += count if parameter.requires_grad else 0
    return ParameterCount(trainable, total)


def linear_layer_names(model: nn.Module) -> list[str]:
    """Returns the last parts of the names of all linear layers, e.g. `q_proj`: what `target_modules` can name."""
    from torch import nn
    from transformers.pytorch_utils import Conv1D

    return sorted({name.rpartition(".")[2] for name, m in model.named_modules() if isinstance(m, (nn.Linear, Conv1D))})


def _unmatched(names: Sequence[str], model: nn.Module) -> list[str]:
    """Returns those of `names` that no module's name equals or ends with."""
    modules = [name for name, _ in model.named_modules() if name]
    return [name for name in names if not any(m == name or m.endswith("." + name) for m in modules)]


def _check_targets(model: nn.Module, keys: LoraKeys) -> None:
    """Checks that every name in `target_modules` and `modules_to_save` exists; peft ignores unknown ones silently."""
    hint = f"The linear layers of this model are {', '.join(linear_layer_names(model))}; `all-linear` takes them all."
    key, targets = "lora_config.target_modules", keys.target_modules
    problems = []
    if isinstance(targets, list):
        problems += [Problem(f"no layer is named {name!r}", hint, key) for name in _unmatched(targets, model)]
    elif targets is not None and targets != "all-linear":
        try:
            found = any(re.fullmatch(targets, name) for name, _ in model.named_modules())
        except re.error as error:
            raise UserError(Problem(f"{targets!r} is not a regular expression: {error}", hint, key)) from error
        if not found:
            problems.append(Problem(f"no layer matches {targets!r}", hint, key))
    unknown = _unmatched(keys.modules_to_save or (), model)
    problems += [Problem(f"no module is named {name!r}", hint, "lora_config.modules_to_save") for name in unknown]
    if problems:
        raise UserError(*problems)


def _check_initialization(model: nn.Module, keys: LoraKeys) -> None:
    """Checks that `init_lora_weights` needs no data, and changes no base weights that are quantized."""
    init, key = str(keys.init_lora_weights), "lora_config.init_lora_weights"
    if init.startswith(_NEED_DATA):
        message = f"{init!r} needs a pass over the data before training, which is not implemented"
        raise UserError(Problem(message, "Use true, gaussian, orthogonal, olora, or pissa.", key))
    if init.startswith(_CHANGE_BASE) and quantized_layers(model):
        message = f"{init!r} rewrites the base weights, and these are quantized"
        raise UserError(Problem(message, "Use true or gaussian.", key))


def _embedding_names(model: PreTrainedModel) -> list[str]:
    """Returns the names of the input embedding and the output head, e.g. `embed_tokens` and `lm_head`."""
    names = {id(module): name.rpartition(".")[2] for name, module in model.named_modules()}
    both = (model.get_input_embeddings(), model.get_output_embeddings())
    return [names[id(module)] for module in both if id(module) in names]


def _trainable_token_rows(model: PreTrainedModel, keys: LoraKeys, new_ids: Sequence[int]) -> dict[str, list[int]]:
    """Returns `trainable_token_indices` for new tokens: the rows of each embedding that the adapter trains.

    New rows start as the mean of the old ones and the base is frozen: without this a new end token would never be
    learned. An untied head has an entry of its own. A matrix that the adapter trains in another way
    (`modules_to_save`, `target_modules`, the user's own `trainable_token_indices`) is skipped.
    """
    if not new_ids or keys.trainable_token_indices is not None:
        return {}
    targets = keys.target_modules if isinstance(keys.target_modules, list) else ()
    covered = {*(keys.modules_to_save or ()), *targets}
    names = _embedding_names(model)
    if is_tied(model):
        names = [] if covered & set(names) else names[:1]
    return {name: sorted(new_ids) for name in names if name not in covered}


def attach_adapter(
    model: PreTrainedModel, keys: LoraKeys, new_ids: Sequence[int] = ()
) -> tuple[PeftModel, dict[str, list[int]]]:
    """Freezes `model` and attaches a LoRA adapter (Hu et al., arXiv:2106.09685), whose weights are float32.

    The adapter is initialized from the run's seed (torch's, as it was set last), whatever was drawn before. Only an
    initialization that also changes the base (PiSSA with a randomized SVD) has a fixed seed: it must be the same when
    the adapter is loaded again.

    Args:
        new_ids: token ids without a trained embedding.

    Returns:
        The model, and by embedding the rows that are trained for the new tokens.

    Raises:
        UserError: a target that the model does not have, or a combination that peft refuses.
    """
    import_bitsandbytes()
    from peft import LoraConfig, get_peft_model

    _check_targets(model, keys)
    _check_initialization(model, keys)
    rows = _trainable_token_rows(model, keys, new_ids)
    kwargs = keys.kwargs()
    if rows:
        kwargs["trainable_token_indices"] = rows
    if is_tied(model) and set(keys.modules_to_save or ()) & set(_embedding_names(model)):
        # By default peft trains two copies that drift apart, and the merged model is no longer tied.
        kwargs["ensure_weight_tying"] = True
    try:
        with _init_rng(fixed=str(keys.init_lora_weights).startswith(_CHANGE_BASE)):
            adapted = get_peft_model(model, LoraConfig(**kwargs), autocast_adapter_dtype=True)
    except (ValueError, TypeError, NotImplementedError, RuntimeError) as error:
        hint = f"The model's linear layers: {', '.join(linear_layer_names(model))}."
        raise UserError(Problem(f"peft refuses the adapter: {error}", hint, key="lora_config")) from error
    _check_trainable(adapted)
    _skip_redundant_casts(adapted)
    return adapted, rows


def _skip_redundant_casts(model: PeftModel) -> None:
    """Makes the adapter use its input as it is where autocast would cast it back anyway.

    peft casts the input of each layer to the adapter's float32, and autocast casts it back for the matrix
    multiplication: all activations of seven layers per block are cast twice, for the same bits. The cast stays
    without autocast, and where dropout or a variant of LoRA computes with the input.
    """
    from peft.tuners.lora import Linear
    from torch.nn import Identity

    for layer in model.modules():
        if type(layer) is not Linear or layer.lora_variant:
            continue
        if all(type(dropout) is Identity for dropout in layer.lora_dropout.values()):
            settable: Any = layer
            settable._cast_input_dtype = types.MethodType(_cast_input_dtype, layer)


def _cast_input_dtype(layer: Any, x: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Replaces peft's method of that name; as a bound method it is copied by a deep copy of the model."""
    if x.dtype == autocast_dtype(x.device.type):
        return x
    cast: torch.Tensor = type(layer)._cast_input_dtype(layer, x, dtype)
    return cast


@contextmanager
def _init_rng(*, fixed: bool) -> Iterator[None]:
    """Reseeds torch's random number generators, and restores their state afterwards.

    Args:
        fixed: use the same seed in every run instead of the run's seed.
    """
    import torch

    devices = list(range(torch.cuda.device_count())) if torch.cuda.is_available() else []
    with torch.random.fork_rng(devices=devices):
        torch.manual_seed(_INIT_SEED if fixed else torch.initial_seed())
        yield


def _check_trainable(model: PeftModel) -> None:
    """Checks that the adapter's own parameters are trainable, and no others.

    peft saves the parameters of an adapter alone; any other weight that is trained would be lost.
    """
    from peft.tuners.tuners_utils import BaseTunerLayer
    from peft.utils.other import AuxiliaryTrainingWrapper

    trainable = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    if not trainable:
        raise UserError(Problem("the adapter has no trainable weight", key="lora_config"))
    own: set[str] = set()
    kinds: Any = (BaseTunerLayer, AuxiliaryTrainingWrapper)
    for prefix, module in model.named_modules():
        if isinstance(module, kinds):
            own.update(prefix + "." + name for name, _ in module.named_parameters() if "base_layer." not in name)
    config: Any = model.peft_config[str(model.active_adapter)]
    unexpected = sorted(n for n in trainable - own if not (config.bias != "none" and n.endswith("bias")))
    if unexpected:
        raise RuntimeError(f"weights of the base model are trainable beside the adapter: {', '.join(unexpected[:5])}")


def attach_saved_adapter(model: PreTrainedModel, folder: str) -> PeftModel:
    """Attaches the adapter in `folder` to its base, frozen, for inference.

    Raises:
        UserError: the adapter does not fit this base, or its file lacks some of its weights: peft only warns of that,
            and initializes them randomly.
    """
    import_bitsandbytes()
    from peft import PeftModel

    try:
        with _init_rng(fixed=True), warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            adapted = PeftModel.from_pretrained(model, folder)
    except (ValueError, RuntimeError, OSError, KeyError, TypeError) as error:
        message = f"the adapter in {folder!r} does not fit its base model: {first_line(error)}"
        raise UserError(Problem(message)) from error
    missing = next((str(w.message) for w in caught if "missing adapter keys" in str(w.message)), None)
    if missing is not None:
        raise UserError(Problem(f"the adapter in {folder!r} is incomplete: {missing[:300]}"))
    return adapted
