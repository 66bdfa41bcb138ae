"""Builds windows of a stream: some thousand rows that are encoded, packed and shuffled together."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from sft.data.documents import IGNORE_INDEX, Documents
from sft.data.encoding.row_encoder import RowEncoder, Seen
from sft.data.ledger import Ledger
from sft.data.preparation.packing import pack
from sft.data.sources.dataset_source import DataSource
from sft.data.sources.row import Row
from sft.data.streaming.shard_reader import ShardRow


@dataclass(frozen=True)
class StreamPlan:
    """Settings of a stream.

    Attributes:
        sources: the data sets.
        weights: their relative shares of the rows; None reads each row once per epoch.
        packing: `bfd`, `wrapped`, or None for one document per sequence.
        seed: of the order of sequences.
        shuffle: whether the sequences of a window are shuffled.
        known: fingerprints of the validation rows.
        world_size: number of training processes.
        workers: data loader workers of each process; 1 if it loads the data itself.
    """

    sources: tuple[DataSource, ...]
    weights: tuple[float, ...] | None
    packing: str | None
    seed: int
    shuffle: bool = True
    known: set[bytes] = field(default_factory=set)
    world_size: int = 1
    workers: int = 1

    @property
    def shards(self) -> int:
        """Number of shards of each source."""
        return self.world_size * self.workers


class StreamWindow:
    """Training sequences in the order in which the stream yields them.

    Args:
        documents: in the order in which they were read.
        packing, capacity: as for `sft.data.preparation.packing.pack`.
        rng: shuffles the sequences; None keeps the order of the packing.
    """

    def __init__(
        self, documents: Documents, packing: str | None, capacity: int, rng: np.random.Generator | None
    ) -> None:
        layout = pack(documents.lengths, packing, capacity)
        if layout.order is not None:
            documents = documents.take(layout.order)
        self._is_packed = packing is not None
        self._input_ids, self._labels, self._lengths = documents.input_ids, documents.labels.copy(), layout.lengths
        starts = np.cumsum(layout.lengths) - layout.lengths
        self.cuts = starts[self._labels[starts] != IGNORE_INDEX]
        """(cuts,) Indices of the tokens without a label because wrapping cuts before them: nothing predicts them."""
        self._labels[self.cuts] = IGNORE_INDEX
        self._token_ends, self._document_ends = np.cumsum(layout.sequence_lengths), np.cumsum(layout.counts)
        size = len(layout.counts)
        self._order = np.arange(size) if rng is None else rng.permutation(size)

    def __len__(self) -> int:
        return len(self._order)

    def sequence(self, number: int) -> dict[str, np.ndarray]:
        """Returns `input_ids` and `labels` (T,) int32, and, if packed, `seq_lengths` (documents,)."""
        at = int(self._order[number])
        tokens = slice(self._token_ends[at - 1] if at else 0, self._token_ends[at])
        sequence = {"input_ids": self._input_ids[tokens], "labels": self._labels[tokens]}
        if self._is_packed:
            documents = slice(self._document_ends[at - 1] if at else 0, self._document_ends[at])
            sequence["seq_lengths"] = self._lengths[documents].astype(np.int32)
        return sequence


def build_window(
    rows: Sequence[ShardRow], encoder: RowEncoder, plan: StreamPlan, capacity: int, rng: np.random.Generator | None
) -> tuple[StreamWindow, dict[str, Ledger]]:
    """Encodes and packs rows, in the order in which they are read.

    Returns:
        The window, and the ledger of each data set with rows that are read for the first time. Duplicates are counted
        within the window.
    """
    packing, sources = plan.packing, plan.sources
    groups: dict[tuple[bool, int], list[Row]] = {}
    for number, read in enumerate(rows):
        read.row.index = number  # `Documents.rows` then holds it for each document
        groups.setdefault((not read.is_new, read.source), []).append(read.row)
    new, again = Seen(set(), plan.known), Seen(set(), plan.known)
    parts: list[Documents] = []
    ledgers = {group: Ledger() for group in sorted(groups)}
    for group, ledger in ledgers.items():
        is_again, number = group
        seen = again if is_again else new
        parts += encoder.encode(groups[group], sources[number], ledger, seen, wrapped=packing == "wrapped")
    documents = Documents.join(parts)
    if len(groups) > 1:
        documents = documents.take(np.argsort(documents.rows, kind="stable"))
    window = StreamWindow(documents, packing, capacity, rng)
    for document in np.searchsorted(np.cumsum(documents.lengths), window.cuts, side="right").tolist():
        read = rows[documents.rows[document]]
        ledgers[not read.is_new, read.source].tokens_trained -= 1
    reported = {sources[number].name: ledger for (is_again, number), ledger in ledgers.items() if not is_again}
    if packing and reported and len(documents):
        # Sequences hold documents of several data sets: the first ledger counts them, so the total counts them once.
        # If rows are read again, the window counts with the share of its tokens that are new.
        tokens = sum(ledger.tokens for ledger in reported.values())
        share = tokens / len(documents.input_ids)
        held = round(len(window) * capacity * share)
        next(iter(reported.values())).pack(round(len(window) * share), held, tokens)
    return window, reported
