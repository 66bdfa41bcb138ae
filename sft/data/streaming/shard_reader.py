"""Reads one shard's rows of several sources, in an order that depends only on how far each source has been read.

    sources   a 0 1 2 3 4 5 6 7 8    b 0 1 2 3          two shards: row i belongs to shard i % 2
    shard 0   a0 b0 a2 b2 a4 a6 a8 |                     without weights: in turn, each row once per epoch
    shard 1   a1 b1 a3 b3 a5 a7 |
    shard 0   a0 b0 a2 a4 b2 a6 a8 b0 | a0 ...           weights 2 and 1: b is repeated until a is finished too

An epoch (`|`) ends when each source has been read completely once more than at its start.
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
        passes: complete passes over the source.
        position: rows of the shard read in the current pass.
        taken: rows read in all passes.
    """

    passes: int = 0
    position: int = 0
    taken: int = 0


@dataclass(frozen=True, slots=True)
class Shard:
    """Every `count`-th row of each source, starting at row `number`."""

    number: int
    count: int


@dataclass(slots=True)
class ShardRow:
    """A row of a shard.

    Attributes:
        source: index of its source.
        is_new: whether it is read for the first time.
    """

    source: int
    row: Row
    is_new: bool


class ShardReader:
    """Reads one shard of the sources from given cursors, epoch after epoch.

    The file readers count the rows before the cursors but do not parse them.

    Args:
        weights: relative share of each source in the rows; None reads each row once per epoch.
        cursors: where to start.
        epoch: number of finished epochs.
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
        """How far each source has been read."""
        return tuple(self._cursors)

    def read_epoch(self) -> Iterator[ShardRow]:
        """Yields the rows up to the end of the epoch. A new call continues where the last iteration stopped."""
        while (number := self._next()) is not None:
            cursor = self._cursors[number]
            row = next(self._rows(number), None)
            if row is not None:
                self._cursors[number] = Cursor(cursor.passes, cursor.position + 1, cursor.taken + 1)
                yield ShardRow(number, row, cursor.passes == 0)
                continue
            if cursor.position == 0 and self._weights is not None:
                raise too_few_rows(self._sources[number], self._shard.count)
            self._cursors[number] = Cursor(cursor.passes + 1, 0, cursor.taken)
            del self._open[number]
        self.epoch += 1

    def _next(self) -> int | None:
        """Returns the index of the next source; None at the end of the epoch."""
        unfinished = [n for n, cursor in enumerate(self._cursors) if cursor.passes <= self.epoch]
        if not unfinished:
            return None
        if self._weights is None:
            return min(unfinished, key=lambda n: (self._cursors[n].position, n))
        # The source whose next row exceeds its share the least (Webster's method).
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
    """Returns the error for a source that has no row for some shard."""
    message = f"{source.name!r} has fewer rows than the {shards} shards that it is split into"
    hint = "each of the dataloader_num_workers of each process reads one shard: use fewer, or turn streaming off"
    return UserError(Problem(message, hint, source.key))
