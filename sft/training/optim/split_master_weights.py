"""Keeps float32 master weights in 2 bytes more than bfloat16: the weight is the upper half, a remainder the lower.

    bits(value) = 65536 · bits(weight) + remainder          -32768 ≤ remainder < 32768

The weight is the bfloat16 number nearest to the value (of two equally near, the one further from zero), the remainder
the lower 16 bits. Each float32 number has exactly one such pair; only NaN payloads are lost.

A step rebuilds the values of some weights at a time, lets the optimizer step on them, and splits them again. With
bfloat16 gradients and 8-bit states a weight takes 2 + 2 + 2 + 2 bytes; float32 masters with float32 gradients take
2 + 4 + 4 + 2. The step takes 2 to 3 times as long as fused AdamW over float32 masters on a CPU.

Gradients stay in bfloat16 where nothing is added to them: in a step of one micro-batch on one rank, of weights that the
forward pass uses once. Casting them to float32 would change no bit.
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

SUMS = "master_weight_sums"  # key in a checkpoint's optimizer state: the sum of the bits of each piece of a weight
LARGEST_PIECE = 2**26  # elements of a weight stepped at a time, in whole rows; an 8B model's layers have no more
CPU_BUCKET = 2**20  # elements of small weights stepped together: in float32 they fit a CPU's cache;
GPU_BUCKET = 2**26  # on a GPU they fill it, in 256 MiB
# Optimizers that update each element by itself, or each parameter; for others all weights are rebuilt at once.
_BY_ELEMENT = (
    "torch.optim.adam",
    "torch.optim.sgd",
    "torch.optim.rmsprop",
    "torch.optim.adagrad",
    "bitsandbytes.optim",
)
_BY_PARAMETER = ("transformers.optimization",)

Scratch = dict[tuple[torch.device, str], torch.Tensor]


@dataclass
class Piece:
    """Some rows of a weight.

    Attributes:
        weight: of the model.
        group: number of its parameter group.
        start, end: the rows, among those on this rank.
        stand_in: the parameter that the optimizer holds for them; it has storage only during a step.
        remainder: int16, of the rows' shape.
    """

    weight: torch.nn.Parameter
    group: int
    start: int
    end: int
    stand_in: torch.nn.Parameter
    remainder: torch.Tensor

    def rows_of(self, tensor: torch.Tensor) -> torch.Tensor:
        """Returns the piece's rows of the weight, or of a tensor of its shape."""
        local = to_local(tensor.detach())
        return local[self.start : self.end] if local.ndim else local


def find_summed_weights(model: Any) -> list[torch.nn.Parameter]:
    """Returns the weights whose gradient is a sum even within one micro-batch: shared weights, and the output head."""
    uses = Counter(id(parameter) for _, parameter in model.named_parameters(remove_duplicate=False))
    shared = [parameter for parameter in model.parameters() if uses[id(parameter)] > 1]
    return [*shared, *model.get_output_embeddings().parameters()]


def join(weights: torch.Tensor, remainders: torch.Tensor, out: torch.Tensor) -> None:
    """Joins weights and remainders into the float32 values `out`; all three have the same shape."""
    bits = out.view(torch.int32)
    bits.copy_(weights.view(torch.int16))
    bits.bitwise_left_shift_(16)
    for some, rest in _in_blocks(bits, remainders):
        # On a CPU, adding int16 to int32 is ten times slower than converting it first.
        some.add_(rest.int() if rest.device.type == "cpu" else rest)


def split(values: torch.Tensor, weights: torch.Tensor, remainders: torch.Tensor) -> None:
    """Splits `values`, which are overwritten, into weights and remainders."""
    # All NaNs become the same one: some would round to 0.
    values.nan_to_num_(nan=torch.nan, posinf=torch.inf, neginf=-torch.inf)
    bits = values.view(torch.int32)
    remainders.copy_(bits)  # the lower 16 bits
    bits.add_(2**15).bitwise_right_shift_(16)
    weights.view(torch.int16).copy_(bits)


def _in_blocks(bits: torch.Tensor, remainders: torch.Tensor) -> Any:
    if bits.numel() <= CPU_BUCKET or bits.device.type != "cpu":
        return [(bits, remainders)]
    return zip(bits.flatten().split(CPU_BUCKET), remainders.flatten().split(CPU_BUCKET), strict=True)


