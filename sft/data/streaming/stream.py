"""Streams training data that is larger than memory or disk, prepared while the model trains.

    sources → shards, one per process and worker → windows of rows → documents → packed and shuffled sequences

What a shard yields depends only on the seed and its `Place`, the position in a window. Each batch carries its places,
so the trainer knows those of the sequences it has trained, however far the workers have read ahead; a stream that
starts from them continues with the next sequence.
"""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import islice
from typing import Any, TypeVar

import numpy as np
from torch.utils.data import IterableDataset, get_worker_info
from transformers import PreTrainedTokenizerBase

from sft.config.schema import DataKeys
from sft.data.encoding.row_encoder import RowEncoder
from sft.data.ledger import Ledger, as_document, require_enough_rows
from sft.data.preparation.cache import cache_key
from sft.data.sources.dataset_source import DataSource
from sft.data.streaming.shard_reader import Cursor, Shard, ShardReader, too_few_rows
from sft.data.streaming.window import StreamPlan, StreamWindow, build_window
from sft.errors import UserError

STEP = "stream"  # entry of a batch with the position of the stream after it
PROBLEMS = "problems"  # only entry of an item by which a worker reports what is wrong with the data
Item = TypeVar("Item")


@dataclass(frozen=True, slots=True)
class Place:
    """Position of a shard in a window.

    Attributes:
        shard: index among all shards.
        epoch: how often the shard has been read completely.
        window: index of the window in the epoch.
        row: sequences of the window that have been yielded.
        cursors: how far each source had been read before the window.
    """

    shard: int
    epoch: int
    window: int
    row: int
    cursors: tuple[Cursor, ...]


@dataclass(slots=True)
class Account:
    """Counts of the rows that were read since the last account.

    Attributes:
        ledgers: by data set, without rows that are read again.
        again: rows of each data set that were read again.
        end_token_ids: the tokens that end their answers.
        ends_epoch: whether the shard has reached the end of its rows.
    """

    ledgers: dict[str, Ledger] = field(default_factory=dict)
    again: Counter[str] = field(default_factory=Counter)
    end_token_ids: list[int] = field(default_factory=list)
    ends_epoch: bool = False

    def add(self, other: Account) -> None:
        """Adds a later account."""
        for name, ledger in other.ledgers.items():
            self.ledgers.setdefault(name, Ledger()).merge(ledger)
        self.again += other.again
        self.end_token_ids += [t for t in other.end_token_ids if t not in self.end_token_ids]
        self.ends_epoch |= other.ends_epoch

    @property
    def has_news(self) -> bool:
        """Whether it counts anything."""
        return bool(self.ledgers or self.again) or self.ends_epoch


@dataclass(frozen=True, slots=True)
class Step:
    """Progress of the stream by one sequence or batch.

    Attributes:
        place: position of its shard after it.
        account: of the windows that start with it; None in the middle of one.
    """

    place: Place
    account: Account | None = None


