"""Averages gradients over the ranks while the last backward pass of a step is still running.

For gradients that DDP's reducer does not take (it wants those of the weights' own format), or that several passes add
up before they travel once. The reduction is in the gradient's own format.
"""

from __future__ import annotations

import torch
import torch.distributed as dist

_TOGETHER = 2**18  # gradients of fewer numbers (1 MiB in float32) travel in one message


class GradientReducer:
    """Averages gradients over ranks, each as soon as it is complete.

    Backward passes complete gradients in about the reverse order of the parameters. They are sent in exactly that
    order, whatever the order of their completion, so that all ranks send the same one at a time.
    """

    def __init__(self, parameters: list[torch.nn.Parameter]) -> None:
        self._order = [p for p in reversed(parameters) if p.numel() >= _TOGETHER]
        self._small = [p for p in parameters if p.numel() < _TOGETHER]
        self._complete: set[int] | None = None  # ids; None while no reduction is due
        self._sent: list[dist.Work] = []
        self._group: dist.ProcessGroup | None = None
        self._next = 0
        for parameter in self._order:
            parameter.register_post_accumulate_grad_hook(self._on_gradient)

    def begin(self, group: dist.ProcessGroup | None) -> None:
        """Lets the following backward pass send what it completes."""
        self._group, self._complete, self._sent, self._next = group, set(), [], 0

    def _on_gradient(self, parameter: torch.Tensor) -> None:
        if self._complete is None:
            return
        self._complete.add(id(parameter))
        while self._next < len(self._order) and id(self._order[self._next]) in self._complete:
            self._send_next()

    def _send_next(self) -> None:
        gradient = _gradient_of(self._order[self._next])
        self._next += 1
        work = dist.all_reduce(gradient, group=self._group, async_op=True)
        assert work is not None
        self._sent.append(work)

    @torch.no_grad()
    def finish(self) -> None:
        """Sends what is left, waits for all, and divides the sums by the number of ranks as DDP does."""
        while self._next < len(self._order):
            self._send_next()
        small = [_gradient_of(parameter) for parameter in self._small]
        if small:
            together = torch.cat([gradient.flatten() for gradient in small])
            dist.all_reduce(together, group=self._group)
            parts = together.split([gradient.numel() for gradient in small])
            torch._foreach_copy_(small, [part.view_as(g) for part, g in zip(parts, small, strict=True)])
        for work in self._sent:
            work.wait()
        gradients = small + [_gradient_of(parameter) for parameter in self._order]
        torch._foreach_div_(gradients, float(dist.get_world_size(self._group)))
        self._complete, self._sent = None, []


def _gradient_of(parameter: torch.nn.Parameter) -> torch.Tensor:
    """The gradient; zeros where this rank's pass did not reach the parameter, for the other ranks wait for it."""
    if parameter.grad is None:
        parameter.grad = torch.zeros_like(parameter, dtype=parameter.grad_dtype or parameter.dtype)
    return parameter.grad
