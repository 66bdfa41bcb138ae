"""Retries an optimizer step that runs out of memory in smaller micro-batches, and the run continues.

The loss of a step is a sum over its samples divided by a number that is known before the first micro-batch, so it does
not depend on how the samples are split. All micro-batches of the step are run again: what a failed backward pass has
already added to some gradients cannot be subtracted.

Only an allocation that fails can be caught: on a full CUDA device, or under a limit on the process's address space. On
a CPU without such a limit Linux grants every request and kills the process when the pages are touched (the "OOM
killer", exit code 137), which the process cannot catch.
"""

from __future__ import annotations

import gc
import logging
from collections.abc import Callable, Sequence
from typing import Any

import torch

from sft.distributed.oom import allocator_message, is_out_of_memory, out_of_memory

logger = logging.getLogger("sft")


class OomRetry:
    """Runs micro-batches, each in 2ᵏ pieces, where k grows by one whenever memory runs out.

    Call `begin` before each optimizer step and `run` for each micro-batch. A piece must not use collectives: a rank
    retries alone while the others wait for it at the gradient reduction after the last micro-batch. Each rank has its
    own k.

    Args:
        split: splits a piece in two; returns None if it cannot be split further.
        clear: clears the gradients of the step so far.
        counts, restore: read and restore what else a micro-batch changes (metrics).

    Attributes:
        cuts: k.
    """

    def __init__(
        self,
        split: Callable[[Any], tuple[Any, Any] | None],
        clear: Callable[[], None],
        counts: Callable[[], Any],
        restore: Callable[[Any], None],
    ) -> None:
        self._split, self._clear = split, clear
        self._counts, self._restore = counts, restore
        self._done: list[Any] = []  # micro-batches of this step that are done
        self.cuts = 0

    def begin(self) -> None:
        """Begins a new optimizer step."""
        self._done = []

    def run(self, batch: Any, run_piece: Callable[[Any], torch.Tensor]) -> torch.Tensor:
        """Adds the gradients of a micro-batch to those of the step and returns its loss, a scalar without graph.

        Args:
            run_piece: forward and backward pass of one piece; adds to the gradients and returns the piece's part of
                the loss, a scalar.

        Raises:
            RankStopped: memory runs out and no piece can be split further.
        """
        before = self._counts()
        loss = self._try([batch], run_piece)
        while loss is None:
            # The exception is gone by now, and with it the frames that held the tensors of the forward pass.
            gc.collect()
            if torch.cuda.is_available():
                torch.cuda.empty_cache()
            self._cut(batch)
            self._clear()
            self._restore(before)
            if self._try(self._done, run_piece) is None:
                continue
            self._restore(before)  # which counts the finished micro-batches already
            loss = self._try([batch], run_piece)
        self._done.append(batch)
        return loss

    def _try(self, batches: Sequence[Any], run_piece: Callable[[Any], torch.Tensor]) -> torch.Tensor | None:
        """Returns the sum of the batches' losses, 0 for no batch; None if memory ran out."""
        total: torch.Tensor | None = None
        try:
            for batch in batches:
                for piece in self._pieces(batch):
                    loss = run_piece(piece).detach()
                    total = loss if total is None else total + loss  # stays on the device: no synchronization
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            logger.warning("Out of memory: %s", allocator_message(error))
            return None
        return torch.zeros(()) if total is None else total

    def _pieces(self, batch: Any) -> list[Any]:
        pieces = [batch]
        for _ in range(self.cuts):
            pieces = [part for piece in pieces for part in (self._split(piece) or (piece,))]
        return pieces

    def _cut(self, batch: Any) -> None:
        """Increases k by one; raises `RankStopped` if no piece can be split further."""
        batches = [*self._done, batch]
        before = [len(self._pieces(b)) for b in batches]
        self.cuts += 1
        if [len(self._pieces(b)) for b in batches] == before:
            raise out_of_memory("memory runs out on a micro-batch of a single sample")
        logger.warning(
            "The optimizer step is run again in micro-batches of 1/%d of the samples, as are those after it; a smaller "
            "per_device_train_batch_size would avoid the retry",
            2**self.cuts,
        )
