"""The summed loss in chunks of tokens, with its gradients made while a chunk's logits are there."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache

import torch
from torch import nn

from sft.distributed.dtensor import local_gradient, to_local
from sft.loss.output_head import LogitTransform, OutputHead
from sft.loss.token_loss import LossSettings, Objective, TokenScores

Gradients = list[torch.Tensor | None]

_CPU_LOGITS = 2**26  # of a chunk: 128 MiB in bfloat16. Half takes 6 % longer at a vocabulary of 150k
_CUDA_LOGITS = 2**27  # 256 MiB in bfloat16, on a GPU of 64 GiB or more; on a smaller one its share
# Logits that the softmax and all that follows it take at a time, so that a chunk's are held in float32 nowhere. On CPUs
# 4 MiB for each core: what passes over them several times finds them in the cache. On a GPU 128 MiB, which fill it.
_CPU_BLOCK, _CUDA_BLOCK = 2**20, 2**25
# Numbers of a float32 gradient that a half-precision product is added to at a time: on a CPU so few that the product
# is still in the cache, which makes it as fast as adding up in bfloat16; on a GPU many, to fill it.
_CPU_SLICE, _CUDA_SLICE = 2**22, 2**26
_CPU_RUN = 256  # logits of which the largest is found at a time


def choose_chunk_size(device: torch.device, vocab_size: int, tokens: int) -> int:
    """How many of `tokens` to take at a time, in chunks of equal size; at least 1."""
    room = _logits_on_gpu(device) if device.type == "cuda" else _CPU_LOGITS
    most = max(room // vocab_size, 1)
    chunks = -(-tokens // most)
    return max(-(-tokens // max(chunks, 1)), 1)


@cache
def _logits_on_gpu(device: torch.device) -> int:
    """By what the GPU has and not by what is free, which is less when a run resumes: it would round otherwise."""
    return min(_CUDA_LOGITS, torch.cuda.get_device_properties(device).total_memory // 512)


def score_in_place(
    logits: torch.Tensor,
    raw: torch.Tensor | None,
    targets: torch.Tensor,
    objective: Objective,
    transform: LogitTransform,
    with_gradient: bool,
    scale: torch.Tensor | None = None,
) -> TokenScores:
    """What `losses.score` gives, and in `logits` the gradient of the summed loss, by few passes over memory.

    With p = softmax(x), w the token's weight, e the smoothing, z the coefficient of the z-loss and L = logsumexp(x):

        d loss / d x_j = p_j · (w + 2 z L)  -  w (1 - e) [j = target]  -  w e / V

    Args:
        logits: (n, V) float32 before `transform`; the gradient is with respect to them.
        raw: a copy of them, overwritten; needed for the gradient through a cap.
        targets: (n,) int64.
        scale: a scalar by which the gradient is multiplied, while it is float32.
    """
    vocab_size = logits.shape[-1]
    column = targets[:, None]
    first, choice = _first_largest(logits)  # (n,)
    of_first, of_target = transform(first), transform(logits.gather(1, column).squeeze(1))
    transform(logits)
    mean = logits.mean(-1) if objective.label_smoothing else None
    # In place on a CPU, whose kernel reads a row before it writes it; fresh memory costs four times the softmax there.
    p = torch.softmax(logits, -1, out=logits) if logits.device.type == "cpu" else logits.copy_(logits.softmax(-1))
    # From the largest probability, at least 1/V: precise where the target's own underflows.
    log_first = p.gather(1, choice[:, None]).squeeze(1).log_()
    nll = (of_first - of_target) - log_first
    normalizer = of_first - log_first
    entropy = torch.special.entr(p).sum(-1) if objective.entropy else None
    loss = nll if mean is None else nll.lerp(normalizer - mean, objective.label_smoothing)
    weight = torch.exp(-nll) if objective.loss_type == "dft" else torch.ones_like(nll)
    loss = loss * weight + objective.z_loss * normalizer.square()
    if with_gradient:
        gradient_in_place(p, raw, column, weight, weight, normalizer, objective, transform, vocab_size, scale)
    return TokenScores(loss, nll, choice == targets, entropy)


def gradient_in_place(
    p: torch.Tensor,
    raw: torch.Tensor | None,
    column: torch.Tensor,
    of_target: torch.Tensor,
    weight: torch.Tensor,
    normalizer: torch.Tensor,
    objective: Objective,
    transform: LogitTransform,
    vocab_size: int,
    scale: torch.Tensor | None,
) -> None:
    """Makes the gradient of `score_in_place` out of the probabilities `p`, (n, V) or a slice of the vocabulary.

    Args:
        raw, scale: as there.
        column: (n, 1) where the targets are in `p`.
        of_target: (n,) the tokens' weights; 0 where a target is not in the slice.
        weight, normalizer: (n,) w and L.
        vocab_size: V, of which `p` may be a slice.
    """
    if objective.loss_type == "dft" or objective.z_loss:
        p.mul_((weight + 2 * objective.z_loss * normalizer)[:, None])
    if objective.label_smoothing:
        p.sub_((weight * (objective.label_smoothing / vocab_size))[:, None])
    p.scatter_add_(1, column, -of_target[:, None] * (1 - objective.label_smoothing))
    if transform.cap is not None and raw is not None:
        p.mul_(transform.factor(raw))
    elif transform.scale != 1.0:
        p.mul_(transform.scale)
    if scale is not None:
        p.mul_(scale)


def _first_largest(logits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """`logits.max(-1)` of (n, V). On a CPU from runs whose largest is found without its place: 5 times faster."""
    if logits.device.type != "cpu":
        largest, places = logits.max(-1)
        return largest, places
    vocab_size = logits.shape[-1]
    run = min(_CPU_RUN, vocab_size)
    whole = vocab_size - vocab_size % run
    of_runs = logits[:, :whole].unflatten(1, (-1, run)).amax(-1)  # (n, V // run)
    if whole < vocab_size:
        of_runs = torch.cat([of_runs, logits[:, whole:].amax(-1, keepdim=True)], 1)
    largest, first_run = of_runs.max(-1)
    # The last run is short: before it stand logits of another, all smaller, or that one would have been the first.
    start = (first_run * run).clamp_(max=vocab_size - run)
    candidates = logits.gather(1, start[:, None] + torch.arange(run))  # (n, run)
    return largest, start + candidates.argmax(-1)


def score_rows(
    logits: torch.Tensor,
    targets: torch.Tensor,
    objective: Objective,
    transform: LogitTransform,
    with_gradient: bool,
    scale: torch.Tensor | None = None,
) -> list[TokenScores]:
    """`score_in_place` of logits in any float dtype, a block of rows at a time; the gradient is rounded to it."""
    vocab_size = logits.shape[-1]
    numbers = _CPU_BLOCK * torch.get_num_threads() if logits.device.type == "cpu" else _CUDA_BLOCK
    rows = min(len(logits), max(numbers // vocab_size, 1))
    is_float32 = logits.dtype == torch.float32
    buffer = logits if is_float32 else torch.empty_like(logits[:rows], dtype=torch.float32)
    is_capped = transform.cap is not None and with_gradient
    before = torch.empty_like(logits[:rows], dtype=torch.float32) if is_capped else None
    parts = []
    for start in range(0, len(logits), max(rows, 1)):
        block = logits[start : start + rows]
        x = block if is_float32 else buffer[: len(block)].copy_(block)
        raw = None if before is None else before[: len(block)].copy_(block)
        block_targets = targets[start : start + rows]
        parts.append(score_in_place(x, raw, block_targets, objective, transform, with_gradient, scale))
        if with_gradient and not is_float32:
            block.copy_(x)
    return parts


def linear_chunks(
    tensors: Sequence[torch.Tensor],
    transform: LogitTransform,
    targets: torch.Tensor,
    settings: LossSettings,
    dtypes: Sequence[torch.dtype | None],
    scale: torch.Tensor | None = None,
    score: Callable[..., list[TokenScores]] = score_rows,
) -> tuple[TokenScores, Gradients]:
    """Scores and gradients for logits = transform(hidden · weightᵀ + bias), in matrix products written out.

    Buffers are made once: fresh memory costs a CPU 1 ns a logit, as much as all that is done with it.

    Args:
        tensors: hidden (N, D), weight (V, D) and perhaps bias (V,), all of one dtype.
        dtypes: what each one's gradient will be handed over in; None for one that needs none. Those of weight and
            bias add up in float32 where there are several chunks.
        scale: of all gradients, a scalar; None is 1.
        score: of the logits, with their gradient in their place; another where ranks share a vocabulary.
    """
    hidden, weight, *bias = tensors
    size = settings.chunk_size or choose_chunk_size(hidden.device, len(weight), len(hidden))
    gradients = _empty(tensors, dtypes, is_one_chunk=len(hidden) <= size)
    of_hidden, of_weight, *of_bias = gradients
    is_training = any(gradient is not None for gradient in gradients)
    projected = hidden.new_empty(min(size, len(hidden)), len(weight))
    parts = []
    for start in range(0, len(hidden), size):
        h = hidden[start : start + size]  # (n, D)
        d = projected[: len(h)]  # (n, V): the logits, then their gradient
        torch.mm(h, weight.t(), out=d)
        if bias:
            d += bias[0]
        parts += score(d, targets[start : start + size], settings.objective, transform, is_training, scale)
        if of_hidden is not None:
            torch.mm(d, weight, out=of_hidden[start : start + size])
        if of_weight is not None:
            _add_product(of_weight, d, h, is_first=start == 0)
        if bias and of_bias[0] is not None:
            _add(of_bias[0], d.sum(0, dtype=torch.float32), is_first=start == 0)
    return _join(parts, hidden, settings.objective), gradients


def module_chunks(
    model: nn.Module,
    head: OutputHead,
    tensors: Sequence[torch.Tensor],
    targets: torch.Tensor,
    settings: LossSettings,
    dtypes: Sequence[torch.dtype | None],
    scale: torch.Tensor | None = None,
    score: Callable[..., list[TokenScores]] = score_rows,
) -> tuple[TokenScores, Gradients]:
    """The same for any head: its own code makes the logits, autograd the gradients behind them.

    Args:
        tensors: hidden (N, D), and the leaves of the head's graph.
        dtypes: as in `linear_chunks`.
        scale, score: as there.
    """
    hidden = tensors[0]
    wanted = [i for i, dtype in enumerate(dtypes) if dtype is not None]
    size = settings.chunk_size or choose_chunk_size(hidden.device, head.vocab_size, len(hidden))
    gradients = _empty([to_local(t) for t in tensors], dtypes, is_one_chunk=len(hidden) <= size)
    parts = []
    for start in range(0, len(hidden), size):
        with torch.set_grad_enabled(bool(wanted)):
            h = hidden[start : start + size].detach().requires_grad_(0 in wanted)
            logits = to_local(head.logits(model, h))
        d = logits.detach().clone() if wanted else logits  # what made the logits may look at them in its backward
        parts += score(d, targets[start : start + size], settings.objective, LogitTransform(), bool(wanted), scale)
        if not wanted:
            continue
        inputs = [tensors[i] if i else h for i in wanted]
        found = torch.autograd.grad(logits, inputs, d, allow_unused=True, materialize_grads=True)
        for i, gradient in zip(wanted, found, strict=True):
            total = gradients[i]
            assert total is not None
            part = local_gradient(gradient, tensors[i])
            _add(total if i else total[start : start + size], part, is_first=i == 0 or start == 0)
    return _join(parts, hidden, settings.objective), gradients


def _empty(tensors: Sequence[torch.Tensor], dtypes: Sequence[torch.dtype | None], is_one_chunk: bool) -> Gradients:
    """Memory for the gradients, to be written by the first chunk; zeros where there is none.

    No row of the hidden states is added to twice: theirs are of their own dtype.
    """
    sums = dtypes[1:] if is_one_chunk else [dtype and torch.float32 for dtype in dtypes[1:]]
    kept = [dtypes[0] and tensors[0].dtype, *sums]
    make = torch.empty_like if len(tensors[0]) else torch.zeros_like
    return [None if d is None else make(t, dtype=d) for t, d in zip(tensors, kept, strict=True)]


def _add(total: torch.Tensor, part: torch.Tensor, is_first: bool) -> None:
    if is_first:
        total.copy_(part)
    else:
        total.add_(part)


def _add_product(total: torch.Tensor, d: torch.Tensor, h: torch.Tensor, is_first: bool) -> None:
    """total += dᵀ h: (V, D) from (n, V) and (n, D); `is_first` where nothing is in it yet."""
    if d.dtype == total.dtype:
        torch.addmm(total, d.t(), h, beta=0.0 if is_first else 1.0, out=total)
        return
    on_cpu = total.device.type == "cpu"
    rows = max((_CPU_SLICE if on_cpu else _CUDA_SLICE) // total.shape[1], 1)
    product = h.new_empty(min(rows, len(total)), h.shape[1])
    # A CPU adds numbers of two dtypes through a copy in fresh memory, which costs more than the sum itself.
    converted = torch.empty_like(product, dtype=total.dtype) if on_cpu else product
    for start in range(0, len(total), rows):
        part = total[start : start + rows]
        made = torch.mm(d[:, start : start + rows].t(), h, out=product[: len(part)])
        if is_first:
            part.copy_(made)
        else:
            part.add_(converted[: len(part)].copy_(made) if on_cpu else made)


def _join(parts: list[TokenScores], hidden: torch.Tensor, objective: Objective) -> TokenScores:
    """The scores of all blocks, in order."""
    empty = hidden.new_zeros(0, dtype=torch.float32)
    parts = parts or [TokenScores(empty, empty, empty.bool(), empty if objective.entropy else None)]
    entropies = [part.entropy for part in parts if part.entropy is not None]
    return TokenScores(
        loss=torch.cat([part.loss for part in parts]),
        nll=torch.cat([part.nll for part in parts]),
        correct=torch.cat([part.correct for part in parts]),
        entropy=torch.cat(entropies) if entropies else None,
    )
