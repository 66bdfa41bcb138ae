"""Compiles each decoder layer (`torch_compile`) for any number of tokens, in at most three graphs.

A micro-batch is one row of N tokens in D documents, and both change each time. Neither is a constant of a graph: the
dimensions of that size are marked dynamic, the document offsets are passed as tensors, and nothing is padded. All
layers of a kind share a graph, because their weights are inputs: compiling takes the time of one layer, whatever the
depth of the model.

A graph is for one kind of layer in one situation. If there are more than three such pairs (sliding and full attention
alternate, for example), those that cost the most time are compiled, and the others run uncompiled:

    training      gradients also for the layer's input
    evaluation    no gradients; only if the run evaluates
    first layer   gradients, but none for its input: after frozen embeddings

Embeddings, final norm, and head with loss are not compiled, nor is a call without documents (generation).
"""

from __future__ import annotations

import functools
import logging
import types
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from transformers.modeling_layers import GradientCheckpointingLayer

from sft.data.loading.document_offsets import DocumentOffsets
from sft.errors import Problem, UserError
from sft.model.attention import document_attention

logger = logging.getLogger("sft")

MAX_GRAPHS = 3
KEYS = ("torch_compile", "torch_compile_backend", "torch_compile_mode")
"""Upstream's keys; upstream's Trainer, which would compile the whole model, does not get them."""

_STATE = "_compiled_layer"  # of a layer: its kind, the same number for all that can share a graph, and the graphs
_INDUCTOR = "inductor"
_IGNORED = {"layer_idx", "training"}  # differ between layers, or between situations, of the same kind

Situation = Literal["training", "evaluation", "first layer"]


@dataclass(frozen=True, slots=True)
class CompileSettings:
    """How layers are compiled.

    Attributes:
        backend: one of torch's, e.g. `inductor`.
        options: of inductor; empty for any other backend.
    """

    backend: str
    options: dict[str, Any]


def compile_settings(asked: bool, backend: str | None, mode: str | None) -> CompileSettings | None:
    """Checks `torch_compile`, `torch_compile_backend` and `torch_compile_mode`; returns None if nothing is compiled.

    A backend or a mode alone turns compiling on, as upstream does. Random numbers are drawn as without compiling.

    Raises:
        UserError: there is no such backend or mode, it does not support varying lengths, or a compiler is missing.
    """
    if not (asked or backend or mode):
        return None
    backend = backend or _INDUCTOR
    known = torch._dynamo.list_backends(None)
    if backend not in known:
        raise UserError(Problem(f"no backend {backend!r}", f"Backends are {', '.join(known)}.", KEYS[1]))
    if backend != _INDUCTOR:
        if mode is not None:
            raise UserError(Problem(f"{mode!r} is a mode of inductor, not of {backend}", "Remove one.", KEYS[2]))
        return CompileSettings(backend, {})
    modes = torch._inductor.list_mode_options()
    if mode is not None and mode not in modes:
        raise UserError(Problem(f"no mode {mode!r}", f"Modes are {', '.join(modes)}.", KEYS[2]))
    if mode == "reduce-overhead":
        reason = "a CUDA graph replays one length, and lengths vary: reduce-overhead would record a graph for each"
        raise UserError(Problem(reason, "Use default or max-autotune-no-cudagraphs.", KEYS[2]))
    _require_compiler()
    options = {**modes.get(mode or "default", {}), "fallback_random": True}
    if options.pop("triton.cudagraphs", False) and torch.cuda.is_available():
        logger.info("torch_compile_mode %s runs without CUDA graphs, which replay one length only", mode)
    return CompileSettings(backend, options)


def _require_compiler() -> None:
    """Checks that inductor finds a C++ compiler for a CPU, or Triton for a GPU."""
    if torch.cuda.is_available():
        from torch.utils._triton import has_triton

        if not has_triton():
            hint = "Install triton, or remove torch_compile; GPUs older than Volta have none."
            raise UserError(Problem("there is no Triton for this GPU, which torch.compile needs", hint, KEYS[0]))
        return
    from torch._inductor.cpp_builder import get_cpp_compiler
    from torch._inductor.exc import InvalidCxxCompiler

    try:
        get_cpp_compiler()
    except InvalidCxxCompiler as error:
        hint = "Install g++ (Debian: apt install g++), name another in the environment as CXX, or remove torch_compile."
        raise UserError(Problem("torch.compile needs a C++ compiler and finds none", hint, KEYS[0])) from error


