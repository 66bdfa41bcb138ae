"""Float32 values of bfloat16 weights in 2 bytes more: a weight holds the upper half of its value, a remainder the rest.

    bits(value) = 65536 · bits(weight) + remainder          -32768 ≤ remainder < 32768

The weight is a bfloat16 number nearest to the value (the one further from zero where two are as near), the remainder
the lower 16 bits. Nothing is lost: each float32 number has one such pair; of NaN only that it is one is kept.

A step rebuilds the values of some weights at a time, lets the optimizer step on these, and splits them again. With
bfloat16 gradients and 8-bit states that is 2 + 2 + 2 + 2 bytes a weight, where whole float32 values with float32
gradients take 2 + 4 + 4 + 2. The step takes longer: 2 to 3 times as long as fused AdamW over whole values on a CPU.

Gradients stay in bfloat16 where backward passes deliver them so and nothing is added to them: a step of one pass on
one rank, of weights that the pass uses once. There casting them to float32 changes no bit.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

import torch
from torch.distributed.tensor import DTensor

from sft.distributed.dtensor import to_local
from sft.errors import Problem, UserError
from sft.training.optim.master_weights import MASTERS, MasterWeights, require_masters

SUMS = "master_weight_sums"  # the key in a checkpoint's optimizer state: of each piece of a weight, its bits' sum
LARGEST_PIECE = (
    2**26
)  # numbers of which a weight is stepped at a time, in whole rows; more than a layer of 8B has in one
_CPU_TOGETHER = 2**20  # numbers of small weights that are stepped together: what fits a CPU's cache in float32,
_GPU_TOGETHER = 2**26  # and on a GPU enough to fill it, in 256 MiB
# Optimizers that move each number by itself, or each parameter; of others, all are rebuilt at once.
_BY_NUMBER = ("torch.optim.adam", "torch.optim.sgd", "torch.optim.rmsprop", "torch.optim.adagrad", "bitsandbytes.optim")
_BY_PARAMETER = ("transformers.optimization",)


Scratch = dict[tuple[torch.device, str], torch.Tensor]


@dataclass
class Piece:
    """Some rows of a weight.

    Attributes:
        weight: of the model.
        group: the number of its parameter group.
        start, end: the rows, of those that are on this rank.
        stand_in: what the optimizer holds in their place; it has values during a step only.
        remainder: int16, of the rows' shape.
    """

    weight: torch.nn.Parameter
    group: int
    start: int
    end: int
    stand_in: torch.nn.Parameter
    remainder: torch.Tensor

    def rows_of(self, tensor: torch.Tensor) -> torch.Tensor:
        """The piece's part of the weight, or of its gradient."""
        local = to_local(tensor.detach())
        return local[self.start : self.end] if local.ndim else local


def summed_in_a_pass(model: Any) -> list[torch.nn.Parameter]:
    """The weights whose gradient is a sum within one pass: those with two places in the model, and the head's."""
    places = Counter(id(parameter) for _, parameter in model.named_parameters(remove_duplicate=False))
    shared = [parameter for parameter in model.parameters() if places[id(parameter)] > 1]
    return [*shared, *model.get_output_embeddings().parameters()]


def join(weights: torch.Tensor, remainders: torch.Tensor, out: torch.Tensor) -> None:
    """Writes into `out` (float32) the values of which these are the two halves; all three of one shape."""
    bits = out.view(torch.int32)
    bits.copy_(weights.view(torch.int16))
    bits.bitwise_left_shift_(16)
    for some, rest in _in_blocks(bits, remainders):
        # A CPU adds numbers of two types ten times slower than it converts them first.
        some.add_(rest.int() if rest.device.type == "cpu" else rest)


def split(values: torch.Tensor, weights: torch.Tensor, remainders: torch.Tensor) -> None:
    """Writes the two halves of `values`, which are used up."""
    values.nan_to_num_(nan=torch.nan, posinf=torch.inf, neginf=-torch.inf)  # one NaN for all: some would round to 0
    bits = values.view(torch.int32)
    remainders.copy_(bits)  # the lower 16 bits
    bits.add_(2**15).bitwise_right_shift_(16)
    weights.view(torch.int16).copy_(bits)


