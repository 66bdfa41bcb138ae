"""Keeps float32 master weights of bfloat16 weights, so that no update is lost to rounding.

    gradient  g += backward pass's bfloat16 gradient          summed in float32 over micro-batches and ranks
    master    w ← w − update(g)                               float32, by the configured optimizer
    weight    bfloat16(w)                                     used by the next forward pass

(Micikevicius et al., "Mixed Precision Training", 2018, arXiv:1710.03740, section 3.1.)

Each weight's `grad_dtype` is float32: autograd accumulates into `weight.grad` in float32, so clipping, the gradient
norm and NaN checks read the exact sum. A weight takes 2 bytes + 4 (master) + 4 (gradient) besides the optimizer's
state; float32 training takes 4 + 4.

DDP's reducer requires gradients in the weight's dtype. It is therefore disabled, and `reducing` averages the float32
gradients over the ranks while the last backward pass of the step is still running.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from sft.distributed.dtensor import to_local
from sft.distributed.gradient_reducer import GradientReducer
from sft.errors import Problem, UserError

MASTERS = "master_weights"  # the key in a checkpoint's optimizer state


class MasterWeights(torch.optim.Optimizer):
    """Wraps an optimizer over bfloat16 parameters so that it steps on float32 copies of them.

    `param_groups` and `state` are the inner optimizer's own, which learning rate schedules change; they hold the
    masters. The model keeps its parameters. Parameters in float32 (an adapter's, a router's) are stepped directly.

    Args:
        inner: a torch optimizer that has not made a step yet.
    """

    def __init__(self, inner: torch.optim.Optimizer) -> None:
        # Optimizer.__init__ is not called: it would make a second set of groups and hooks besides those of `inner`.
        self.inner = inner
        self.pairs: list[tuple[torch.nn.Parameter, torch.nn.Parameter]] = []
        for number, group in enumerate(inner.param_groups):
            group["params"] = [master for p in group["params"] for master in self._masters_of(p, number)]
        self.reducer = GradientReducer([*dict.fromkeys(p for p, _ in self.pairs), *self._unpaired()])

    def _masters_of(self, parameter: torch.nn.Parameter, group: int) -> list[torch.nn.Parameter]:
        """Returns what replaces a parameter in group number `group` of the optimizer."""
        if parameter.dtype != torch.bfloat16:
            return [parameter]
        master = torch.nn.Parameter(parameter.detach().float())
        parameter.grad_dtype = torch.float32
        self.pairs.append((parameter, master))
        return [master]

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
    def scale_gradients(self, factor: torch.Tensor) -> None:
        """Scales the gradients of the next step.

        Args:
            factor: a scalar on the device, from `sft.training.optim.grad_norm.clip_factor`.
        """
        weights = [*dict.fromkeys(weight for weight, _ in self.pairs), *self._unpaired()]
        if gradients := [weight.grad for weight in weights if weight.grad is not None]:
            torch._foreach_mul_(gradients, factor)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Steps on the masters and rounds them into the model's weights."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self._step()
        return loss

    def _step(self) -> None:
        moved = [(weight, master) for weight, master in self.pairs if weight.grad is not None]
        for weight, master in moved:
            master.grad = weight.grad  # the same memory
        self.inner.step()
        for _, master in moved:
            master.grad = None
        _round([master for _, master in moved], [weight for weight, _ in moved])

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
        """Loads a saved state; the weights become its rounded masters.

        Raises:
            UserError: the state has no master weights, or those of another model.
        """
        state = dict(state_dict)
        saved = state.pop(MASTERS, None)
        require_masters(saved, [master for _, master in self.pairs], torch.float32)
        self.inner.load_state_dict(state)
        for (_, master), tensor in zip(self.pairs, saved, strict=True):
            master.copy_(tensor)
        _round([master for _, master in self.pairs], [weight for weight, _ in self.pairs])


def require_masters(saved: Any, expected: Sequence[torch.Tensor], dtype: torch.dtype | None = None) -> None:
    """Requires that a checkpoint's masters have the expected shapes and, if given, `dtype`."""
    shapes = [list(tensor.shape) for tensor in expected]
    if saved is None:
        what = "has no float32 values of the weights"
    elif [list(tensor.shape) for tensor in saved] != shapes:
        what = "is of another model"
    elif dtype and any(tensor.dtype != dtype for tensor in saved):
        what = "is of an optimizer with 8-bit states"
    else:
        return
    hint = "resume with the `dtype` and `optim` that the run was started with"
    raise UserError(Problem(f"the checkpoint's optimizer state {what}", hint, "resume_from_checkpoint"))


@torch.no_grad()
def _round(masters: list[torch.nn.Parameter], weights: list[torch.nn.Parameter]) -> None:
    if masters:
        # Local shards: one foreach operation cannot mix DTensors and plain tensors.
        torch._foreach_copy_([to_local(weight.detach()) for weight in weights], [to_local(m.detach()) for m in masters])
