"""LoRA adapters through peft: attached so that exactly what the config names is trained, and nothing else."""

from __future__ import annotations

import re
import types
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from sft.errors import Problem, UserError, first_line
from sft.model.embeddings import is_tied
from sft.model.quantization import import_bitsandbytes, quantized_layers

if TYPE_CHECKING:
    import torch
    from peft import PeftModel
    from torch import nn
    from transformers import PreTrainedModel

    from sft.config.schema import LoraKeys

# Initialisations of peft that need a pass over data before training, which nothing here makes: with them peft would
# silently start from something else or fail in the first step.
NEEDS_DATA = ("eva", "corda", "lora_ga")
# These replace the base weights by what is left after the adapter's start is taken out.
CHANGES_BASE = ("pissa", "olora", "loftq")
_INIT_SEED = 0


@dataclass(frozen=True)
class ParameterCount:
    """Numbers of weights; those packed in 4 bits count as the weights they stand for."""

    trainable: int
    total: int

    def __str__(self) -> str:
        share = 100 * self.trainable / max(self.total, 1)
        return f"{self.trainable:,} of {self.total:,} weights are trained ({share:.3g} %)"


def without_adapter(model: Any) -> Any:
    """The causal LM that peft has wrapped, its layers replaced by adapted ones; a model that is not wrapped, itself."""
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
    """The last parts of the names of all linear layers, e.g. `q_proj`: what `target_modules` can name."""
    from torch import nn
    from transformers.pytorch_utils import Conv1D

    return sorted({name.rpartition(".")[2] for name, m in model.named_modules() if isinstance(m, (nn.Linear, Conv1D))})


def _unmatched(names: Sequence[str], model: nn.Module) -> list[str]:
    """Those of `names` that no module's name equals or ends with; peft passes over them in silence."""
    modules = [name for name, _ in model.named_modules() if name]
    return [name for name in names if not any(m == name or m.endswith("." + name) for m in modules)]


def _check_targets(model: nn.Module, keys: LoraKeys) -> None:
    """Every name in `target_modules` and `modules_to_save` must exist.

    Raises:
        UserError: lists the names that do not, and the linear layers that do.
    """
    hint = f"The linear layers of this model are {', '.join(linear_layer_names(model))}; `all-linear` takes them all."
    problems = []
    targets = keys.target_modules
    if isinstance(targets, (list, tuple)):
        problems += [
            Problem(f"no layer is named {name!r}", hint, key="lora_config.target_modules")
            for name in _unmatched(targets, model)
        ]
    elif isinstance(targets, str) and targets != "all-linear":
        try:
            found = any(re.fullmatch(targets, name) for name, _ in model.named_modules())
        except re.error as error:
            raise UserError(
                Problem(f"{targets!r} is no regular expression: {error}", hint, key="lora_config.target_modules")
            ) from error
        if not found:
            problems.append(Problem(f"no layer matches {targets!r}", hint, key="lora_config.target_modules"))
    problems += [
        Problem(f"no module is named {name!r}", hint, key="lora_config.modules_to_save")
        for name in _unmatched(getattr(keys, "modules_to_save", None) or (), model)
    ]
    if problems:
        raise UserError(*problems)


def _check_initialisation(model: nn.Module, keys: LoraKeys) -> None:
    init = getattr(keys, "init_lora_weights", True)
    if not isinstance(init, str):
        return
    key = "lora_config.init_lora_weights"
    if init.startswith(NEEDS_DATA):
        raise UserError(
            Problem(
                f"{init!r} needs a pass over the data before training, which is not made here",
                "Use true, gaussian, orthogonal, olora, or pissa.",
                key=key,
            )
        )
    if _changes_base(keys) and quantized_layers(model):
        raise UserError(
            Problem(f"{init!r} rewrites the base weights, and these are quantized", "Use true or gaussian.", key=key)
        )


def _changes_base(keys: LoraKeys) -> bool:
    return str(getattr(keys, "init_lora_weights", True)).startswith(CHANGES_BASE)


def _ends(model: PreTrainedModel) -> list[str]:
    """What the input embedding and the output head are called, e.g. `embed_tokens` and `lm_head`."""
    names = [_last_part(model, model.get_input_embeddings()), _last_part(model, model.get_output_embeddings())]
    return [name for name in names if name is not None]


def _replaced(keys: LoraKeys) -> set[str]:
    """Modules that are trained whole."""
    return set(getattr(keys, "modules_to_save", None) or ())


def _last_part(model: nn.Module, wanted: Any) -> str | None:
    return next((name.rpartition(".")[2] for name, module in model.named_modules() if module is wanted), None)


