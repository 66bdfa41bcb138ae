"""An optimizer step that runs out of memory is done again in smaller passes, and the run goes on.

The loss of a step is a sum over its rows divided by a number that stands before the first pass, so that it is the same
in whatever pieces the rows come. What a failed backward pass has already added to some of the gradients cannot be told
from what earlier passes added; so all the passes of the step are done again.

What can be caught is an allocator that says no: a CUDA device that is full, or a limit of the process's address space.
On a CPU without such a limit Linux grants every request and kills the process when the pages are touched (the
"OOM killer", exit code 137), which nothing in the process can catch.
"""

from __future__ import annotations

import gc
import logging
from collections.abc import Callable, Sequence
from typing import Any

import torch

from sft.distributed.oom import allocator_message, is_out_of_memory, out_of_memory

logger = logging.getLogger("sft")

RunPass = Callable[[Any], torch.Tensor]


class OomRetry:
    """The passes of optimizer steps, each cut into 2ᵏ pieces, where k grows by one whenever memory runs out.

    `begin` stands before each optimizer step and `run` in the place of each pass. Passes must not talk to other ranks,
    so that a rank may do them again while the others wait for it at the reduction of the gradients, which belongs
    behind the last pass. Each rank cuts its own passes only.

    Args:
        halves: a piece as two, or None when it cannot be cut any further.
        clear: forgets the gradients of the step so far.
        counts: reads what is counted besides (metrics), in a form that `put_back` takes.
        put_back: sets it again.
    """

    def __init__(
        self,
        halves: Callable[[Any], tuple[Any, Any] | None],
        clear: Callable[[], None],
        counts: Callable[[], Any],
        put_back: Callable[[Any], None],
    ) -> None:
        self._halves, self._clear = halves, clear
        self._counts, self._put_back = counts, put_back
        self._earlier: list[Any] = []  # the passes of this step that are done
        self.cuts = 0

    def begin(self) -> None:
        """A new optimizer step."""
        self._earlier = []

    def run(self, batch: Any, run_pass: RunPass) -> torch.Tensor:
        """The loss of the pass, a scalar without graph, once its gradients stand beside those of the step so far.

        Args:
            run_pass: forward and backward on one piece; adds to the gradients and returns the loss's part, a scalar.

        Raises:
            RankStopped: memory runs out for pieces that cannot be cut any further.
        """
        before = self._counts()
        loss = self._attempt([batch], run_pass)
        while loss is None:
            # Here the error is gone, and with it the frames that held the pass's tensors.
            gc.collect()
            if torch.cuda.is_available():
                torch.cuda.empty_cache()
            self._cut(batch)
            self._clear()
            self._put_back(before)
            if self._attempt(self._earlier, run_pass) is None:
                continue
            self._put_back(before)  # the earlier passes have been counted already
            loss = self._attempt([batch], run_pass)
        self._earlier.append(batch)
        return loss

    def _attempt(self, batches: Sequence[Any], run_pass: RunPass) -> torch.Tensor | None:
        """The summed loss of the batches, 0 of none; None when memory ran out on the way."""
        total: torch.Tensor | None = None
        try:
            for batch in batches:
                for piece in self._pieces(batch):
                    loss = run_pass(piece).detach()
                    total = loss if total is None else total + loss  # on the device: nobody waits for it
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            logger.warning("Out of memory: %s", allocator_message(error))
            return None
        return torch.zeros(()) if total is None else total

    def _pieces(self, batch: Any) -> list[Any]:
        pieces = [batch]
        for _ in range(self.cuts):
            pieces = [part for piece in pieces for part in (self._halves(piece) or (piece,))]
        return pieces

    def _cut(self, batch: Any) -> None:
        """One cut more.

        Raises:
            RankStopped: it would cut nothing.
        """
        passes = [*self._earlier, batch]
        before = [len(self._pieces(p)) for p in passes]
        self.cuts += 1
        if [len(self._pieces(p)) for p in passes] == before:
            raise out_of_memory("memory runs out on a pass of a single row")
        logger.warning(
            "The optimizer step is done again in passes of 1/%d of the rows, as are those after it; a smaller "
            "per_device_train_batch_size would have spared the time",
            2**self.cuts,
        )