def compile_layers(model: nn.Module, settings: CompileSettings, *, evaluates: bool) -> None:
    """Makes the decoder layers of `model` run compiled in calls with documents; the first call compiles.

    Activation checkpointing is compiled with them: the recomputation is part of the backward graph. A second call of
    this function starts over.

    Args:
        model: a causal LM of transformers, wrapped by peft or not, with its adapter and checkpointing in place; not
            yet wrapped by DDP.
        evaluates: whether the run evaluates. Otherwise calls without gradients get no graph.

    Raises:
        UserError: the model's attention takes no documents, or its layers are not transformers' own.
    """
    config: Any = model.config
    attention = config.get_text_config(decoder=True)._attn_implementation
    if attention != document_attention.NAME:
        reason = f"only sft_documents attention is compiled for any length, and this run has {attention}"
        raise UserError(Problem(reason, "Set attn_implementation: sft_documents, or remove torch_compile.", KEYS[0]))
    layers = [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]
    foreign = [layer for layer in layers if "forward" in layer.__dict__ and not hasattr(layer, _STATE)]
    if not layers or foreign:
        reason = "another library changed them" if foreign else "they are not transformers' own"
        message = f"the layers of {type(model).__name__} cannot be compiled: {reason}"
        raise UserError(Problem(message, "Remove it.", KEYS[0]))
    # DDP's reducer overlaps with backward passes of single layers anyway. If this were on, dynamo would split a layer's
    # graph at DDP's buckets, and refuse those with checkpointing.
    torch._dynamo.config.optimize_ddp = False
    # A graph must not run a layer that has other hooks than the layer it was traced from.
    torch._dynamo.config.skip_nnmodule_hook_guards = False
    torch.compiler.assume_constant_result(document_attention.capability)  # dynamo cannot trace it
    descriptions = [_describe(layer) for layer in layers]
    distinct = list(dict.fromkeys(descriptions))
    kinds = [distinct.index(description) for description in descriptions]
    shared = _SharedGraphs(settings, _most_costly(kinds, evaluates))
    for layer, kind in zip(layers, kinds, strict=True):
        settable: Any = layer
        setattr(settable, _STATE, (kind, shared))
        # A bound method is copied by a deep copy; the signature stays the layer's, for code that inspects it.
        settable.forward = types.MethodType(functools.wraps(type(layer).forward)(_forward), layer)
    logger.info("Compiling %d decoder layers with %s: %s", len(layers), settings.backend, shared.describe(kinds))


def _describe(layer: nn.Module) -> tuple[Any, ...]:
    """Returns modules, settings, and shapes of weights; layers of which these are equal can share a graph."""
    modules = []
    for name, module in layer.named_modules():
        settings = tuple(
            (key, value)
            for key, value in sorted(vars(module).items())
            if isinstance(value, bool | int | float | str) and key not in _IGNORED
        )
        modules.append((name, type(module), settings))
    weights = [(name, p.shape, p.dtype, p.requires_grad) for name, p in layer.named_parameters()]
    return (*modules, *weights, _attention_kind(layer))


def _attention_kind(layer: nn.Module) -> str | None:
    """Returns the layer's type of attention from the config, for models whose layers do not hold it themselves."""
    for module in layer.modules():
        index, kinds = getattr(module, "layer_idx", None), getattr(getattr(module, "config", None), "layer_types", None)
        if index is not None and kinds:
            return str(kinds[index])
    return None


def _most_costly(kinds: Sequence[int], evaluates: bool) -> list[tuple[int, Situation]]:
    """Returns the pairs that get a graph: kinds with the most layers first, training before evaluation."""
    by_count = [kind for kind, _ in Counter(kinds).most_common()]
    pairs: list[tuple[int, Situation]] = [(kind, "training") for kind in by_count]
    if evaluates:
        pairs += [(kind, "evaluation") for kind in by_count]
    return [*pairs, (kinds[0], "first layer")][:MAX_GRAPHS]