def token_rows_to_train(model: PreTrainedModel, keys: LoraKeys, new_ids: Sequence[int]) -> dict[str, list[int]]:
    """`trainable_token_indices` for new tokens: which rows of which embedding the adapter is to train.

    New rows start as the mean of the old ones and the base is frozen, so that without this a new end token would
    never be learned. With tied embeddings the one entry covers the head; with an untied head it has its own. A matrix
    that the adapter trains by another way (`modules_to_save`, `target_modules`, a list of the user's own) is left out.
    """
    if not new_ids or getattr(keys, "trainable_token_indices", None) is not None:
        return {}
    targets = keys.target_modules if isinstance(keys.target_modules, (list, tuple)) else ()
    covered = _replaced(keys) | set(targets)
    names = _ends(model)
    if is_tied(model):
        names = [] if covered & set(names) else names[:1]
    return {name: sorted(new_ids) for name in names if name not in covered}


def attach_adapter(
    model: PreTrainedModel, keys: LoraKeys, new_ids: Sequence[int] = ()
) -> tuple[PeftModel, dict[str, list[int]]]:
    """Freeze `model` and put a LoRA adapter on it (Hu et al., arXiv:2106.09685); the adapter itself is float32.

    The random start is drawn from the run's seed (torch's, as it was set last), whatever was drawn before. Only an
    initialisation that also changes the base (PiSSA with a randomized SVD) has a seed of its own, so that it is the
    same when the adapter is loaded again.

    Args:
        new_ids: token ids without a trained embedding.

    Returns:
        The model, and the embedding rows that are trained for the new tokens.

    Raises:
        UserError: a target that the model does not have, or a combination that peft refuses.
    """
    import_bitsandbytes()
    from peft import LoraConfig, get_peft_model

    _check_targets(model, keys)
    _check_initialisation(model, keys)
    rows = token_rows_to_train(model, keys, new_ids)
    kwargs = keys.kwargs()
    if rows:
        kwargs["trainable_token_indices"] = rows
    if is_tied(model) and _replaced(keys) & set(_ends(model)):
        # Left to itself peft trains two copies that drift apart, and the merged model is no longer tied.
        kwargs["ensure_weight_tying"] = True
    try:
        with initialising(_changes_base(keys)):
            adapted = get_peft_model(model, LoraConfig(**kwargs), autocast_adapter_dtype=True)
    except (ValueError, TypeError, NotImplementedError, RuntimeError) as error:
        layers = ", ".join(linear_layer_names(model))
        raise UserError(
            Problem(f"peft refuses the adapter: {error}", f"The model's linear layers: {layers}.", key="lora_config")
        ) from error
    check_trainable(adapted)
    _cast_once(adapted)
    return adapted, rows


def _cast_once(model: PeftModel) -> None:
    """Lets the adapter take its input as autocast would have it.

    peft casts what each layer is given to the adapter's float32, and autocast casts it back for the product: two passes
    over all activations of seven layers a block, for the same bits. Without autocast, and where dropout or a variant
    of LoRA computes with the input, it stays so.
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
    """In the place of peft's; a bound method follows a deep copy of the model."""
    import torch

    kind = x.device.type
    if torch.is_autocast_enabled(kind) and x.dtype == torch.get_autocast_dtype(kind):
        return x
    cast: torch.Tensor = type(layer)._cast_input_dtype(layer, x, dtype)
    return cast


@contextmanager
def initialising(changes_base: bool = True) -> Iterator[None]:
    """While this lasts torch's random numbers begin anew; afterwards they go on as if nothing happened.

    Args:
        changes_base: they begin with the same seed in every run, and not with the run's.
    """
    import torch

    devices = list(range(torch.cuda.device_count())) if torch.cuda.is_available() else []
    with torch.random.fork_rng(devices=devices):
        torch.manual_seed(_INIT_SEED if changes_base else torch.initial_seed())
        yield


def check_trainable(model: PeftModel) -> None:
    """Only the adapter's own parameters may be trainable, and some must be.

    peft marks what belongs to an adapter by its name in the state dict that it saves; whatever is trained beyond that
    would be lost in saving.

    Raises:
        UserError: nothing is trained.
        RuntimeError: a weight of the base is: a mistake of the program's, not of the user's.
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
    strangers = sorted(n for n in trainable - own if not (config.bias != "none" and n.endswith("bias")))
    if strangers:
        raise RuntimeError(f"weights of the base model are trainable beside the adapter: {', '.join(strangers[:5])}")


def attach_saved_adapter(model: PreTrainedModel, folder: str) -> PeftModel:
    """Put the adapter in `folder` on its base, frozen, for inference.

    Raises:
        UserError: the adapter does not fit this base, or its file lacks some of its weights, which peft would replace
            by fresh ones with no more than a warning.
    """
    import_bitsandbytes()
    from peft import PeftModel

    try:
        with initialising(), warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            adapted = PeftModel.from_pretrained(model, folder)
    except (ValueError, RuntimeError, OSError, KeyError, TypeError) as error:
        raise UserError(
            Problem(f"the adapter in {folder!r} does not fit its base model: {first_line(error)}")
        ) from error
    missing = next((str(w.message) for w in caught if "missing adapter keys" in str(w.message)), None)
    if missing is not None:
        raise UserError(Problem(f"the adapter in {folder!r} is not whole: {missing[:300]}"))
    return adapted
