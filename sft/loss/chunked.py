"""The summed loss in chunks of tokens, with its gradients computed while a chunk's logits exist."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import nn

from sft.distributed.dtensor import local_gradient, to_local
from sft.loss.output_head import LogitTransform, OutputHead
from sft.loss.token_loss import LossSettings, Objective, TokenScores

Gradients = list[torch.Tensor | None]

_CPU_LOGITS = 2**26  # of a chunk: 128 MiB in bfloat16. Half takes 6 % longer at a vocabulary of 150k
_CUDA_LOGITS = 2**27  # 256 MiB in bfloat16, on a GPU of 64 GiB or more; in proportion on a smaller one
# Logits of a block, for which the softmax and the steps after it run, so that never a whole chunk is in float32. On
# CPUs 4 MiB for each core, which stay in the cache between the steps; on a GPU 128 MiB, which occupy it fully.
CPU_BLOCK, CUDA_BLOCK = 2**20, 2**25
# Elements of a float32 gradient to which a half-precision matrix product is added at a time. On a CPU few, so that the
# product is still in the cache, which makes it as fast as adding in bfloat16; on a GPU many, to occupy it fully.
CPU_SLICE, CUDA_SLICE = 2**22, 2**26
_CPU_RUN = 256  # logits among which the largest is searched at a time


def choose_chunk_size(device: torch.device, vocab_size: int, tokens: int) -> int:
    """Returns how many of `tokens` to take at a time, in chunks of equal size; at least 1."""
    logits = _CPU_LOGITS
    if device.type == "cuda":
        # All memory and not what is free: that is less when a run resumes, which would then round differently.
        logits = min(_CUDA_LOGITS, torch.cuda.get_device_properties(device).total_memory // 512)
    most = max(logits // vocab_size, 1)
    chunks = -(-tokens // most)
    return max(-(-tokens // max(chunks, 1)), 1)


def score_in_place(
    logits: torch.Tensor,
    raw: torch.Tensor | None,
    targets: torch.Tensor,
    objective: Objective,
    transform: LogitTransform,
    with_gradient: bool,
    scale: torch.Tensor | None = None,
) -> TokenScores:
    """Computes what `token_loss.score` does and leaves the gradient of the summed loss in `logits`.

    With p = softmax(x), w the token's weight, e the smoothing, z the coefficient of the z-loss and L = logsumexp(x):

        d loss / d x_j = p_j · (w + 2 z L)  -  w (1 - e) [j = target]  -  w e / V

    Args:
        logits: (n, V) float32 before `transform`; the gradient is with respect to them.
        raw: a copy of them, which is overwritten; needed for the gradient through a cap.
        targets: (n,) int64.
        scale: a scalar by which the gradient is multiplied while it is float32.
    """
    vocab_size = logits.shape[-1]
    column = targets[:, None]
    largest, choice = _largest_logits(logits)  # (n,)
    of_choice, of_target = transform(largest), transform(logits.gather(1, column).squeeze(1))
    transform(logits)
    mean = logits.mean(-1) if objective.label_smoothing else None
    # In place on a CPU, whose kernel reads a row before it writes it: new memory costs four times the softmax there.
    p = torch.softmax(logits, -1, out=logits) if logits.device.type == "cpu" else logits.copy_(logits.softmax(-1))
    # From the largest probability, at least 1/V: precise even where the target's probability underflows.
    log_choice = p.gather(1, choice[:, None]).squeeze(1).log_()
    nll = (of_choice - of_target) - log_choice
    normalizer = of_choice - log_choice
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
    """Turns the probabilities `p`, (n, V) or a slice of the vocabulary, into the gradient of `score_in_place`.

    Args:
        raw, scale: as in `score_in_place`.
        column: (n, 1) the targets' columns in `p`.
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