class _SharedGraphs:
    """What the layers of one model share: the compiled function, and the pairs that it is called for."""

    def __init__(self, settings: CompileSettings, chosen: list[tuple[int, Situation]]) -> None:
        self.chosen = chosen
        # The limit is a safeguard: with a guard that was not foreseen, compiling ends instead of going on without end.
        compile_: Any = torch.compile  # its overloads lack the last two
        self.run: Callable[..., Any] = compile_(
            call_layer,
            fullgraph=True,
            backend=settings.backend,
            options=settings.options or None,
            recompile_limit=MAX_GRAPHS,
            isolate_recompiles=True,
        )

    def describe(self, kinds: Sequence[int]) -> str:
        """Names the chosen pairs, for the log."""
        counts = Counter(kinds)
        return ", ".join(
            situation if situation == "first layer" else f"{situation} ({counts[kind]} alike)"
            for kind, situation in self.chosen
        )


@dataclass(frozen=True)
class _TracedOffsets:
    """`DocumentOffsets` of tensors alone: numbers and tuples would be constants, and each batch would be a new graph.

    Attributes:
        offsets, cu_seqlens: (documents + 1,), as in `DocumentOffsets`.
        longest: (tokens of the longest document, 0), on the host: a size, which is dynamic.
    """

    offsets: Tensor
    cu_seqlens: Tensor
    longest: Tensor

    @property
    def max_length(self) -> int:
        """Tokens of the longest document."""
        return self.longest.shape[0]


def call_layer(layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Calls the layer's own forward; this function is what torch compiles."""
    return type(layer).forward(layer, *args, **kwargs)


def _forward(layer: Any, *args: Any, **kwargs: Any) -> Any:
    """Replaces a layer's `forward`: runs it compiled if its kind and situation have a graph."""
    shared: _SharedGraphs
    kind, shared = getattr(layer, _STATE)
    plain = type(layer).forward
    documents: DocumentOffsets | None = kwargs.get("documents")
    hidden = args[0] if args else None
    # torch specializes on a size of one: a row of such documents is not worth a graph.
    if documents is None or hidden is None or documents.max_length < 2:
        return plain(layer, *args, **kwargs)
    pair = kind, _situation(hidden)
    if pair not in shared.chosen:
        return plain(layer, *args, **kwargs)
    if pair[1] == "evaluation":
        hidden = hidden.detach()  # peft's hook makes embeddings require gradients even without grad mode
    traced = _TracedOffsets(documents.offsets, documents.cu_seqlens, torch.empty(documents.max_length, 0))
    arguments = (hidden, *args[1:]), kwargs | {"documents": traced}
    _mark_dynamic(hidden.shape[1], *arguments, traced)
    try:
        return shared.run(layer, *arguments)
    except torch._dynamo.exc.FailOnRecompileLimitHit as error:
        shared.chosen.remove(pair)
        message = "torch_compile: %s needs more than %d graphs, and runs uncompiled: %s"
        logger.warning(message, pair[1], MAX_GRAPHS, error)
        return plain(layer, *args, **kwargs)
    except torch._dynamo.exc.TorchDynamoException as error:
        reason = f"{type(layer).__name__} cannot be compiled: {_summarize(error)}"
        raise UserError(Problem(reason, "Remove torch_compile.", KEYS[0])) from error


def _situation(hidden: Tensor) -> Situation:
    if not torch.is_grad_enabled():
        return "evaluation"
    return "training" if hidden.requires_grad else "first layer"


def _mark_dynamic(tokens: int, args: tuple[Any, ...], kwargs: dict[str, Any], documents: _TracedOffsets) -> None:
    """Marks the dimension of tokens dynamic in each input: (1, N, ...), (N, ...), or a mask of (1, 1, 1, N)."""
    mask = kwargs.get("attention_mask")
    for tensor in torch.utils._pytree.tree_leaves((args, {**kwargs, "attention_mask": None, "documents": None})):
        if isinstance(tensor, Tensor):
            dimension = 0 if tensor.ndim and tensor.shape[0] == tokens else 1
            if tensor.ndim > dimension and tensor.shape[dimension] == tokens:
                torch._dynamo.maybe_mark_dynamic(tensor, dimension)
    for each in mask.values() if isinstance(mask, dict) else (mask,):
        if each is not None:
            torch._dynamo.maybe_mark_dynamic(each, each.ndim - 1)
    for each in (documents.offsets, documents.cu_seqlens, documents.longest):
        torch._dynamo.maybe_mark_dynamic(each, 0)


def _summarize(error: Exception) -> str:
    """Returns the first line, and dynamo's explanation if it has one."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
    return ". ".join([lines[0], *(line.removeprefix("Explanation: ") for line in lines if "Explanation:" in line)])
