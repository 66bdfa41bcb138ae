"""How a causal LM computes logits from its decoder's hidden states, found out by running its own code.

Models scale, soft-cap, shift or slice their logits after `lm_head`, and adapters, quantization and sharding replace
`lm_head` by other modules. No list of models is needed: the model's own `forward` runs with a decoder that returns its
input, and the transform after the projection is measured once.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor

from sft.distributed.dtensor import gathered, is_plain_linear, shallow_copy, to_full, vocabulary_shard, without_hooks

_PROBE = 64.0  # a logit so large that soft-capping changes it
_ROUNDINGS = 8  # units in the last place by which two computations of the same logits may differ, of the largest


@dataclass(frozen=True, slots=True)
class LogitTransform:
    """The function after a linear head with output x: cap · tanh(scale · x / cap), or scale · x without a cap."""

    scale: float = 1.0
    cap: float | None = None

    def __call__(self, values: torch.Tensor) -> torch.Tensor:
        """Applies it in place, to float32."""
        if self.cap is not None:
            return values.mul_(self.scale / self.cap).tanh_().mul_(self.cap)
        return values if self.scale == 1.0 else values.mul_(self.scale)

    def factor(self, raw: torch.Tensor) -> float | torch.Tensor:
        """Returns its derivative at `raw`, which is overwritten where there is a cap."""
        if self.cap is None:
            return self.scale
        return raw.mul_(self.scale / self.cap).tanh_().square_().neg_().add_(1.0).mul_(self.scale)


class _Outputs(tuple):
    """A decoder's outputs: the hidden states first, and None for every other name."""

    @property
    def last_hidden_state(self) -> torch.Tensor:
        return self[0]

    def __getattr__(self, name: str) -> None:
        if name.startswith("__"):
            raise AttributeError(name)


class _Echo(nn.Module):
    """Takes the decoder's place and returns the `inputs_embeds` that it gets; other attributes are the decoder's."""

    def __init__(self, decoder: nn.Module) -> None:
        super().__init__()
        self.__dict__["_decoder"] = decoder  # not a submodule: its parameters are not the head's

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(self.__dict__["_decoder"], name)

    def forward(self, *args: Any, inputs_embeds: torch.Tensor, **kwargs: Any) -> _Outputs:
        return _Outputs((inputs_embeds,))


@dataclass(frozen=True, slots=True)
class OutputHead:
    """The parts of a model that compute its logits.

    Attributes:
        decoder: the decoder's name in the model, e.g. `model`.
        linear: the name of the module that projects to the vocabulary, e.g. `lm_head`.
        vocab_size: V, the number of logits per token.
        transform: after the projection; None where it is neither a scaling nor a soft-capping.
    """

    decoder: str
    linear: str
    vocab_size: int
    transform: LogitTransform | None

    def logits(self, model: nn.Module, hidden: torch.Tensor) -> torch.Tensor:
        """Computes (N, V) from (N, D) with the model's own code, inside `gathered` of the head.

        With tensor parallelism the result may be a slice of V.
        """
        own = without_hooks(model.get_submodule(self.linear))
        replaced = {f"{self.linear}.{name}".rstrip("."): module for name, module in own.items()}
        return _echoed_logits(model, hidden, {self.decoder: _Echo(model.get_submodule(self.decoder)), **replaced})

    def parameters(self, model: nn.Module, hidden: torch.Tensor) -> list[torch.Tensor]:
        """Returns the trainable tensors that the logits depend on: the leaves of their graph.

        The module tree does not tell: an adapter that `lm_head` shares with the embeddings is a child of those.

        Args:
            hidden: (N, D), for its dtype and device.
        """
        with torch.enable_grad():
            logits = self.logits(model, hidden.new_zeros(1, hidden.shape[-1]))
        return list(_leaves(logits))

    def plain_linear(self, model: nn.Module) -> nn.Linear | None:
        """Returns the projection if the head is a matrix multiplication, a bias and `transform`; None otherwise.

        Its weight may be a DTensor: gathered by FSDP2, or split by the vocabulary with tensor parallelism.
        """
        linear = model.get_submodule(self.linear)
        if self.transform is None or not is_plain_linear(linear):
            return None
        # Neither a quantized weight nor one that tensor parallelism has split in another way.
        plain = all(type(p) in (nn.Parameter, torch.Tensor, FakeTensor) for p in linear.parameters())
        return linear if plain or vocabulary_shard(linear) else None


def find_output_head(model: Any, outermost: Any = None) -> OutputHead | str:
    """Finds the head of `model`, or returns why its logits cannot be computed apart from its decoder.

    Runs the model on nine tokens. Where ranks hold shards of it, all must call it.

    Args:
        outermost: the module that training calls, around `model`, where that is another.
    """
    found: list[OutputHead | str] = []
    was_training, before = model.training, model.__dict__.get("forward")
    original = before or functools.partial(type(model).forward, model)
    # In place of the model's own forward, because FSDP2 has gathered the weights there.
    model.forward = lambda *_, **__: found.append(_find_or_reason(model, original))
    model.eval()
    try:
        with torch.no_grad():
            (outermost or model)(input_ids=torch.zeros(1, 1, dtype=torch.int64, device=model.device))
    finally:
        del model.forward
        if before:
            model.forward = before
        model.train(was_training)
    return found[0]


def _find_or_reason(model: Any, forward: Callable[..., Any]) -> OutputHead | str:
    try:
        return _find(model, forward)
    except Exception as error:  # any model's code may fail in any way when run in parts; the plain path remains
        return f"{type(error).__name__}: {error}"


