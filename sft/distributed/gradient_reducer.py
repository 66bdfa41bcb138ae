"""Averages gradients over the ranks, in place of DDP, while the last backward pass of a step is still running.

For gradients that DDP's reducer does not accept (it wants the dtype of the weights), or that several micro-batches sum
up before they are reduced once. They are reduced in their own dtype.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

_BUCKETED = 2**18  # gradients of fewer numbers (1 MiB in float32) are reduced together


class GradientReducer:
    """Averages gradients over ranks, each as soon as it is complete.

    Backward passes complete gradients in about the reverse order of the parameters. They are reduced in exactly that
    order, whatever the order of their completion, so all ranks start the same collectives one after another.
    """

    def __init__(self, parameters: list[torch.nn.Parameter]) -> None:
        self._order = [p for p in reversed(parameters) if p.numel() >= _BUCKETED]
        self._small = [p for p in parameters if p.numel() < _BUCKETED]
        self._complete: set[int] | None = None  # ids of parameters; None while no reduction is due
        self._works: list[dist.Work] = []
        self._group: dist.ProcessGroup | None = None
        self._next = 0
        for parameter in self._order:
            parameter.register_post_accumulate_grad_hook(self._on_gradient)

    @contextmanager
    def in_place_of_ddp(self, model: torch.nn.Module, is_last: bool) -> Iterator[None]:
        """Averages the step's gradients during the forward and backward pass inside, and tells DDP not to reduce.

        Does nothing if `model` is not wrapped in DDP.

        Args:
            model: as the Trainer passes it to the training step.
            is_last: whether an optimizer step follows this micro-batch; the same on all ranks.
        """
        if not isinstance(model, DistributedDataParallel):
            yield
            return
        model.require_backward_grad_sync = False
        if is_last:
            self.begin(model.process_group)
        yield
        if is_last:
            self.finish()

    def begin(self, group: dist.ProcessGroup | None) -> None:
        """Makes the next backward pass reduce each gradient that it completes."""
        self._group, self._complete, self._works, self._next = group, set(), [], 0

    def _on_gradient(self, parameter: torch.Tensor) -> None:
        if self._complete is None:
            return
        self._complete.add(id(parameter))
        while self._next < len(self._order) and id(self._order[self._next]) in self._complete:
            self._reduce_next()

    def _reduce_next(self) -> None:
        gradient = _get_gradient(self._order[self._next])
        self._next += 1
        work = dist.all_reduce(gradient, group=self._group, async_op=True)
        assert work is not None
        self._works.append(work)

    @torch.no_grad()
    def finish(self) -> None:
        """Reduces the remaining gradients, waits for all, and divides the sums by the number of ranks, as DDP does."""
        while self._next < len(self._order):
            self._reduce_next()
        small = [_get_gradient(parameter) for parameter in self._small]
        if small:
            bucket = torch.cat([gradient.flatten() for gradient in small])
            dist.all_reduce(bucket, group=self._group)
            parts = bucket.split([gradient.numel() for gradient in small])
            torch._foreach_copy_(small, [part.view_as(g) for part, g in zip(parts, small, strict=True)])
        for work in self._works:
            work.wait()
        gradients = small + [_get_gradient(parameter) for parameter in self._order]
        torch._foreach_div_(gradients, float(dist.get_world_size(self._group)))
        self._complete, self._works = None, []


def _get_gradient(parameter: torch.nn.Parameter) -> torch.Tensor:
    """Returns the gradient; zeros where this rank's backward pass did not reach the parameter: others wait for it."""
    if parameter.grad is None:
        parameter.grad = torch.zeros_like(parameter, dtype=parameter.grad_dtype or parameter.dtype)
    return parameter.grad
