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

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch.nn.parallel import DistributedDataParallel

from sft.distributed.dtensor import to_local
from sft.distributed.gradient_reducer import GradientReducer
from sft.errors import Problem, UserError

MASTERS = "master_weights"  # the key in a checkpoint's optimizer state


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
        for number, group in enumerate(inner.param_groups):
            group["params"] = [master for p in group["params"] for master in self._masters_of(p, number)]
        self._reducer = GradientReducer([*dict.fromkeys(p for p, _ in self.pairs), *self._unpaired()])

    def _masters_of(self, parameter: torch.nn.Parameter, group: int) -> list[torch.nn.Parameter]:
        """What group number `group` of the optimizer holds in a parameter's place."""
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
        """Multiplies the gradients of the step that comes next, before it is made.

        Args:
            factor: a scalar on the device, as clipping finds it (`sft.training.optim.grad_norm.clip_factor`).
        """
        weights = [*dict.fromkeys(weight for weight, _ in self.pairs), *self._unpaired()]
        if gradients := [weight.grad for weight in weights if weight.grad is not None]:
            torch._foreach_mul_(gradients, factor)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Steps on the masters, then rounds them into the model's weights."""
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
        """Takes up a saved state; the weights become the rounding of its masters.

        Raises:
            UserError: the state was saved by a run without master weights, or by one of another model.
        """
        state = dict(state_dict)
        saved = state.pop(MASTERS, None)
        require_masters(saved, [master for _, master in self.pairs], torch.float32)
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


def require_masters(saved: Any, expected: Sequence[torch.Tensor], dtype: torch.dtype | None = None) -> None:
    """Refuses what a checkpoint holds as masters where they are not of these shapes, and of `dtype` if one is asked."""
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
        # This rank's parts: one operation cannot span weights that are spread over ranks and others.
        torch._foreach_copy_([to_local(weight.detach()) for weight in weights], [to_local(m.detach()) for m in masters])
