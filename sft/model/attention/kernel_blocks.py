"""Cuts documents into blocks of queries and copies the tokens of a block; on a CPU in half precision, in few shapes.

For a matrix multiplication in half precision on a CPU, oneDNN compiles a kernel for each shape: 0.2 to 1 ms, and about
0.6 MiB that are never freed. Documents have many lengths, and by 32 documents a step that adds up. There the sizes of
blocks are rounded up:

    document of 150 tokens      keys     0 .. 95    0 .. 159     in units of 32; the last 10 are zeros
                                queries  0 .. 95    96 .. 159

Documents of up to 512 tokens then have blocks of 16 shapes in all, up to 2,048 of 48, up to 8,192 of 96. oneDNN also
needs contiguous inputs: torch would copy a slice of the row for each multiplication, for some of them transposed. Here
it is copied once, with its zeros. Both together took 0.75 to 0.9 of the time on AVX512_BF16, even with all kernels
compiled already.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor

QUERIES = 128  # of a block; 64 and 256 were 1.0-1.1 times slower, 512 1.1-1.5 (documents of 30 to 1700 tokens)
_UNIT = 32  # with 16 there were twice as many shapes, and it was no faster


def caches_kernels_by_shape(tensor: Tensor) -> bool:
    """Returns whether multiplying such tensors compiles a kernel for each shape, which is never freed."""
    return tensor.device.type == "cpu" and tensor.dtype in (torch.bfloat16, torch.float16)


class Span(NamedTuple):
    """Where one block lies in the row: its keys are `start` to `stop`, its queries `first` to `stop`.

    Tokens from `end` on belong to other documents and are replaced by zeros: as keys they come after each of the
    document's queries and are masked as future tokens, as queries they have no gradient.

    Attributes:
        contiguous: whether keys are copied even if they need no zeros.
    """

    start: int
    first: int
    stop: int
    end: int
    contiguous: bool

    @property
    def query_count(self) -> int:
        """Queries of the block, zeros included."""
        return self.stop - self.first

    @property
    def token_count(self) -> int:
        """Queries that are tokens of the document."""
        return min(self.stop, self.end) - self.first

    @property
    def tokens(self) -> slice:
        """Where these are in the row."""
        return slice(self.first, min(self.stop, self.end))

    def queries_of(self, tensor: Tensor) -> Tensor:
        """Selects the queries, (H, C, D) from (H, N, D)."""
        return self._select(tensor, self.first)

    def keys_of(self, tensor: Tensor) -> Tensor:
        """Selects the keys or their values, (H, keys, D) from (H, N, D)."""
        selected = self._select(tensor, self.start)
        return selected.contiguous() if self.contiguous else selected

    def _select(self, tensor: Tensor, first: int) -> Tensor:
        if self.stop <= self.end:
            return tensor[:, first : self.stop]
        filled = tensor.new_empty(tensor.shape[0], self.stop - first, tensor.shape[2])
        filled[:, : self.end - first].copy_(tensor[:, first : self.end])
        filled[:, self.end - first :].zero_()
        return filled


def cut_blocks(offsets: list[int], window: int | None, rounded: bool) -> Iterator[list[Span]]:
    """Yields the blocks of each document, of nearly equal size: the last one is not a remainder of a few queries.

    Args:
        offsets: where each document starts, and the end of the last.
        window: the keys that a query sees, its own included; None is all up to it.
        rounded: whether the numbers of queries and keys are rounded up to multiples of a unit.
    """
    for begin, end in pairwise(offsets):
        unit = _unit(end - begin) if rounded else 1
        stop = begin + -(-(end - begin) // unit) * unit
        count = -(-(stop - begin) // QUERIES)
        size = -(-(stop - begin) // (count * unit)) * unit
        reach = stop if window is None else window - 1
        yield [
            Span(begin + max(0, first - begin - reach) // unit * unit, first, min(first + size, stop), end, rounded)
            for first in range(begin, stop, size)
        ]


def _unit(length: int) -> int:
    """Returns the unit of the sizes of a document's blocks; it grows with the document, so long ones have few sizes."""
    return min(max(_UNIT, 1 << length.bit_length() >> 5), QUERIES)