class SplitMasters(MasterWeights):
    """`MasterWeights` that rebuilds the masters only while they are stepped.

    Args:
        inner: a torch optimizer that has not made a step yet.
        summed: in a step of one micro-batch on one rank, the weights whose gradients are sums nevertheless
            (`find_summed_weights`): they are in float32, all others in bfloat16. None means float32 for all.
        largest_piece, bucket_size: elements stepped at a time, of a large weight and of small ones together; None
            means `CPU_BUCKET` or `GPU_BUCKET`.

    Raises:
        UserError: the weights are sharded, and the optimizer does not update each element by itself.
    """

    def __init__(
        self,
        inner: torch.optim.Optimizer,
        summed: Collection[torch.nn.Parameter] | None = None,
        *,
        largest_piece: int = LARGEST_PIECE,
        bucket_size: int | None = None,
    ) -> None:
        self._largest_piece = largest_piece
        self._summed = None if summed is None else {id(weight) for weight in summed}
        self._pieces: list[Piece] = []
        self._factor: torch.Tensor | None = None
        module = type(inner).__module__
        self._by_element = module.startswith(_BY_ELEMENT)
        super().__init__(inner)
        is_apart = self._by_element or module.startswith(_BY_PARAMETER)
        self._buckets = _make_buckets(self._pieces, bucket_size) if is_apart else [self._pieces]

    def _masters_of(self, parameter: torch.nn.Parameter, group: int) -> list[torch.nn.Parameter]:
        if parameter.dtype != torch.bfloat16:
            return [parameter]
        if isinstance(parameter, DTensor) and not self._by_element:
            problem = f"{type(self.inner).__name__} cannot step weights that are sharded over ranks"
            raise UserError(Problem(problem, "remove `optim`: the default is AdamW", "optim"))
        if self._summed is None or id(parameter) in self._summed:
            parameter.grad_dtype = torch.float32
        local = to_local(parameter.detach())
        rows = len(local) if local.ndim else 1
        most = max(self._largest_piece * rows // max(local.numel(), 1), 1) if self._by_element else max(rows, 1)
        made = []
        for start in range(0, rows, most):
            part = local[start : start + most] if local.ndim else local
            stand_in, remainder = torch.nn.Parameter(_placeholder(part)), torch.zeros_like(part, dtype=torch.int16)
            made.append(Piece(parameter, group, start, start + most, stand_in, remainder))
        self._pieces += made
        self.pairs += [(parameter, piece.stand_in) for piece in made]
        return [piece.stand_in for piece in made]

    def scale_gradients(self, factor: torch.Tensor) -> None:
        """Scales the gradients of the next step, in float32 while they are stepped; `zero_grad` forgets the factor."""
        self._factor = factor

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Clears the model's gradients."""
        self._factor = None
        super().zero_grad(set_to_none)

    def _step(self) -> None:
        """Rebuilds, steps and splits one bucket of weights after the other."""
        groups = self.inner.param_groups
        all_params = [group["params"] for group in groups]
        ids = {id(master) for _, master in self.pairs}
        plain = [[p for p in parameters if id(p) not in ids and p.grad is not None] for parameters in all_params]
        gradients = [p.grad for parameters in plain for p in parameters]
        if self._factor is not None and gradients:
            torch._foreach_mul_(gradients, self._factor)
        scratch: Scratch = {}
        try:
            for bucket in self._buckets or [[]]:
                live = [piece for piece in bucket if piece.weight.grad is not None]
                self._rebuild(live, scratch)
                for number, group in enumerate(groups):
                    group["params"] = plain[number] + [p.stand_in for p in live if p.group == number]
                if any(group["params"] for group in groups):
                    self.inner.step()
                plain = [[] for _ in groups]  # they are stepped with the first bucket
                _split_again(live)
        finally:
            self._factor = None
            for group, parameters in zip(groups, all_params, strict=True):
                group["params"] = parameters

    def _rebuild(self, pieces: list[Piece], scratch: Scratch) -> None:
        """Gives the stand-ins their float32 values and gradients."""
        values = _views(pieces, scratch, "values")
        is_bf16 = [piece.weight.grad is not None and piece.weight.grad.dtype != torch.float32 for piece in pieces]
        in_bf16 = [piece for piece, is_one in zip(pieces, is_bf16, strict=True) if is_one]
        copies = iter(_views(in_bf16, scratch, "gradients"))
        for piece, value, has_copy in zip(pieces, values, is_bf16, strict=True):
            join(piece.rows_of(piece.weight), piece.remainder, value)
            assert piece.weight.grad is not None
            gradient = piece.rows_of(piece.weight.grad)
            piece.stand_in.data = value
            piece.stand_in.grad = next(copies).copy_(gradient) if has_copy else gradient
            if self._factor is not None:
                piece.stand_in.grad.mul_(self._factor)

    def state_dict(self) -> dict[str, Any]:
        """Returns the inner optimizer's state, the remainders and the sums of the weights' bits."""
        remainders = [piece.remainder for piece in self._pieces]
        return {**self.inner.state_dict(), MASTERS: remainders, SUMS: self._sums()}

    def _sums(self) -> list[int]:
        """Sums the bits of the weights, to recognize the weights that a state belongs to."""
        weights = [piece.rows_of(piece.weight).view(torch.int16) for piece in self._pieces]
        return torch.stack([w.sum(dtype=torch.int64) for w in weights]).tolist() if weights else []

    @torch.no_grad()
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Loads a saved state of the weights that the model has now.

        A state with float32 masters is split, and the weights become the upper half.

        Raises:
            UserError: the state has no master weights, or belongs to other weights than the model's.
        """
        state = dict(state_dict)
        saved, sums = state.pop(MASTERS, None), state.pop(SUMS, None)
        require_masters(saved, [piece.remainder for piece in self._pieces])
        is_float32 = [tensor.dtype == torch.float32 for tensor in saved]
        if sums is not None and not any(is_float32) and sums != self._sums():
            hint = "the checkpoint's model files are not those that were saved with it: resume from another checkpoint"
            message = "the optimizer state belongs to other weights than the model's"
            raise UserError(Problem(message, hint, "resume_from_checkpoint"))
        self.inner.load_state_dict(state)
        for piece, tensor, is_whole in zip(self._pieces, saved, is_float32, strict=True):
            if is_whole:
                split(tensor.to(piece.remainder.device, copy=True), piece.rows_of(piece.weight), piece.remainder)
            else:
                piece.remainder.copy_(tensor)


def _split_again(pieces: list[Piece]) -> None:
    for piece in pieces:
        split(piece.stand_in.detach(), piece.rows_of(piece.weight), piece.remainder)
        piece.stand_in.data, piece.stand_in.grad = _placeholder(piece.remainder), None


def _placeholder(like: torch.Tensor) -> torch.Tensor:
    """Returns a float32 tensor of this shape that stores a single element."""
    return torch.zeros((), dtype=torch.float32, device=like.device).expand(like.shape)


def _make_buckets(pieces: list[Piece], bucket_size: int | None) -> list[list[Piece]]:
    """Groups pieces that are stepped together, in their order."""
    buckets: list[list[Piece]] = []
    free = 0
    for piece in pieces:
        size = piece.remainder.numel()
        if not buckets or size > free:
            buckets.append([])
            free = bucket_size or (CPU_BUCKET if piece.remainder.device.type == "cpu" else GPU_BUCKET)
        buckets[-1].append(piece)
        free -= size
    return buckets


def _views(pieces: list[Piece], scratch: Scratch, use: str) -> list[torch.Tensor]:
    """Returns a float32 tensor for each piece, in memory that all buckets share."""
    views = []
    ends: Counter[torch.device] = Counter()
    for piece in pieces:
        ends[piece.remainder.device] += piece.remainder.numel()
    for device, size in ends.items():
        if (device, use) not in scratch or scratch[device, use].numel() < size:
            scratch.pop((device, use), None)
            scratch[device, use] = torch.empty(size, device=device)
    for piece in pieces:
        shape, device = piece.remainder.shape, piece.remainder.device
        end = ends[device]
        ends[device] -= shape.numel()
        views.append(scratch[device, use][ends[device] : end].view(shape))
    return views