def assume_output_head(model: Any) -> OutputHead:
    """Returns the head of a model without values (on the meta device, or of fake tensors), assuming the usual form.

    Without values it cannot be verified that the logits are computed from the decoder's output. The transform is
    measured as always, with an input that passes through no weight.

    Raises:
        ValueError: it names no decoder or no output embeddings.
    """
    names = {id(module): name for name, module in model.named_modules()}
    linear = model.get_output_embeddings()
    decoders = [d for d in (model.base_model, model.get_decoder()) if d is not None and d is not model]
    if linear is None or not decoders:
        raise ValueError("it has no decoder and head of its own")
    vocab_size = int(getattr(linear, "base_layer", linear).weight.shape[0])
    head = OutputHead(names[id(decoders[0])], names[id(linear)], vocab_size, None)
    with torch.no_grad():
        return replace(head, transform=_measure_transform(model, head, torch.device("cpu")))


def _find(model: Any, forward: Callable[..., Any]) -> OutputHead | str:
    linear = model.get_output_embeddings()
    if linear is None:
        return "it names no output embeddings"
    names = {id(module): name for name, module in model.named_modules()}
    if id(linear) not in names:
        return "its output embeddings are no module of its own"
    vocab_size = int(model.get_input_embeddings().weight.shape[0])
    ids = (torch.arange(1, 10, device=model.device) * 7919 % vocab_size)[None]  # (1, 9)
    expected = to_full(forward(input_ids=ids, use_cache=False).logits)[0]
    reason = "it has no decoder"
    for decoder in dict.fromkeys((model.base_model, model.get_decoder())):
        if decoder is None or decoder is model or id(decoder) not in names:
            continue
        hidden = to_full(decoder(input_ids=ids, use_cache=False)[0])[0]  # (9, D)
        with gathered(linear):
            shard, width = vocabulary_shard(linear), expected.shape[-1]
            logits = shard.vocab_size if shard and shard.width == width else width
            head = OutputHead(names[id(decoder)], names[id(linear)], logits, None)
            if _same(to_full(head.logits(model, hidden)), expected):
                return replace(head, transform=_confirmed_transform(model, head, hidden, expected))
        reason = f"its logits are not a function of what {names[id(decoder)]} returns"
    return reason


def _confirmed_transform(
    model: Any, head: OutputHead, hidden: torch.Tensor, expected: torch.Tensor
) -> LogitTransform | None:
    """Returns the measured transform, unless the logits contradict it: the model may scale before a bias, or slice."""
    transform = _measure_transform(model, head, model.device)
    linear = replace(head, transform=transform).plain_linear(model)
    if transform is None or linear is None or linear.weight.dtype != hidden.dtype:
        return transform  # no matrix multiplication to compare with here; a later one has this form
    return transform if _same(transform(to_full(linear(hidden)).float()), expected) else None


def _measure_transform(model: Any, head: OutputHead, device: torch.device) -> LogitTransform | None:
    """Finds the transform after the projection by running the model with an identity in the projection's place."""
    width = model.config.get_text_config().hidden_size
    probe = torch.linspace(-_PROBE, _PROBE, 2 * width, device=device).reshape(2, width)
    echoes = {head.decoder: _Echo(model.get_submodule(head.decoder)), head.linear: nn.Identity()}
    try:
        result = _echoed_logits(model, probe, echoes)
    except Exception:  # e.g. a model that reads the projection's weight: its own code computes the logits
        return None
    if result.shape != probe.shape:
        return None
    config = model.config.get_text_config()
    scale = float((result[0, 0] / probe[0, 0]).double())
    caps = [value for name, value in config.to_dict().items() if "cap" in name and isinstance(value, int | float)]
    for transform in (LogitTransform(), LogitTransform(scale), *(LogitTransform(cap=float(c)) for c in caps if c)):
        if transform.scale > 0 and _same(transform(probe.clone()), result):
            return transform
    return None


def _echoed_logits(model: Any, hidden: torch.Tensor, replaced: dict[str, nn.Module]) -> torch.Tensor:
    """Runs the forward of the model's class on a shallow copy with some modules replaced, and returns the logits."""
    twin = shallow_copy(model)
    twin.__dict__.pop("forward", None)
    for name, module in replaced.items():
        _replace(twin, name, module)
    return type(model).forward(twin, inputs_embeds=hidden[None], use_cache=False).logits[0]


def _replace(twin: nn.Module, name: str, module: nn.Module) -> None:
    """Puts `module` at the dotted `name`; the modules on the way are copied, so that the model does not change."""
    *parents, last = name.split(".")
    for parent in parents:
        twin._modules = dict(twin._modules)
        child: Any = shallow_copy(twin._modules[parent])
        twin._modules[parent] = child
        twin = child
    twin._modules = {**twin._modules, last: module}


def _same(one: torch.Tensor, other: torch.Tensor) -> bool:
    if one.shape != other.shape:
        return False
    precision = max(torch.finfo(one.dtype).eps, torch.finfo(other.dtype).eps)
    error = (one.double() - other.double()).abs().max()
    return bool(error <= _ROUNDINGS * precision * other.double().abs().max())


def _leaves(tensor: torch.Tensor) -> Iterator[torch.Tensor]:
    """Yields the leaves that the graph of `tensor` accumulates gradients into."""
    waiting, seen = [tensor.grad_fn], set()
    while waiting:
        node = waiting.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if hasattr(node, "variable"):
            yield node.variable
        waiting += [function for function, _ in node.next_functions]