def _largest_logits(logits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns `logits.max(-1)` of (n, V). On a CPU from the maxima of runs, without indices: 5 times faster."""
    if logits.device.type != "cpu":
        largest, indices = logits.max(-1)
        return largest, indices
    vocab_size = logits.shape[-1]
    run = min(_CPU_RUN, vocab_size)
    whole = vocab_size - vocab_size % run
    of_runs = logits[:, :whole].unflatten(1, (-1, run)).amax(-1)  # (n, V // run)
    if whole < vocab_size:
        of_runs = torch.cat([of_runs, logits[:, whole:].amax(-1, keepdim=True)], 1)
    largest, first_run = of_runs.max(-1)
    # The last run is short, so it begins in the run before it, whose logits are all smaller, or it would be the first.
    start = (first_run * run).clamp_(max=vocab_size - run)
    candidates = logits.gather(1, start[:, None] + torch.arange(run))  # (n, run)
    return largest, start + candidates.argmax(-1)


def score_in_blocks(
    logits: torch.Tensor,
    targets: torch.Tensor,
    objective: Objective,
    transform: LogitTransform,
    with_gradient: bool,
    scale: torch.Tensor | None = None,
) -> list[TokenScores]:
    """Calls `score_in_place` for blocks of tokens, on logits of any float dtype; the gradient is rounded to it."""
    vocab_size = logits.shape[-1]
    block_size = CPU_BLOCK * torch.get_num_threads() if logits.device.type == "cpu" else CUDA_BLOCK
    tokens = min(len(logits), max(block_size // vocab_size, 1))
    is_float32 = logits.dtype == torch.float32
    buffer = logits if is_float32 else torch.empty_like(logits[:tokens], dtype=torch.float32)
    is_capped = transform.cap is not None and with_gradient
    before = torch.empty_like(logits[:tokens], dtype=torch.float32) if is_capped else None
    parts = []
    for start in range(0, len(logits), max(tokens, 1)):
        block = logits[start : start + tokens]
        x = block if is_float32 else buffer[: len(block)].copy_(block)
        raw = None if before is None else before[: len(block)].copy_(block)
        block_targets = targets[start : start + tokens]
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
    score: Callable[..., list[TokenScores]] = score_in_blocks,
) -> tuple[TokenScores, Gradients]:
    """Computes scores and gradients for logits = transform(hidden · weightᵀ + bias), by explicit matrix products.

    Buffers are reused for all chunks: new memory costs a CPU 1 ns per logit, as much as the computation itself.

    Args:
        tensors: hidden (N, D), weight (V, D) and perhaps bias (V,), all of one dtype.
        dtypes: of each one's gradient as autograd will get it; None for one that needs none. Those of weight and bias
            are summed in float32 where there are several chunks.
        scale: by which all gradients are multiplied, a scalar; None is 1.
        score: scores logits and puts their gradient in their place, as `score_in_blocks`; another function where ranks
            share a vocabulary.
    """
    hidden, weight, *bias = tensors
    size = settings.chunk_size or choose_chunk_size(hidden.device, len(weight), len(hidden))
    gradients = _allocate_gradients(tensors, dtypes, is_one_chunk=len(hidden) <= size)
    of_hidden, of_weight, *of_bias = gradients
    is_training = any(gradient is not None for gradient in gradients)
    projected = hidden.new_empty(min(size, len(hidden)), len(weight))
    parts = []
    for start in range(0, len(hidden), size):
        h = hidden[start : start + size]  # (n, D)
        d = projected[: len(h)]  # (n, V): the logits, later their gradient
        torch.mm(h, weight.t(), out=d)
        if bias:
            d += bias[0]
        parts += score(d, targets[start : start + size], settings.objective, transform, is_training, scale)
        if of_hidden is not None:
            torch.mm(d, weight, out=of_hidden[start : start + size])
        if of_weight is not None:
            _add_matmul(of_weight, d, h, is_first=start == 0)
        if bias and of_bias[0] is not None:
            _add(of_bias[0], d.sum(0, dtype=torch.float32), is_first=start == 0)
    return _concatenate(parts, hidden, settings.objective), gradients


def module_chunks(
    model: nn.Module,
    head: OutputHead,
    tensors: Sequence[torch.Tensor],
    targets: torch.Tensor,
    settings: LossSettings,
    dtypes: Sequence[torch.dtype | None],
    scale: torch.Tensor | None = None,
    score: Callable[..., list[TokenScores]] = score_in_blocks,
) -> tuple[TokenScores, Gradients]:
    """Does the same for any head: its own code computes the logits, and autograd the gradients from theirs.

    Args:
        tensors: hidden (N, D), and the leaves of the head's graph.
        dtypes, scale, score: as in `linear_chunks`.
    """
    hidden = tensors[0]
    wanted = [i for i, dtype in enumerate(dtypes) if dtype is not None]
    size = settings.chunk_size or choose_chunk_size(hidden.device, head.vocab_size, len(hidden))
    gradients = _allocate_gradients([to_local(t) for t in tensors], dtypes, is_one_chunk=len(hidden) <= size)
    parts = []
    for start in range(0, len(hidden), size):
        with torch.set_grad_enabled(bool(wanted)):
            h = hidden[start : start + size].detach().requires_grad_(0 in wanted)
            logits = to_local(head.logits(model, h))
        d = logits.detach().clone() if wanted else logits  # the backward of the operation that made them may need them
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
    return _concatenate(parts, hidden, settings.objective), gradients


def _allocate_gradients(
    tensors: Sequence[torch.Tensor], dtypes: Sequence[torch.dtype | None], is_one_chunk: bool
) -> Gradients:
    """Allocates the gradients, which the first chunk writes; zeros where there is no chunk.

    Each token's hidden state is in one chunk only, so its gradient is not a sum and has the dtype of the states.
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


def _add_matmul(total: torch.Tensor, d: torch.Tensor, h: torch.Tensor, is_first: bool) -> None:
    """Adds dᵀ h to `total`: (V, D) from (n, V) and (n, D); with `is_first` overwrites it."""
    if d.dtype == total.dtype:
        torch.addmm(total, d.t(), h, beta=0.0 if is_first else 1.0, out=total)
        return
    on_cpu = total.device.type == "cpu"
    rows = max((CPU_SLICE if on_cpu else CUDA_SLICE) // total.shape[1], 1)
    product = h.new_empty(min(rows, len(total)), h.shape[1])
    # A CPU adds tensors of two dtypes through a copy in new memory, which costs more than the sum itself.
    converted = torch.empty_like(product, dtype=total.dtype) if on_cpu else product
    for start in range(0, len(total), rows):
        part = total[start : start + rows]
        torch.mm(d[:, start : start + rows].t(), h, out=product[: len(part)])
        if is_first:
            part.copy_(product[: len(part)])
        else:
            part.add_(converted[: len(part)].copy_(product[: len(part)]) if on_cpu else product[: len(part)])


def _concatenate(parts: list[TokenScores], hidden: torch.Tensor, objective: Objective) -> TokenScores:
    """Concatenates the scores of all blocks."""
    empty = hidden.new_zeros(0, dtype=torch.float32)
    parts = parts or [TokenScores(empty, empty, empty.bool(), empty if objective.entropy else None)]
    entropies = [part.entropy for part in parts if part.entropy is not None]
    return TokenScores(
        loss=torch.cat([part.loss for part in parts]),
        nll=torch.cat([part.nll for part in parts]),
        correct=torch.cat([part.correct for part in parts]),
        entropy=torch.cat(entropies) if entropies else None,
    )
