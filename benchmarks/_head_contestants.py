"""The output layer and the loss, each contestant in its own process: `python -m benchmarks._head_contestants NAME ...`.

Hidden states and weight are random; every token is supervised; forward and backward pass are timed, with the gradients
of both inputs. Each reports

    ms               median time of a forward and backward pass
    device_peak_mib  peak memory above that of the inputs, gradients included; None where it is unknown
    loss             mean over the tokens, the same for all
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from functools import partial
from typing import Any

from benchmarks._bare_loop import synchronize
from benchmarks._measure import run_as_worker

Loss = Callable[[Any, Any, Any], Any]  # hidden (N, D), weight (V, D), targets (N,): the mean loss


def ours() -> Loss:
    """Returns `sft.loss.fused_linear`'s loss, as the trainer calls it."""
    import torch

    from sft.loss.fused_linear import head_loss
    from sft.loss.output_head import LogitTransform, OutputHead
    from sft.loss.token_loss import LossSettings

    def loss(hidden: Any, weight: Any, targets: Any) -> Any:
        where = OutputHead(decoder="", linear="lm_head", transform=LogitTransform(), vocab_size=len(weight))
        model = torch.nn.Module()
        model.lm_head = torch.nn.Linear(1, 1, bias=False, device="meta")
        model.lm_head.weight = weight
        weight.grad_dtype = torch.float32  # as in full training, where the gradient goes to the master weights
        # Position t predicts token t + 1, so a last position is added, whose hidden state is not used.
        row = torch.cat([hidden, hidden[-1:].detach()])[None]
        labels = torch.cat([targets[:1], targets])[None]
        positions = torch.arange(1, len(targets) + 1, device=targets.device)
        return head_loss(model, where, row, labels, LossSettings(), positions).objective / len(targets)

    return loss


def torch_plain() -> Loss:
    """Returns the loss of transformers: all logits, their float32 copy, cross entropy."""
    import torch.nn.functional as F

    return lambda hidden, weight, targets: F.cross_entropy(F.linear(hidden, weight).float(), targets)


def torch_compiled() -> Loss:
    """Returns the same loss under torch.compile."""
    import torch

    return torch.compile(torch_plain())


def liger() -> Loss:
    """Returns Liger Kernel's fused linear cross entropy."""
    from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss

    fused = LigerFusedLinearCrossEntropyLoss()
    return lambda hidden, weight, targets: fused(weight, hidden, targets)


def cut_cross_entropy() -> Loss:
    """Returns Apple's cut-cross-entropy."""
    from cut_cross_entropy import linear_cross_entropy

    return lambda hidden, weight, targets: linear_cross_entropy(hidden, weight, targets)


def trl() -> Loss:
    """Returns the loss of TRL's fused output layer, with the outputs that its SFTTrainer requests."""
    import types

    import torch
    from transformers import LlamaConfig
    from trl.trainer.utils import add_fused_lm_head

    class Decoder(torch.nn.Module):
        def forward(self, hidden: Any, **_: Any) -> Any:
            return types.SimpleNamespace(last_hidden_state=hidden)

    class Model(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.config = LlamaConfig()
            self.base_model = Decoder()
            self.lm_head = torch.nn.Linear(1, 1, bias=False, device="meta")

        def get_output_embeddings(self) -> Any:
            return self.lm_head

        def forward(self, hidden: Any) -> Any:
            """Is replaced by `add_fused_lm_head`."""

    model = Model()
    add_fused_lm_head(model, outputs=("log_probs", "entropy", "is_top1"))

    def loss(hidden: Any, weight: Any, targets: Any) -> Any:
        model.lm_head.weight = weight
        return model(hidden[None], shift_labels=targets[None], fused_lm_head=True).loss

    return loss


def measure(make_loss: Callable[[], Loss], arguments: dict[str, Any]) -> dict[str, Any]:
    """Measures one contestant."""
    import torch

    device = torch.device(arguments["device"])
    dtype = torch.bfloat16
    torch.manual_seed(0)
    shape = (arguments["tokens"], arguments["width"])
    hidden = torch.randn(shape, device=device, dtype=dtype).requires_grad_()
    weight = torch.nn.Parameter(torch.randn(arguments["vocabulary"], shape[1], device=device, dtype=dtype) * 0.02)
    targets = torch.randint(arguments["vocabulary"], shape[:1], device=device)
    loss = make_loss()
    times, value = [], None
    for repeat in range(arguments["repeats"] + 2):  # the first two compile and tune
        hidden.grad = weight.grad = None
        synchronize(device)
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
        held = torch.cuda.memory_allocated() if device.type == "cuda" else 0
        started = time.perf_counter()
        value = loss(hidden, weight, targets)
        value.backward()
        synchronize(device)
        if repeat > 1:
            times.append((time.perf_counter() - started) * 1000)
    peak = (torch.cuda.max_memory_allocated() - held) / 2**20 if device.type == "cuda" else None
    if hidden.grad is None or weight.grad is None:
        raise RuntimeError("a gradient is missing")
    assert value is not None
    return {"ms": statistics.median(times), "device_peak_mib": peak, "loss": float(value.detach())}


if __name__ == "__main__":
    losses = (ours, torch_plain, torch_compiled, liger, cut_cross_entropy, trl)
    run_as_worker({make_loss.__name__: partial(measure, make_loss) for make_loss in losses})
