"""`torch_compile`: each decoder layer is compiled, for rows of any length, in three graphs at the most.

A pass is one row of N tokens in D documents, and both change with every batch. Neither is a number in a graph: the
dimensions that hold them are marked dynamic, the boundaries go in as tensors, and so nothing is padded to sizes that
were compiled before. All layers of a kind run the same graph, for their weights are inputs; compiling takes the time
of one layer, whatever the depth of the model.

A graph is for one kind of layer in one situation. Where there are more pairs than three (sliding and full attention in
turns, say) those come first that cost the most time, and the others run as they are:

    training      gradients also to the layer's input
    evaluation    no gradients; only where the run evaluates
    first layer   gradients, but none to its input: behind frozen embeddings

Embeddings, final norm, and head with loss are outside; a call without boundaries (generation) is not compiled.
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

GRAPHS = 3
KEYS = ("torch_compile", "torch_compile_backend", "torch_compile_mode")
"""Upstream's keys; to upstream's Trainer, which would compile the whole model, they are not given."""

_STATE = "_compiled_layer"
_INDUCTOR = "inductor"
_OF_NO_USE = {"layer_idx", "training"}  # what differs between layers, and between situations, of the same kind

Situation = Literal["training", "evaluation", "first layer"]


@dataclass(frozen=True, slots=True)
class CompileSettings:
    """How layers are compiled.

    Attributes:
        backend: one of torch's, e.g. `inductor`.
        options: of the backend; empty for another than inductor.
    """

    backend: str
    options: dict[str, Any]


def compile_settings(asked: bool, backend: str | None, mode: str | None) -> CompileSettings | None:
    """What `torch_compile`, `torch_compile_backend` and `torch_compile_mode` ask for; None: nothing is compiled.

    A backend or a mode alone turns compiling on, as upstream has it. Random numbers are drawn as without compiling.

    Raises:
        UserError: there is no such backend or mode, it cannot serve lengths that vary, or a compiler is missing.
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
        reason = "a CUDA graph replays one length, and rows vary in length: reduce-overhead would record each anew"
        raise UserError(Problem(reason, "Use default or max-autotune-no-cudagraphs.", KEYS[2]))
    _require_compiler()
    options = {**modes.get(mode or "default", {}), "fallback_random": True}
    if options.pop("triton.cudagraphs", False) and torch.cuda.is_available():
        logger.info("torch_compile_mode %s without CUDA graphs, which replay one length only", mode)
    return CompileSettings(backend, options)


def _require_compiler() -> None:
    """Inductor writes C++ for a CPU and Triton for a GPU."""
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
    """Lets the decoder layers of `model` run compiled wherever documents are given; the first pass compiles.

    Activation checkpointing is compiled with them, so that what is computed again is part of the backward graph.
    Called anew, it begins anew.

    Args:
        model: a causal LM of transformers, wrapped by peft or not, with its adapter and checkpointing in place; not
            yet by DDP.
        evaluates: whether the run evaluates. Otherwise no graph is spent on passes without gradients.

    Raises:
        UserError: the model's attention is not told where documents begin, or it is not made of transformers' layers.
    """
    config: Any = model.config
    attention = config.get_text_config(decoder=True)._attn_implementation
    if attention != document_attention.NAME:
        reason = f"rows of any length are compiled with attention over documents only, and this run has {attention}"
        raise UserError(Problem(reason, "Set attn_implementation: sft_documents, or remove torch_compile.", KEYS[0]))
    layers = [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]
    foreign = [layer for layer in layers if "forward" in layer.__dict__ and not hasattr(layer, _STATE)]
    if not layers or foreign:
        reason = "they were changed by another library" if foreign else "it has none of transformers' kind"
        raise UserError(
            Problem(f"the layers of {type(model).__name__} cannot be compiled: {reason}", "Remove it.", KEYS[0])
        )
    # DDP's reducer overlaps with backward passes of single layers as it is. Left on, dynamo would cut a layer's graph
    # at DDP's buckets, and refuses those with checkpointing.
    torch._dynamo.config.optimize_ddp = False
    # A graph must not serve a layer that has a hook which the layer it was made of has not.
    torch._dynamo.config.skip_nnmodule_hook_guards = False
    torch.compiler.assume_constant_result(document_attention.capability)  # dynamo cannot trace the question itself
    described = [_kind(layer) for layer in layers]
    distinct = list(dict.fromkeys(described))
    kinds = [distinct.index(kind) for kind in described]
    shared = _Shared(settings, _most_costly(kinds, evaluates))
    for layer, kind in zip(layers, kinds, strict=True):
        settable: Any = layer
        setattr(settable, _STATE, _Layer(kind, shared))
        # A bound method follows a deep copy; the signature stays the layer's, for those who look at it.
        settable.forward = types.MethodType(functools.wraps(type(layer).forward)(_forward), layer)
    logger.info("Compiling %d decoder layers with %s: %s", len(layers), settings.backend, shared.describe(kinds))


