"""A stream yields each row once per epoch, in an order that a resumed stream continues exactly."""

from __future__ import annotations

import gc
import json
import pickle
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from functools import cache
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerBase

from sft.checkpoint import stream_state
from sft.checkpoint.stream_state import StreamProgress
from sft.config.schema import DataKeys
from sft.data.documents import IGNORE_INDEX
from sft.data.encoding.row_encoder import RowEncoder, Seen
from sft.data.ledger import Ledger, as_document, as_state, from_state
from sft.data.loading.collator import Collator
from sft.data.sources.dataset_source import DataSource, training_sources
from sft.data.sources.row import Row
from sft.data.streaming.stream import STEP, Account, Place, TrainingStream
from sft.data.streaming.stream_loader import StreamLoader
from sft.data.streaming.window import StreamPlan, StreamWindow
from sft.errors import UserError
from tests.builders import byte_level_tokenizer
from tests.runs import arithmetic, write_rows

Tokens = tuple[int, ...]


@cache
def tokenizer() -> PreTrainedTokenizerBase:
    return byte_level_tokenizer()


def stream_of(
    *files: Path,
    packing: str | None = "bfd",
    window: int = 7,
    weights: tuple[float, ...] | None = None,
    rank: int = 0,
    keys: dict[str, Any] | None = None,
    **plan: Any,
) -> TrainingStream:
    named = {"train_file": str(files[0])} if len(files) == 1 else {"datasets": [{"path": str(f)} for f in files]}
    data = DataKeys(**{"max_seq_length": 128, "streaming": True, "streaming_window": window, **named, **(keys or {})})
    return TrainingStream(
        tokenizer(), data, StreamPlan(tuple(training_sources(data)), weights, packing, seed=3, **plan), rank
    )


def shard_rows(stream: TrainingStream, shard: int, place: Place | None = None) -> Iterator[dict[str, Any]]:
    return stream.read_shard(place or stream.start_of(shard))


def one_epoch(stream: TrainingStream, shard: int, epoch: int = 0) -> tuple[list[dict[str, Any]], Account]:
    """The sequences of a shard's epoch, and the account of all epochs up to it."""
    rows, account = [], Account()
    for row in shard_rows(stream, shard):
        if row[STEP].place.epoch > epoch:
            break
        account.add(row[STEP].account or Account())
        if row[STEP].place.epoch == epoch:
            rows.append(row)
    return rows, account


def documents_of(row: dict[str, Any]) -> list[tuple[Tokens, Tokens]]:
    cuts = np.cumsum(row.get("seq_lengths", []), dtype=int)[:-1]
    ids, labels = np.split(row["input_ids"], cuts), np.split(row["labels"], cuts)
    return [(tuple(i.tolist()), tuple(n.tolist())) for i, n in zip(ids, labels, strict=True)]


def prepared(file: Path, **keys: Any) -> tuple[Counter[tuple[Tokens, Tokens]], Ledger]:
    """The same rows, encoded without a stream."""
    data = DataKeys(train_file=str(file), **{"max_seq_length": 128, **keys})
    (source,) = training_sources(data)
    ledger = Ledger()
    encoded = RowEncoder(tokenizer(), data).encode(source.rows(), source, ledger, Seen(set(), set()))
    return Counter((tuple(i.tolist()), tuple(n.tolist())) for part in encoded for i, n in part), ledger


def plain(row: dict[str, Any]) -> dict[str, Any]:
    return {name: value.tolist() if isinstance(value, np.ndarray) else value for name, value in row.items()}


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """50 rows, of which the rows 11 and 30 are lost."""
    rows: list[dict[str, Any]] = list(arithmetic(50))
    rows[11], rows[30] = {"question": "Why?", "answer": ""}, {"nothing": 1}
    return write_rows(tmp_path_factory.mktemp("rows") / "a.jsonl", rows)


@pytest.fixture(scope="module")
def small_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """9 other rows."""
    return write_rows(tmp_path_factory.mktemp("rows") / "b.jsonl", arithmetic(9, start=500))


@given(
    at=st.integers(0, 120),
    packing=st.sampled_from(["bfd", "wrapped", None]),
    window=st.sampled_from([3, 7, 1000]),
    shards=st.integers(1, 3),
    weights=st.sampled_from([None, (1.0, 3.0)]),
)
@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_a_stream_resumed_at_any_sequence_continues_exactly(
    file: Path, small_file: Path, at: int, packing: str | None, window: int, shards: int, weights: Any
) -> None:
    def stream() -> TrainingStream:
        return stream_of(file, small_file, packing=packing, window=window, weights=weights, world_size=shards)

    shard = shards - 1
    whole = list(islice(shard_rows(stream(), shard), at + 40))
    saved = pickle.loads(pickle.dumps(whole[at][STEP].place))
    rest = list(islice(shard_rows(stream(), shard, saved), 39))
    assert [plain(row) for row in rest] == [plain(row) for row in whole[at + 1 :]]


