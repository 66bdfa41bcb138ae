"""An optimizer for bfloat16 weights that loses no update: it keeps the float32 values of which they are the rounding.

    gradient  g += backward pass's bfloat16 gradient          added up in float32, over passes and ranks
    master    w ← w − update(g)                               float32, by whichever optimizer was chosen
    weight    bfloat16(w)                                     what the next pass multiplies with

(Micikevicius et al., "Mixed Precision Training", 2018, arXiv:1710.03740, section 3.1.)

Gradients are float32 because each weight's `grad_dtype` says so: autograd adds each pass's gradient to `weight.grad`
in float32, and whoever reads `weight.grad` (clipping, its norm, checks for NaN) reads the true sum. Per weight this
takes 2 bytes (weight) + 4 (master) + 4 (gradient) beside the optimizer's state; float32 training takes 4 + 4.

DDP's reducer accepts no gradient of another format than the weight's. It is therefore told not to reduce, and
`reducing` sums the float32 gradients over the ranks while the last backward pass of the step is still running.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

from sft.errors import Problem, UserError

MASTERS = "master_weights"  # the key in a checkpoint's optimizer state
_TOGETHER = 2**18  # gradients of fewer numbers (1 MiB) travel in one message


class MasterWeights(torch.optim.Optimizer):
    """Wraps an optimizer over bfloat16 parameters so that it steps on float32 copies of them.

    `param_groups` and `state` are the inner optimizer's own, so that learning rate schedules reach it; they hold the
    masters. The model keeps its parameters. Parameters in float32 (an adapter's, a router's) stay as they are.

    Args:
        inner: any torch optimizer that has made no step yet.
    """

    def __init__(self, inner: torch.optim.Optimizer) -> None:
        # Optimizer.__init__ would make a second set of groups and hooks; those of `inner` are the ones in force.
        self.inner = inner
        self.pairs: list[tuple[torch.nn.Parameter, torch.nn.Parameter]] = []
        for group in inner.param_groups:
            group["params"] = [self._master_of(parameter) for parameter in group["params"]]
        self._reducer = _GradientReducer([p for p, _ in self.pairs] + self._unpaired())

    def _master_of(self, parameter: torch.nn.Parameter) -> torch.nn.Parameter:
        if parameter.dtype != torch.bfloat16:
            return parameter
        master = torch.nn.Parameter(parameter.detach().float())
        parameter.grad_dtype = torch.float32
        self.pairs.append((parameter, master))
        return master

    def _unpaired(self) -> list[torch.nn.Parameter]:
        masters = {id(master) for _, master in self.pairs}
        return [p for group in self.inner.param_groups for p in group["params"] if id(p) not in masters]

    @property
    def param_groups(self) -> list[dict[str, Any]]:  # type: ignore[override]
        """The inner optimizer's groups."""
        return self.inner.param_groups

    @property
    def state(self) -> Any:  # type: ignore[override]
        """The inner optimizer's state, by master."""
        return self.inner.state

    @property
    def defaults(self) -> dict[str, Any]:  # type: ignore[override]
        """The inner optimizer's defaults."""
        return self.inner.defaults

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Steps on the masters, then rounds them into the model's weights."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        moved = [(weight, master) for weight, master in self.pairs if weight.grad is not None]
        for weight, master in moved:
            master.grad = weight.grad  # the same memory
        self.inner.step()
        for _, master in moved:
            master.grad = None
        _round([master for _, master in moved], [weight for weight, _ in moved])
        return loss

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Clears the model's gradients."""
        self.inner.zero_grad(set_to_none)
        for weight, _ in self.pairs:
            if set_to_none:
                weight.grad = None
            elif weight.grad is not None:
                weight.grad.zero_()

    def state_dict(self) -> dict[str, Any]:
        """The inner optimizer's state and the masters, in the order of the groups' parameters."""
        return {**self.inner.state_dict(), MASTERS: [master.detach() for _, master in self.pairs]}

    @torch.no_grad()
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Takes up a saved state; the weights become the rounding of its masters.

        Raises:
            UserError: the state was saved by a run without master weights, or by one of another model.
        """
        state = dict(state_dict)
        saved = state.pop(MASTERS, None)
        shapes = [list(master.shape) for _, master in self.pairs]
        if saved is None or [list(tensor.shape) for tensor in saved] != shapes:
            what = "has no float32 values of the weights" if saved is None else "is of another model"
            hint = "resume with the `dtype` that the run was started with"
            raise UserError(Problem(f"the checkpoint's optimizer state {what}", hint, "resume_from_checkpoint"))
        self.inner.load_state_dict(state)
        for (_, master), tensor in zip(self.pairs, saved, strict=True):
            master.copy_(tensor)
        _round([master for _, master in self.pairs], [weight for weight, _ in self.pairs])

    @contextmanager
    def reducing(self, model: torch.nn.Module, is_last: bool) -> Iterator[None]:
        """Around a forward and backward pass: averages the step's gradients over the ranks in the last pass of a step.

        Does nothing where `model` is not wrapped by DDP.

        Args:
            model: as the Trainer hands it to the step.
            is_last: whether an optimizer step follows this pass; all ranks say the same.
        """
        if not isinstance(model, DistributedDataParallel):
            yield
            return
        model.require_backward_grad_sync = False
        if is_last:
            self._reducer.begin(model.process_group)
        yield
        if is_last:
            self._reducer.finish()


@torch.no_grad()
def _round(masters: list[torch.nn.Parameter], weights: list[torch.nn.Parameter]) -> None:
    if masters:
        torch._foreach_copy_([weight.detach() for weight in weights], [master.detach() for master in masters])


class _GradientReducer:
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
        parameter.grad = torch.zeros_like(parameter, dtype=torch.float32)
    return parameter.grad
