"""One shard's rows of several sources, in an order that follows from nothing but how far each source has been read.

    sources   a 0 1 2 3 4 5 6 7 8    b 0 1 2 3          two shards: row i belongs to shard i % 2
    shard 0   a0 b0 a2 b2 a4 a6 a8 |                     without weights: in turn, each row once an epoch
    shard 1   a1 b1 a3 b3 a5 a7 |
    shard 0   a0 b0 a2 a4 b2 a6 a8 b0 | a0 ...           weights 2 and 1: b starts over until a is through as well

An epoch (`|`) ends when each source has been read through once more than at its start.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from sft.data.sources.dataset_source import DataSource
from sft.data.sources.row import Row
from sft.errors import Problem, UserError


@dataclass(frozen=True, slots=True)
class Cursor:
    """How far a shard has read one source.

    Attributes:
        passes: times that it was read to its end.
        position: of the shard's rows, those read since then.
        taken: rows read in all passes together.
    """

    passes: int = 0
    position: int = 0
    taken: int = 0


@dataclass(frozen=True, slots=True)
class Shard:
    """Every `count`-th row of each source, from row `number` on."""

    number: int
    count: int


@dataclass(slots=True)
class Taken:
    """A row as the shard reads it.

    Attributes:
        source: its number among the sources.
        is_new: whether it is read for the first time.
    """

    source: int
    row: Row
    is_new: bool


class ShardReader:
    """Reads one shard of the sources from given cursors on, epoch after epoch.

    The rows before the cursors are counted by the readers of the files, and not parsed.

    Args:
        weights: each source's share of the rows in proportion to the others'; None takes each row once an epoch.
        cursors: where to begin.
        epoch: epochs that are through.
    """

    def __init__(
        self,
        sources: Sequence[DataSource],
        weights: Sequence[float] | None,
        shard: Shard,
        cursors: Sequence[Cursor],
        epoch: int,
    ) -> None:
        self._sources, self._weights, self._shard = sources, weights, shard
        self._cursors, self.epoch = list(cursors), epoch
        self._open: dict[int, Iterator[Row]] = {}

    @property
    def cursors(self) -> tuple[Cursor, ...]:
        """How far each source has been read by now."""
        return tuple(self._cursors)

    def rest_of_epoch(self) -> Iterator[Taken]:
        """The rows up to the end of the epoch; it may be left and called again, and goes on where it was left."""
        while (number := self._next()) is not None:
            cursor = self._cursors[number]
            row = next(self._rows(number), None)
            if row is not None:
                self._cursors[number] = Cursor(cursor.passes, cursor.position + 1, cursor.taken + 1)
                yield Taken(number, row, cursor.passes == 0)
                continue
            if cursor.position == 0 and self._weights is not None:
                raise too_few_rows(self._sources[number], self._shard.count)
            self._cursors[number] = Cursor(cursor.passes + 1, 0, cursor.taken)
            del self._open[number]
        self.epoch += 1

    def _next(self) -> int | None:
        """The source whose turn it is; None when the epoch is through."""
        unfinished = [n for n, cursor in enumerate(self._cursors) if cursor.passes <= self.epoch]
        if not unfinished:
            return None
        if self._weights is None:
            return min(unfinished, key=lambda n: (self._cursors[n].position, n))
        # The source that its next row would bring the least far beyond its share (Webster's method).
        weights = self._weights
        return min(range(len(weights)), key=lambda n: ((self._cursors[n].taken + 0.5) / weights[n], n))

    def _rows(self, number: int) -> Iterator[Row]:
        if number not in self._open:
            shard, position = self._shard, self._cursors[number].position

            def wanted(index: int) -> bool:
                return index % shard.count == shard.number and index // shard.count >= position

            self._open[number] = self._sources[number].rows(wanted)
        return self._open[number]


def too_few_rows(source: DataSource, shards: int) -> UserError:
    """The mistake of a source that has no row for some shard."""
    message = f"{source.name!r} has fewer rows than the {shards} parts that it is read in"
    hint = "a stream has a part for each process and each of its dataloader_num_workers: take fewer, or no streaming"
    return UserError(Problem(message, hint, source.key))
