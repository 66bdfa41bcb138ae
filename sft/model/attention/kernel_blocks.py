"""How documents are cut into blocks of queries, and what a block takes from the row, in few shapes where shapes cost.

For a product in half precision on a CPU oneDNN makes code for its very shape: 0.2 to 1 ms, and some 0.6 MiB that stay.
Each document has a length of its own, and by 32 documents a step that adds up. So there blocks are rounded up:

    document of 150 tokens      keys     0 .. 95    0 .. 159     in units of 32; the last 10 are zeros
                                queries  0 .. 95    96 .. 159

Documents of up to 512 tokens then have blocks of 16 shapes in all, up to 2,048 of 48, up to 8,192 of 96. What oneDNN
multiplies must also be contiguous, and torch would copy a slice of the row anew for each product, transposed for some:
here it is copied once, with its zeros. Both together took 0.75 to 0.9 of the time on AVX512_BF16, even with the code
made already.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor

QUERIES = 128  # of a block; 64 and 256 were 1.0-1.1 times slower, 512 1.1-1.5 (documents of 30 to 1700 tokens)
_UNIT = 32  # with 16 there were twice as many shapes, and products were no faster


def keeps_code_by_shape(tensor: Tensor) -> bool:
    """Whether the library that multiplies such tensors makes code for each shape and keeps it."""
    return tensor.device.type == "cpu" and tensor.dtype in (torch.bfloat16, torch.float16)


class Span(NamedTuple):
    """Where one block lies in the row: its keys are `start` to `stop`, its queries `first` to `stop`.

    Tokens from `end` on are not the document's, and are not looked at. In their place stand zeros: as keys they come
    later than each of the document's queries and are masked with the future, as queries they have no gradient.

    Attributes:
        contiguous: whether keys are copied also where they need no zeros.
    """

    start: int
    first: int
    stop: int
    end: int
    contiguous: bool

    @property
    def queries(self) -> int:
        """How many the block has, zeros included."""
        return self.stop - self.first

    @property
    def real(self) -> int:
        """How many of them are tokens."""
        return min(self.stop, self.end) - self.first

    @property
    def own(self) -> slice:
        """Where these stand in the row."""
        return slice(self.first, min(self.stop, self.end))

    def queries_of(self, tensor: Tensor) -> Tensor:
        """(H, C, D) from (H, N, D)."""
        return self._taken(tensor, self.first)

    def keys_of(self, tensor: Tensor) -> Tensor:
        """(H, keys, D) from (H, N, D)."""
        taken = self._taken(tensor, self.start)
        return taken.contiguous() if self.contiguous else taken

    def _taken(self, tensor: Tensor, first: int) -> Tensor:
        if self.stop <= self.end:
            return tensor[:, first : self.stop]
        filled = tensor.new_empty(tensor.shape[0], self.stop - first, tensor.shape[2])
        filled[:, : self.end - first].copy_(tensor[:, first : self.end])
        filled[:, self.end - first :].zero_()
        return filled


def cut(offsets: list[int], window: int | None, rounded: bool) -> Iterator[list[Span]]:
    """For each document its blocks.

    They are of nearly the same size, so that none ends with a sliver of a few queries.

    Args:
        offsets: where each document starts, and the end of the last.
        window: the keys that a query sees, its own included; None is all up to it.
        rounded: whether queries and keys come in multiples of a unit.
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
    """What the sizes of a document's blocks are multiples of: at most a 16th of it, so that long ones have few."""
    return min(max(_UNIT, 1 << length.bit_length() >> 5), QUERIES)