def _in_blocks(bits: torch.Tensor, remainders: torch.Tensor) -> Any:
    if bits.numel() <= _CPU_TOGETHER or bits.device.type != "cpu":
        return [(bits, remainders)]
    return zip(bits.flatten().split(_CPU_TOGETHER), remainders.flatten().split(_CPU_TOGETHER), strict=True)


class SplitMasters(MasterWeights):
    """`MasterWeights` whose masters are there only while they are stepped.

    Args:
        inner: any torch optimizer that has made no step yet.
        summed: where a step is one pass on one rank, the weights whose gradients are sums of several within it (a
            head in chunks, tied embeddings): these are float32, all others bfloat16. None: all are float32.

    Raises:
        UserError: the weights are spread over ranks, and the optimizer looks at more than one number at a time.
    """

    def __init__(self, inner: torch.optim.Optimizer, summed: Collection[torch.nn.Parameter] | None = None) -> None:
        self._summed = None if summed is None else {id(weight) for weight in summed}
        self._pieces: list[Piece] = []
        self._factor: torch.Tensor | None = None
        module = type(inner).__module__
        self._by_number = module.startswith(_BY_NUMBER)
        super().__init__(inner)
        is_apart = self._by_number or module.startswith(_BY_PARAMETER)
        self._buckets = _together(self._pieces) if is_apart else [self._pieces]

    def _masters_of(self, parameter: torch.nn.Parameter, group: int) -> list[torch.nn.Parameter]:
        if parameter.dtype != torch.bfloat16:
            return [parameter]
        if isinstance(parameter, DTensor) and not self._by_number:
            problem = f"{type(self.inner).__name__} cannot step weights that are spread over ranks"
            raise UserError(Problem(problem, "leave `optim` out for AdamW", "optim"))
        if self._summed is None or id(parameter) in self._summed:
            parameter.grad_dtype = torch.float32
        local = to_local(parameter.detach())
        rows = len(local) if local.ndim else 1
        most = max(LARGEST_PIECE * rows // max(local.numel(), 1), 1) if self._by_number else max(rows, 1)
        made = []
        for start in range(0, rows, most):
            part = local[start : start + most] if local.ndim else local
            stand_in, remainder = torch.nn.Parameter(_nothing(part)), torch.zeros_like(part, dtype=torch.int16)
            made.append(Piece(parameter, group, start, start + most, stand_in, remainder))
        self._pieces += made
        self.pairs += [(parameter, piece.stand_in) for piece in made]
        return [piece.stand_in for piece in made]

    def master_of(self, weight: torch.nn.Parameter) -> torch.Tensor:
        """The float32 values of a weight, of those rows that are on this rank: a copy."""
        pieces = [piece for piece in self._pieces if piece.weight is weight]
        values = torch.empty_like(to_local(weight.detach()), dtype=torch.float32)
        for piece in pieces:
            join(piece.rows_of(weight), piece.remainder, piece.rows_of(values))
        return values

    def scale_gradients(self, factor: torch.Tensor) -> None:
        """Multiplies the gradients of the step that comes next, in float32 as they are stepped with; `zero_grad`
        forgets it.
        """
        self._factor = factor

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Clears the model's gradients."""
        self._factor = None
        super().zero_grad(set_to_none)

    def _step(self) -> None:
        """Rebuilds, steps and splits the values of some weights after the others."""
        groups = self.inner.param_groups
        whole = [group["params"] for group in groups]
        ids = {id(master) for _, master in self.pairs}
        beside = [[p for p in parameters if id(p) not in ids and p.grad is not None] for parameters in whole]
        gradients = [p.grad for parameters in beside for p in parameters]
        if self._factor is not None and gradients:
            torch._foreach_mul_(gradients, self._factor)
        scratch: Scratch = {}
        try:
            for bucket in self._buckets or [[]]:
                live = [piece for piece in bucket if piece.weight.grad is not None]
                self._rebuild(live, scratch)
                for number, group in enumerate(groups):
                    group["params"] = beside[number] + [p.stand_in for p in live if p.group == number]
                if any(group["params"] for group in groups):
                    self.inner.step()
                beside = [[] for _ in groups]
                _put_away(live)
        finally:
            self._factor = None
            for group, parameters in zip(groups, whole, strict=True):
                group["params"] = parameters

    def _rebuild(self, pieces: list[Piece], scratch: Scratch) -> None:
        """Gives the stand-ins their values and gradients."""
        values = _views(pieces, scratch, "values")
        is_narrow = [piece.weight.grad is not None and piece.weight.grad.dtype != torch.float32 for piece in pieces]
        narrow = [piece for piece, is_one in zip(pieces, is_narrow, strict=True) if is_one]
        copies = iter(_views(narrow, scratch, "gradients"))
        for piece, value, has_copy in zip(pieces, values, is_narrow, strict=True):
            join(piece.rows_of(piece.weight), piece.remainder, value)
            assert piece.weight.grad is not None
            gradient = piece.rows_of(piece.weight.grad)
            piece.stand_in.data = value
            piece.stand_in.grad = next(copies).copy_(gradient) if has_copy else gradient
            if self._factor is not None:
                piece.stand_in.grad.mul_(self._factor)

    def state_dict(self) -> dict[str, Any]:
        """The inner optimizer's state, and what the model's weights lack of their float32 values."""
        remainders = [piece.remainder for piece in self._pieces]
        return {**self.inner.state_dict(), MASTERS: remainders, SUMS: self._sums()}

    def _sums(self) -> list[int]:
        """Of the weights' bits, by which a state is known to belong to them."""
        weights = [piece.rows_of(piece.weight).view(torch.int16) for piece in self._pieces]
        return torch.stack([w.sum(dtype=torch.int64) for w in weights]).tolist() if weights else []

    @torch.no_grad()
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Takes up a saved state, of the weights that the model holds by now.

        Of a state with whole float32 values, the weights become the upper half.

        Raises:
            UserError: the state was saved by a run without master weights, or with other weights than the model's.
        """
        state = dict(state_dict)
        saved, sums = state.pop(MASTERS, None), state.pop(SUMS, None)
        require_masters(saved, [piece.remainder for piece in self._pieces])
        is_whole = [tensor.dtype == torch.float32 for tensor in saved]
        if sums is not None and not any(is_whole) and sums != self._sums():
            hint = "the checkpoint's model files are not those that were saved with it: resume from another one"
            raise UserError(
                Problem("the model's weights are not the optimizer state's", hint, "resume_from_checkpoint")
            )
        self.inner.load_state_dict(state)
        for piece, tensor, has_values in zip(self._pieces, saved, is_whole, strict=True):
            if has_values:
                split(tensor.to(piece.remainder.device, copy=True), piece.rows_of(piece.weight), piece.remainder)
            else:
                piece.remainder.copy_(tensor)


def _put_away(pieces: list[Piece]) -> None:
    for piece in pieces:
        split(piece.stand_in.detach(), piece.rows_of(piece.weight), piece.remainder)
        piece.stand_in.data, piece.stand_in.grad = _nothing(piece.remainder), None


def _nothing(like: torch.Tensor) -> torch.Tensor:
    """One float32 number that looks like a tensor of this shape."""
    return torch.zeros((), dtype=torch.float32, device=like.device).expand(like.shape)


def _together(pieces: list[Piece]) -> list[list[Piece]]:
    """Pieces that are stepped together."""
    buckets: list[list[Piece]] = []
    room = 0
    for piece in pieces:
        size = piece.remainder.numel()
        if not buckets or size > room:
            buckets.append([])
            room = _CPU_TOGETHER if piece.remainder.device.type == "cpu" else _GPU_TOGETHER
        buckets[-1].append(piece)
        room -= size
    return buckets


def _views(pieces: list[Piece], scratch: Scratch, use: str) -> list[torch.Tensor]:
    """Float32 memory for each piece, the same for each bucket."""
    views = []
    taken: dict[torch.device, int] = {}
    for piece in pieces:
        device = piece.remainder.device
        taken[device] = taken.get(device, 0) + piece.remainder.numel()
    for device, size in taken.items():
        if (device, use) not in scratch or scratch[device, use].numel() < size:
            scratch.pop((device, use), None)
            scratch[device, use] = torch.empty(size, device=device)
    for piece in pieces:
        shape, device = piece.remainder.shape, piece.remainder.device
        end = taken[device]
        taken[device] = end - shape.numel()
        views.append(scratch[device, use][end - shape.numel() : end].view(shape))
    return views
