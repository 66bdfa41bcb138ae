"""The loss where each rank computes the logits of a slice of the vocabulary; the results are those of a single rank.

With m and Z the largest logit and the sum of exp(x - m) over all slices,

    log p(y) = x_y - m - log Z          p_j = exp(x_j - m) / Z, for each j of a rank's own slice

so the ranks exchange a maximum and a few sums per token, whatever the size of the vocabulary (Shoeybi et al.,
"Megatron-LM", 2019, arXiv:1909.08053, section 3).
"""

from __future__ import annotations

import torch
import torch.distributed as dist

from sft.distributed.dtensor import VocabularyShard
from sft.loss.chunked import gradient_in_place, score_in_blocks
from sft.loss.output_head import LogitTransform
from sft.loss.token_loss import Objective, TokenScores

# Logits of a rank's chunk. A constant and not a share of the free memory, because all ranks must choose the same.
_CPU_LOGITS, _CUDA_LOGITS = 2**24, 2**27


def choose_chunk_size(shard: VocabularyShard, device: torch.device) -> int:
    """Returns the number of tokens to take at a time; the same on all ranks."""
    return max((_CUDA_LOGITS if device.type == "cuda" else _CPU_LOGITS) // shard.widest, 1)


def vocab_parallel_scores(
    logits: torch.Tensor,
    targets: torch.Tensor,
    objective: Objective,
    transform: LogitTransform,
    with_gradient: bool,
    scale: torch.Tensor | None = None,
    *,
    shard: VocabularyShard,
) -> list[TokenScores]:
    """Does what `score_in_blocks` does: equal scores on all ranks, and in `logits` the gradient of this rank's slice.

    Args:
        logits: (n, width) in any float dtype, of this rank's slice; or (n, V) where the head gathers them.
        targets: (n,) int64, counted over the whole vocabulary.
    """
    if logits.shape[-1] == shard.vocab_size:
        return score_in_blocks(logits, targets, objective, transform, with_gradient, scale)
    x = logits.float()  # no copy where it is float32
    raw = x.clone() if transform.cap is not None and with_gradient else None
    is_here = (targets >= shard.start) & (targets < shard.start + shard.width)  # (n,)
    column = (targets - shard.start).clamp(0, shard.width - 1)[:, None]
    transform(x)
    first, choice = x.max(-1)  # (n,)
    largest = first.clone()
    dist.all_reduce(largest, dist.ReduceOp.MAX, group=shard.group)
    of_target = x.gather(1, column).squeeze(1).where(is_here, 0.0)
    is_choice = _choice_indicator(choice + shard.start, targets).where(first == largest, 0.0)
    mean = x.sum(-1) / shard.vocab_size if objective.label_smoothing else torch.zeros_like(first)
    p = x.sub_(largest[:, None]).exp_()
    sums = torch.stack([p.sum(-1), of_target, is_choice, mean])  # (4, n)
    dist.all_reduce(sums, group=shard.group)
    total, of_target, is_choice, mean = sums
    nll, normalizer = (largest - of_target) + total.log(), largest + total.log()
    p.div_(total[:, None])
    entropy = torch.special.entr(p).sum(-1) if objective.entropy else None
    if entropy is not None:
        dist.all_reduce(entropy, group=shard.group)
    loss = nll.lerp(normalizer - mean, objective.label_smoothing) if objective.label_smoothing else nll
    weight = torch.exp(-nll) if objective.loss_type == "dft" else torch.ones_like(nll)
    loss = loss * weight + objective.z_loss * normalizer.square()
    if with_gradient:
        own = weight.where(is_here, 0.0)
        gradient_in_place(p, raw, column, own, weight, normalizer, objective, transform, shard.vocab_size, scale)
        if p is not logits:
            logits.copy_(p)
    return [TokenScores(loss, nll, is_choice >= 1, entropy)]


def _choice_indicator(first: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Returns a term whose sum, over the ranks that hold a largest logit, is 1 where the model chooses the target.

    The choice is the first of several largest logits. A rank whose first is before the target subtracts the 1 that the
    target's own rank adds; one whose first is after it adds nothing.

    Args:
        first: (n,) where this rank's first largest logit is in the vocabulary.
    """
    return (first == targets).float() - (first < targets).float()