@pytest.mark.parametrize("packing", ["bfd", None])
@pytest.mark.parametrize(("world_size", "workers"), [(1, 1), (1, 3), (2, 2)])
def test_an_epoch_of_all_shards_together_is_every_row_once(
    file: Path, packing: str | None, world_size: int, workers: int
) -> None:
    expected, ledger = prepared(file)
    streams = [
        stream_of(file, packing=packing, rank=rank, world_size=world_size, workers=workers)
        for rank in range(world_size)
    ]
    total, account = Counter[tuple[Tokens, Tokens]](), Account()
    for shard in range(world_size * workers):
        rows, one = one_epoch(streams[shard // workers], shard, epoch=0)
        total.update(document for row in rows for document in documents_of(row))
        account.add(one)
    assert total == expected
    (streamed,) = account.ledgers.values()
    assert streamed.rows_read == streamed.rows_trained + streamed.rows_lost.total() == 50
    assert streamed.packed_capacity == 128 * streamed.packed_rows
    assert (streamed.packed_rows > 0) == (packing is not None)
    assert streamed.packed_tokens == (streamed.tokens if packing else 0)
    streamed.packed_rows = streamed.packed_capacity = streamed.packed_tokens = 0
    streamed.lost_examples.sort(key=lambda e: e["line"])
    assert streamed == ledger
    assert streamed.rows_lost == {"empty_answer": 1, "bad_schema": 1}


def test_rows_that_are_read_again_are_not_counted_again(file: Path) -> None:
    _, account = one_epoch(stream_of(file), 0, epoch=2)
    assert account.ledgers["train"].rows_read == 50
    assert account.again == {"train": 100}


def test_sequences_that_two_data_sets_share_are_counted_once(file: Path, small_file: Path) -> None:
    rows, account = one_epoch(stream_of(file, small_file, packing="bfd", window=20), 0)
    tokens = sum(len(row["input_ids"]) for row in rows)
    packing = as_document(account.ledgers)["total"]["packing"]
    assert packing == {"rows": len(rows), "fill": round(tokens / (128 * len(rows)), 6)}


def test_rows_that_are_read_again_do_not_count_in_the_packing(file: Path, small_file: Path) -> None:
    rows, account = one_epoch(stream_of(file, small_file, packing="bfd", window=1000, weights=(1.0, 1.0)), 0)
    fill = sum(len(row["input_ids"]) for row in rows) / (128 * len(rows))
    new = sum(ledger.tokens for ledger in account.ledgers.values())
    assert new < sum(len(row["input_ids"]) for row in rows)
    packing = as_document(account.ledgers)["total"]["packing"]
    assert packing["rows"] == round(new / fill / 128) < len(rows)
    assert abs(packing["fill"] - fill) < 1e-3


def test_a_wrapped_stream_is_cut_within_its_windows_and_the_ledger_subtracts_cut_labels(file: Path) -> None:
    rows, account = one_epoch(stream_of(file, packing="wrapped", window=20, shuffle=False), 0)
    expected, ledger = prepared(file)
    assert [t for row in rows for t in row["input_ids"].tolist()] == [t for ids, _ in expected for t in ids]
    assert [len(row["input_ids"]) for row in rows].count(128) == len(rows) - 3  # the last of each window is shorter
    trained = sum(int((row["labels"] != IGNORE_INDEX).sum()) for row in rows)
    assert account.ledgers["train"].tokens_trained == trained < ledger.tokens_trained


def test_each_epoch_and_window_has_an_order_of_its_own(file: Path) -> None:
    stream = stream_of(file, window=20)
    orders = [[documents_of(row) for row in one_epoch(stream, 0, epoch)[0]] for epoch in (0, 1)]
    assert orders[0] != orders[1]
    assert sorted(orders[0]) == sorted(orders[1])
    shuffled = [plain(row)["input_ids"] for row in one_epoch(stream_of(file, window=20, packing=None), 0)[0]]
    in_order = [list(ids) for ids, _ in prepared(file)[0]]
    assert shuffled[:19] != in_order[:19]
    assert sorted(shuffled[:19]) == sorted(in_order[:19])  # row 11 is lost: the first window of 20 has 19


def test_without_shuffling_the_sources_take_turns(file: Path, small_file: Path) -> None:
    stream = stream_of(file, small_file, packing=None, shuffle=False, window=1000)
    first = [plain(row)["input_ids"] for row in one_epoch(stream, 0)[0]]
    a, b = ([list(ids) for ids, _ in prepared(f)[0]] for f in (file, small_file))
    assert first[:4] == [a[0], b[0], a[1], b[1]]
    assert len(first) == 48 + 9
    assert first[-3:] == a[-3:]


def test_weights_are_shares_of_the_rows_and_a_small_set_is_repeated(file: Path, small_file: Path) -> None:
    stream = stream_of(file, small_file, packing=None, shuffle=False, window=8, weights=(1.0, 3.0))
    rows, account = one_epoch(stream, 0)
    small = {ids for ids, _ in prepared(small_file)[0]}
    from_small = [tuple(row["input_ids"].tolist()) in small for row in rows]
    assert [sum(from_small[at : at + 4]) for at in range(0, 40, 4)] == [3] * 10
    assert account.ledgers["a"].rows_read == 50  # the epoch ends when the slower set is finished
    assert account.ledgers["b"].rows_read == 9
    assert account.again == {"b": 151 - 9}  # one more than 3 · 50: the end of a is found at its 51st turn
    later, _ = one_epoch(stream, 0, epoch=1)
    assert tuple(later[0]["input_ids"].tolist()) not in small  # the second epoch continues the first: no set restarts


def test_rows_that_are_in_validation_are_counted(file: Path) -> None:
    data = DataKeys(train_file=str(file), max_seq_length=128)
    (source,) = training_sources(data)
    seen = Seen(set())
    list(RowEncoder(tokenizer(), data).encode(islice(source.rows(), 5), source, Ledger(), seen))
    _, account = one_epoch(stream_of(file, known=seen.earlier), 0)
    assert account.ledgers["train"].in_validation == 5
    assert account.ledgers["train"].rows_trained == 48


def batches(stream: TrainingStream, workers: int, count: int, size: int = 2) -> list[dict[str, Any]]:
    return list(islice(StreamLoader(stream, Collator(0), size, num_workers=workers), count))


@pytest.mark.parametrize("workers", [0, 2])
def test_workers_take_turns_and_a_resumed_loader_continues_with_the_right_one(file: Path, workers: int) -> None:
    def stream() -> TrainingStream:
        return stream_of(file, rank=1, world_size=2, workers=max(1, workers))

    def shown(found: list[dict[str, Any]]) -> list[Any]:
        return [(batch["input_ids"].tolist(), batch[STEP].place, batch[STEP].account) for batch in found]

    whole = batches(stream(), workers, 17)
    shards = [batch[STEP].place.shard for batch in whole]
    assert shards == ([2, 3] * 9)[:17] if workers else [1] * 17
    for number in set(shards):
        alone = islice(shard_rows(stream(), number), 8)
        expected = [row["input_ids"].tolist() for row in alone]
        given = [b for b in whole if b[STEP].place.shard == number][:4]
        assert [
            r[: len(e)] for r, e in zip((r for b in given for r in b["input_ids"].tolist()), expected, strict=True)
        ] == expected
    for at in (3, 8):
        resumed = stream()
        resumed.start_from({batch[STEP].place.shard: batch[STEP].place for batch in whole[:at]}, at)
        assert shown(batches(resumed, workers, 17 - at)) == shown(whole[at:])


def test_a_shard_without_rows_is_an_error(small_file: Path) -> None:
    with pytest.raises(UserError, match="fewer rows than the 10 shards"):
        next(shard_rows(stream_of(small_file, world_size=10), 9))
    assert next(shard_rows(stream_of(small_file, world_size=9), 8))


def test_a_set_without_rows_for_a_shard_is_an_error_only_if_it_has_a_weight(file: Path, small_file: Path) -> None:
    with pytest.raises(UserError, match="'b' has fewer rows"):
        list(islice(shard_rows(stream_of(file, small_file, world_size=10, weights=(1.0, 1.0)), 9), 20))
    rows, _ = one_epoch(stream_of(file, small_file, packing=None, world_size=10), 9)
    assert len(rows) == 5


def test_data_without_a_row_to_train_is_an_error(tmp_path: Path) -> None:
    rows = write_rows(tmp_path / "bad.jsonl", [{"question": "Why?", "answer": ""}] * 20)
    with pytest.raises(UserError, match=r"20 of 20 rows of 'train' are lost \(20 empty_answer\)(.*\n)*.*bad.jsonl:1"):
        next(shard_rows(stream_of(rows), 0))


@pytest.mark.parametrize("workers", [0, 1])
def test_an_error_in_the_data_is_a_user_error_without_traceback(tmp_path: Path, workers: int) -> None:
    rows = write_rows(tmp_path / "long.jsonl", [*arithmetic(30), {"question": "Q", "answer": "long " * 500}])
    stream = stream_of(rows, keys={"truncation": "error"})
    with pytest.raises(UserError, match=r"long\.jsonl:31: truncation: \d+ tokens") as error:
        batches(stream, workers, 30)
    assert "Traceback" not in str(error.value)


def test_windows_whose_rows_are_all_lost_are_counted_with_the_next_sequence(tmp_path: Path) -> None:
    rows = arithmetic(9)
    rows[3:6] = [{"question": "Why?", "answer": ""}] * 3
    stream = stream_of(write_rows(tmp_path / "a.jsonl", rows), window=3)
    given, account = one_epoch(stream, 0)
    accounts = [row[STEP].account for row in given if row[STEP].account]
    assert [one.ledgers["train"].rows_read for one in accounts] == [3, 6]
    assert account.ledgers["train"].rows_lost == {"empty_answer": 3}


def test_a_ledger_is_restored_from_json(file: Path) -> None:
    _, ledger = prepared(file)
    state = json.loads(json.dumps(as_state(ledger)))
    assert from_state(state) == ledger
    assert from_state({**state, "seam_merges": 3}) == ledger, "a count that older checkpoints hold"


def progress_of(stream: TrainingStream) -> StreamProgress:
    return StreamProgress(stream, [7], {"validation": Ledger(rows_read=3, rows_trained=3)})


def test_progress_is_saved_and_restored(file: Path, tmp_path: Path) -> None:
    stream = stream_of(file, workers=2)
    whole = batches(stream, 2, 12)
    progress = progress_of(stream)
    for batch in whole[:7]:
        progress.consume(batch[STEP])
    stream_state.save(tmp_path, progress.gather())
    resumed = progress_of(stream_of(file, workers=2))
    resumed.load(tmp_path)
    assert resumed.account == progress.account
    rest = batches(resumed.stream, 2, 5)
    assert [b["input_ids"].tolist() for b in rest] == [b["input_ids"].tolist() for b in whole[7:]]
    for batch in rest:
        resumed.consume(batch[STEP])
        progress.consume(batch[STEP])
    resumed.rewind()  # as for a smaller batch, after the first did not fit
    assert resumed.batches == 7
    for batch in whole[7:]:
        resumed.consume(batch[STEP])
    document = resumed.document(resumed.gather())
    assert document == progress.document(progress.gather())
    assert list(document["datasets"]) == ["train", "validation"]
    assert document["total"]["rows_read"] == document["datasets"]["train"]["rows_read"] + 3


def test_too_many_lost_rows_stop_the_run_at_the_end_of_the_epoch(tmp_path: Path) -> None:
    rows = arithmetic(40)
    rows[0] = rows[25] = rows[39] = {"question": "Why?", "answer": ""}
    stream = stream_of(write_rows(tmp_path / "a.jsonl", rows), window=10)
    steps = [row[STEP] for row in one_epoch(stream, 0, epoch=0)[0]]
    progress = progress_of(stream)
    steps.append(next(islice(shard_rows(stream, 0), len(steps), None))[STEP])  # of the next epoch
    with pytest.raises(UserError, match=r"3 of 40 rows of 'train' are lost(.*\n)*.*a.jsonl:1: empty_answer"):
        list(map(progress.consume, steps))
    assert progress.batches > 10


def test_a_checkpoint_without_a_stream_is_refused(file: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="cannot resume from"):
        progress_of(stream_of(file)).load(tmp_path)


def test_streams_that_differ_have_different_identities(file: Path, small_file: Path) -> None:
    first = stream_of(file).identity()
    assert stream_of(file).identity() == first
    assert first["streaming_window"] == 7
    others = [
        stream_of(small_file),
        stream_of(file, packing=None),
        stream_of(file, keys={"max_seq_length": 64}),
        stream_of(file, keys={"train_on": "all"}),
    ]
    assert len({str(one.identity()) for one in [stream_of(file), *others]}) == 5


class CountingSource(DataSource):
    """A source that counts the rows read from it."""

    read = 0

    def rows(self, wanted: Any = None) -> Iterator[Row]:
        for row in super().rows(wanted):
            CountingSource.read += 1
            yield row


def windows() -> list[StreamWindow]:
    return [found for found in gc.get_objects() if isinstance(found, StreamWindow)]


def test_a_stream_holds_two_windows_and_reads_one_ahead(tmp_path: Path) -> None:
    """So memory does not grow with the data."""
    stream = stream_of(write_rows(tmp_path / "a.jsonl", arithmetic(200)), window=20)
    (source,) = stream.plan.sources
    stream.plan = replace(stream.plan, sources=(CountingSource(**vars(source)),))
    others, CountingSource.read = windows(), 0
    held: dict[int, int] = {}
    for row in shard_rows(stream, 0):
        place = row[STEP].place
        if place.epoch:
            break
        assert CountingSource.read <= 20 * (place.window + 2)
        if place.window not in held:
            held[place.window] = sum(all(one is not other for other in others) for one in windows())
    assert len(held) == 10
    assert max(held.values()) <= 2
