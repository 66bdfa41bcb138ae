"""Training rows of data that is larger than memory or disk, made while the model trains.

    sources → shards, one for each process and worker → windows of rows → documents → packed and shuffled rows

Whatever a shard gives is a function of the seed and of its `Place`, which says where in which window it stands. The
places travel with the batches, so the trainer knows those of the rows it has trained, however far the workers have
read ahead; a stream that starts from them goes on with the very next row.
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
from sft.data.streaming.window import StreamWindow, build_window
from sft.errors import UserError

STEP = "stream"  # the batch's entry that says where the stream stands behind it
PROBLEMS = "problems"  # stands in a row's place for what a worker found wrong with the data
Item = TypeVar("Item")


@dataclass(frozen=True, slots=True)
class Place:
    """Where a shard stands: in front of row `row` of a window.

    Attributes:
        shard: its number among all shards.
        epoch: how often it has read all of its rows.
        window: the window's number in the epoch.
        row: rows of the window that have been given.
        cursors: how far each source had been read in front of the window.
    """

    shard: int
    epoch: int
    window: int
    row: int
    cursors: tuple[Cursor, ...]


@dataclass(slots=True)
class Account:
    """What became of the rows that were read since the last account.

    Attributes:
        ledgers: by the names of the data sets; rows that are read again are not in it.
        again: rows of each data set that were read again.
        end_token_ids: the tokens that end the answers among them.
        ends_epoch: whether the shard has come to the end of its rows.
    """

    ledgers: dict[str, Ledger] = field(default_factory=dict)
    again: Counter[str] = field(default_factory=Counter)
    end_token_ids: list[int] = field(default_factory=list)
    ends_epoch: bool = False

    def add(self, other: Account) -> None:
        """Takes in a later account."""
        for name, ledger in other.ledgers.items():
            self.ledgers.setdefault(name, Ledger()).merge(ledger)
        self.again += other.again
        self.end_token_ids += [t for t in other.end_token_ids if t not in self.end_token_ids]
        self.ends_epoch |= other.ends_epoch

    @property
    def has_news(self) -> bool:
        """Whether it says anything."""
        return bool(self.ledgers or self.again) or self.ends_epoch


@dataclass(frozen=True, slots=True)
class Step:
    """What training on a row, or on a batch, means for the stream.

    Attributes:
        place: where its shard stands behind it.
        account: of the windows that begin with it; None in the middle of one.
    """

    place: Place
    account: Account | None = None


@dataclass(frozen=True)
class StreamPlan:
    """What is streamed, and how.

    Attributes:
        sources: the data sets.
        weights: their shares of the rows, in proportion; None takes each row once an epoch.
        packing: `bfd`, `wrapped`, or None for one document a row.
        seed: of the order of rows.
        shuffle: whether the rows of a window are shuffled.
        known: fingerprints of the validation rows.
        world_size: processes that train together.
        workers: processes that each of them has for its data; at least 1, for itself.
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
        """Parts that each source is read in."""
        return self.world_size * self.workers