def _kind(layer: nn.Module) -> tuple[Any, ...]:
    """Equal for layers that one graph can serve: the same modules, settings, and shapes of weights."""
    modules = []
    for name, module in layer.named_modules():
        settings = tuple(
            (key, value)
            for key, value in sorted(vars(module).items())
            if isinstance(value, bool | int | float | str) and key not in _OF_NO_USE
        )
        modules.append((name, type(module), settings))
    weights = [(name, p.shape, p.dtype, p.requires_grad) for name, p in layer.named_parameters()]
    return (*modules, *weights, _attention_kind(layer))


def _attention_kind(layer: nn.Module) -> str | None:
    """What the config says of this layer's attention, for models whose layers do not say it themselves."""
    for module in layer.modules():
        index, kinds = getattr(module, "layer_idx", None), getattr(getattr(module, "config", None), "layer_types", None)
        if index is not None and kinds:
            return str(kinds[index])
    return None


def _most_costly(kinds: Sequence[int], evaluates: bool) -> list[tuple[int, Situation]]:
    """The pairs that get a graph: of the kinds with the most layers, training before evaluation."""
    by_count = [kind for kind, _ in Counter(kinds).most_common()]
    pairs: list[tuple[int, Situation]] = [(kind, "training") for kind in by_count]
    if evaluates:
        pairs += [(kind, "evaluation") for kind in by_count]
    return [*pairs, (kinds[0], "first layer")][:GRAPHS]


class _Shared:
    """What the layers of one model have in common: the compiled function, and the pairs it is called for."""

    def __init__(self, settings: CompileSettings, chosen: list[tuple[int, Situation]]) -> None:
        self.chosen = chosen
        # The limit is a safeguard: a guard that nobody thought of ends compiling, not the count of three.
        compile_: Any = torch.compile  # its overloads leave out the last two
        self.run: Callable[..., Any] = compile_(
            _run,
            fullgraph=True,
            backend=settings.backend,
            options=settings.options or None,
            recompile_limit=GRAPHS,
            isolate_recompiles=True,
        )

    def describe(self, kinds: Sequence[int]) -> str:
        """The chosen pairs, in words."""
        counts = Counter(kinds)
        return ", ".join(
            situation if situation == "first layer" else f"{situation} ({counts[kind]} alike)"
            for kind, situation in self.chosen
        )


@dataclass(frozen=True, slots=True)
class _Layer:
    """What a layer remembers.

    Attributes:
        kind: a number that layers have in common which one graph can serve.
    """

    kind: int
    shared: _Shared


@dataclass(frozen=True)
class _TracedBoundaries:
    """`DocumentOffsets` of tensors alone: numbers and tuples would be compiled in, and each batch would be a new graph.

    Attributes:
        offsets, cu_seqlens: (documents + 1,), as in `DocumentOffsets`.
        longest: (tokens of the longest document, 0), on the host: a number that is not compiled in.
    """

    offsets: Tensor
    cu_seqlens: Tensor
    longest: Tensor

    @property
    def max_length(self) -> int:
        """Tokens of the longest document."""
        return self.longest.shape[0]


def _run(layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    return type(layer).forward(layer, *args, **kwargs)


def _forward(layer: Any, *args: Any, **kwargs: Any) -> Any:
    """In the place of a layer's `forward`."""
    state: _Layer = getattr(layer, _STATE)
    plain = type(layer).forward
    documents: DocumentOffsets | None = kwargs.get("documents")
    hidden = args[0] if args else None
    # A size of one is no dimension that varies, to torch: a row that has nothing longer is not worth a graph.
    if documents is None or hidden is None or documents.max_length < 2:
        return plain(layer, *args, **kwargs)
    pair = state.kind, _situation(hidden)
    if pair not in state.shared.chosen:
        return plain(layer, *args, **kwargs)
    if pair[1] == "evaluation":
        hidden = hidden.detach()  # peft's hook makes embeddings require gradients even where none are made
    traced = _TracedBoundaries(documents.offsets, documents.cu_seqlens, torch.empty(documents.max_length, 0))
    arguments = (hidden, *args[1:]), kwargs | {"documents": traced}
    _let_vary(hidden.shape[1], *arguments, traced)
    try:
        return state.shared.run(layer, *arguments)
    except torch._dynamo.exc.FailOnRecompileLimitHit as error:
        state.shared.chosen.remove(pair)
        logger.warning("torch_compile: %s needs a graph beyond %d, and runs uncompiled: %s", pair[1], GRAPHS, error)
        return plain(layer, *args, **kwargs)
    except torch._dynamo.exc.TorchDynamoException as error:
        reason = f"{type(layer).__name__} cannot be compiled: {_in_short(error)}"
        raise UserError(Problem(reason, "Remove torch_compile.", KEYS[0])) from error


def _situation(hidden: Tensor) -> Situation:
    if not torch.is_grad_enabled():
        return "evaluation"
    return "training" if hidden.requires_grad else "first layer"


def _let_vary(tokens: int, args: tuple[Any, ...], kwargs: dict[str, Any], documents: _TracedBoundaries) -> None:
    """Marks the dimension of tokens in each input: (1, N, ...) or (N, ...); in a mask, (1, 1, 1, N), it is the last."""
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


def _in_short(error: Exception) -> str:
    """The first line, and dynamo's explanation where it has one."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
    return ". ".join([lines[0], *(line.removeprefix("Explanation: ") for line in lines if "Explanation:" in line)])