class TrainingStream(IterableDataset):
    """An endless stream of this process's training sequences; each worker yields those of its shard.

    A sequence has `input_ids` and `labels` (T,) int32, `seq_lengths` (documents,) if packed, and its `Step`.

    Args:
        tokenizer: with its chat template set.
        rank: of this process.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, keys: DataKeys, plan: StreamPlan, rank: int = 0) -> None:
        # A copy, because other code may turn on padding or truncation.
        self._tokenizer = copy.deepcopy(tokenizer)
        self.keys, self.plan, self._rank = keys, plan, rank
        self._places: dict[int, Place] = {}
        self._first_worker = 0

    @property
    def is_packed(self) -> bool:
        """Whether sequences hold several documents."""
        return self.plan.packing is not None

    def identity(self) -> dict[str, Any]:
        """Returns what a resumed run must share with the earlier one, by the names of
        `sft.checkpoint.compatibility.ResumeFingerprint`."""
        keys = self.keys
        parts = {
            "keys": [keys.system_prompt, keys.max_seq_length, keys.truncation, keys.special_tokens_in_content],
            "plan": [self.plan.packing, self.plan.seed, self.plan.shuffle, self.plan.weights],
            "sources": [_identity(source) for source in self.plan.sources],
            "tokenizer": [self._tokenizer.backend_tokenizer.to_str(), self._tokenizer.chat_template],
        }
        return {
            "dataloader_num_workers": self.plan.workers,
            "streaming_window": keys.streaming_window,
            "streamed_data": cache_key(parts, []),
        }

    def owns(self, shard: int) -> bool:
        """Whether a shard belongs to this process."""
        return shard // self.plan.workers == self._rank

    def start_from(self, places: Mapping[int, Place], batches: int) -> None:
        """Sets where the next iteration starts.

        Args:
            places: of the shards; a missing one starts with its first row.
            batches: number of batches that this process has trained. Loaders take batches from their workers in turn,
                so the first worker must read the shard whose turn it is.
        """
        self._places, self._first_worker = dict(places), batches % self.plan.workers

    def __iter__(self) -> Iterator[dict[str, Any]]:
        worker = get_worker_info()
        workers = worker.num_workers if worker else 1
        assert workers == self.plan.workers, f"the stream was planned for {self.plan.workers} workers, not {workers}"
        number = ((worker.id if worker else 0) + self._first_worker) % workers
        shard = self._rank * workers + number
        try:
            yield from self.read_shard(self._places.get(shard) or self.start_of(shard))
        except UserError as error:
            yield {PROBLEMS: error.problems}  # the loader would turn it into one text with the worker's traceback

    def head(self, rows: int, on_rows: Callable[[int], None] = lambda _: None) -> Account:
        """Returns the account of the first `rows` rows of all shards, without moving the stream."""
        plan = self.plan
        reader = ShardReader(plan.sources, plan.weights, Shard(0, 1), (Cursor(),) * len(plan.sources), 0)
        encoder = RowEncoder(self._tokenizer, self.keys, on_rows)
        head = list(islice(reader.read_epoch(), rows))
        _, ledgers = build_window(head, encoder, plan, self.keys.max_seq_length, rng=None)
        return Account(ledgers, end_token_ids=encoder.end_token_ids, ends_epoch=reader.epoch > 0)

    def start_of(self, shard: int) -> Place:
        """Returns the place before the first row of a shard."""
        return Place(shard, 0, 0, 0, (Cursor(),) * len(self.plan.sources))

    def read_shard(self, place: Place) -> Iterator[dict[str, Any]]:
        """Yields the sequences of one shard after `place`, without end.

        Raises:
            UserError: the shard has no rows, or none of them can be trained.
        """
        first, account = place.row, Account()
        is_empty_epoch = place.row == 0 and place.window == 0
        for start, window, window_account in _prefetch(self._build_windows(place)):
            if first == 0:  # else it was yielded with the sequences before `place`
                account.add(window_account)
            for row in range(first, len(window)):
                after = Place(start.shard, start.epoch, start.window, row + 1, start.cursors)
                yield {**window.sequence(row), STEP: Step(after, account if account.has_news else None)}
                account, is_empty_epoch = Account(), False
            first = 0
            if window_account.ends_epoch:
                if is_empty_epoch:
                    require_enough_rows(self.keys, as_document(account.ledgers))
                    raise too_few_rows(self.plan.sources[0], self.plan.shards)
                is_empty_epoch = True

    def _build_windows(self, place: Place) -> Iterator[tuple[Place, StreamWindow, Account]]:
        plan, keys = self.plan, self.keys
        shard = Shard(place.shard, plan.shards)
        reader = ShardReader(plan.sources, plan.weights, shard, place.cursors, place.epoch)
        encoder = RowEncoder(self._tokenizer, keys)
        epoch, number = place.epoch, place.window
        while True:
            start = Place(place.shard, epoch, number, 0, reader.cursors)
            rows = list(islice(reader.read_epoch(), keys.streaming_window))
            rng = np.random.default_rng([plan.seed, place.shard, epoch, number]) if plan.shuffle else None
            window, ledgers = build_window(rows, encoder, plan, keys.max_seq_length, rng)
            ends_epoch = reader.epoch > epoch
            again = Counter(plan.sources[read.source].name for read in rows if not read.is_new)
            yield start, window, Account(ledgers, again, list(encoder.end_token_ids), ends_epoch)
            epoch, number = (reader.epoch, 0) if ends_epoch else (epoch, number + 1)


def _identity(source: DataSource) -> list[Any]:
    """Identifies a source by the names and sizes of its files: reading their bytes would take too long."""
    files = [(file.name, file.stat().st_size) for file in source.files]
    content = [source.format, source.columns, source.train_on, source.max_samples]
    return [source.name, files, source.hub, source.hub_config, source.split, *content]


def _prefetch(items: Iterator[Item]) -> Iterator[Item]:
    """Yields the same items, each made in another thread while the previous one is used."""
    with ThreadPoolExecutor(1) as executor:
        following = executor.submit(next, items, None)
        while (item := following.result()) is not None:
            following = executor.submit(next, items, None)
            yield item