class TrainingStream(IterableDataset):
    """An endless stream of this process's training rows, in each of its workers that worker's part.

    A row has `input_ids` and `labels` (T,) int32, `seq_lengths` (documents,) where it is packed, and its `Step`.

    Args:
        tokenizer: with its chat template set.
        rank: of this process.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, keys: DataKeys, plan: StreamPlan, rank: int = 0) -> None:
        # A copy: whoever uses the other may have set it to pad or to cut.
        self._tokenizer = copy.deepcopy(tokenizer)
        self.keys, self.plan, self._rank = keys, plan, rank
        self._places: dict[int, Place] = {}
        self._first_worker = 0

    @property
    def is_packed(self) -> bool:
        """Whether rows hold several documents."""
        return self.plan.packing is not None

    def identity(self) -> dict[str, Any]:
        """What a run that goes on from another must have in common with it, as
        `sft.checkpoint.compatibility.ResumeFingerprint` names it."""
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
        """Whether a shard is one of this process's."""
        return shard // self.plan.workers == self._rank

    def start_from(self, places: Mapping[int, Place], batches: int) -> None:
        """Chooses where the next iteration begins.

        Args:
            places: of the shards; one that is missing begins with its first row.
            batches: that this process has trained. Loaders take batches from their workers in turn, so the first
                worker plays the one whose turn it is.
        """
        self._places, self._first_worker = dict(places), batches % self.plan.workers

    def __iter__(self) -> Iterator[dict[str, Any]]:
        worker = get_worker_info()
        workers = worker.num_workers if worker else 1
        assert workers == self.plan.workers, f"the stream was planned for {self.plan.workers} workers, not {workers}"
        number = ((worker.id if worker else 0) + self._first_worker) % workers
        shard = self._rank * workers + number
        try:
            yield from self.shard_rows(self._places.get(shard) or self.start_of(shard))
        except UserError as error:
            yield {PROBLEMS: error.problems}  # a worker's loader would make one text of it, with the traceback

    def head(self, rows: int, on_rows: Callable[[int], None] = lambda _: None) -> Account:
        """What becomes of the first `rows` rows, of all shards; the stream stays where it is."""
        plan = self.plan
        reader = ShardReader(plan.sources, plan.weights, Shard(0, 1), (Cursor(),) * len(plan.sources), 0)
        encoder = RowEncoder(self._tokenizer, self.keys, on_rows)
        taken = list(islice(reader.rest_of_epoch(), rows))
        _, ledgers = build_window(
            taken, encoder, plan.sources, plan.packing, self.keys.max_seq_length, plan.known, rng=None
        )
        return Account(ledgers, end_token_ids=encoder.end_token_ids, ends_epoch=reader.epoch > 0)

    def start_of(self, shard: int) -> Place:
        """The place in front of all rows of a shard."""
        return Place(shard, 0, 0, 0, (Cursor(),) * len(self.plan.sources))

    def shard_rows(self, place: Place) -> Iterator[dict[str, Any]]:
        """The rows of one shard behind `place`, without end.

        Raises:
            UserError: the shard has no rows, or an epoch without any that can be trained.
        """
        first, account = place.row, Account()
        is_barren = place.row == 0 and place.window == 0
        for start, window, window_account in _ahead(self._windows(place)):
            if first == 0:  # else it was given with the rows before `place`
                account.add(window_account)
            for row in range(first, len(window)):
                behind = Place(start.shard, start.epoch, start.window, row + 1, start.cursors)
                yield {**window.row(row), STEP: Step(behind, account if account.has_news else None)}
                account, is_barren = Account(), False
            first = 0
            if window_account.ends_epoch:
                if is_barren:
                    self._fail(account)
                is_barren = True

    def _fail(self, account: Account) -> None:
        require_enough_rows(self.keys, as_document(account.ledgers))
        raise too_few_rows(self.plan.sources[0], self.plan.shards)

    def _windows(self, place: Place) -> Iterator[tuple[Place, StreamWindow, Account]]:
        plan, keys = self.plan, self.keys
        shard = Shard(place.shard, plan.shards)
        reader = ShardReader(plan.sources, plan.weights, shard, place.cursors, place.epoch)
        encoder = RowEncoder(self._tokenizer, keys)
        epoch, number = place.epoch, place.window
        while True:
            start = Place(place.shard, epoch, number, 0, reader.cursors)
            rows = list(islice(reader.rest_of_epoch(), keys.streaming_window))
            rng = np.random.default_rng([plan.seed, place.shard, epoch, number]) if plan.shuffle else None
            window, ledgers = build_window(
                rows, encoder, plan.sources, plan.packing, keys.max_seq_length, plan.known, rng
            )
            ends_epoch = reader.epoch > epoch
            again = Counter(plan.sources[taken.source].name for taken in rows if not taken.is_new)
            yield start, window, Account(ledgers, again, list(encoder.end_token_ids), ends_epoch)
            epoch, number = (reader.epoch, 0) if ends_epoch else (epoch, number + 1)


def _identity(source: DataSource) -> list[Any]:
    """A source without its bytes, which would take too long to read: the names and sizes of its files."""
    files = [(file.name, file.stat().st_size) for file in source.files]
    content = [source.format, source.columns, source.train_on, source.max_samples]
    return [source.name, files, source.hub, source.hub_config, source.split, *content]


def _ahead(items: Iterator[Item]) -> Iterator[Item]:
    """The same, each made in another thread while the one before is used."""
    with ThreadPoolExecutor(1) as executor:
        following = executor.submit(next, items, None)
        while (item := following.result()) is not None:
            following = executor.submit(next, items, None)
            yield item
