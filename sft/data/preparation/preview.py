"""Shows rows one by one in source order, and selects conversations for the serving check and for generation."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Iterator
from itertools import islice
from typing import Any

from transformers import PreTrainedTokenizerBase

from sft.config.schema import DataKeys
from sft.data.documents import IGNORE_INDEX
from sft.data.encoding.encoder import Encoded
from sft.data.encoding.row_encoder import RowEncoder, Sample, Seen
from sft.data.formats.conversation import Conversation, RowLost, Text
from sft.data.formats.normalize import normalize
from sft.data.ledger import Ledger, as_counts, remedy
from sft.data.preparation.selection import held_out_rows
from sft.data.preparation.serving_check import ServingContract, check_prompts, merge_contracts
from sft.data.sources.dataset_source import DataSource, split_seed, training_sources, validation_sources
from sft.data.sources.files import Row
from sft.data.templates.renderer import Rendered
from sft.errors import Problem, UserError

logger = logging.getLogger("sft")


def preview(
    keys: DataKeys, tokenizer: PreTrainedTokenizerBase, num_samples: int, *, seed: int
) -> Iterator[dict[str, Any]]:
    """Yields the samples of the first rows in source order (training sources first), before truncation and packing.

    A row whose answers are trained one by one (its template rewrites earlier turns) is several samples. Lost rows are
    skipped and logged, the first ones of each reason with file and line.

    Raises:
        UserError: samples are asked for, and no row gives one.
    """
    ledger, logged, is_shown = Ledger(), 0, False
    for sample in _samples(keys, tokenizer, num_samples, seed, ledger):
        logged, is_shown = _log_lost(ledger, logged), True
        yield sample
    _log_lost(ledger, logged)
    named = Counter(lost["reason"] for lost in ledger.lost_examples)
    besides = ledger.rows_lost - named
    if besides:
        logger.warning("rows lost besides these: %s", as_counts(besides))
    if num_samples and not is_shown:
        reasons = as_counts(dict(ledger.rows_lost.most_common()))
        summary = f"none of {ledger.rows_read:,} rows can be trained ({reasons})"
        raise UserError(Problem(summary, remedy(ledger.rows_lost)))


def first_sample(keys: DataKeys, tokenizer: PreTrainedTokenizerBase, *, seed: int) -> dict[str, Any] | None:
    """Returns the first sample of `preview`, or None. Lost rows before it are in the ledger of the data."""
    return next(_samples(keys, tokenizer, 1, seed, Ledger()), None)


def _samples(
    keys: DataKeys, tokenizer: PreTrainedTokenizerBase, most: int, seed: int, ledger: Ledger
) -> Iterator[dict[str, Any]]:
    seed = split_seed(keys, seed)
    encoder = RowEncoder(tokenizer, keys)
    shown = 0
    for split, source, row in _rows_with_split(keys, seed):
        if shown >= most:
            return
        for sample in encoder.render([row], source, ledger):
            shown += 1
            for part, encoded in zip(sample.parts, encoder.encode_parts(sample), strict=True):
                yield _as_preview(split, sample, part, encoded, tokenizer)


def _log_lost(ledger: Ledger, logged: int) -> int:
    """Logs the lost rows that the ledger names after the first `logged`. Returns the new number."""
    for lost in ledger.lost_examples[logged:]:
        logger.warning("%s:%s: lost: %s: %s", lost["file"], lost["line"], lost["reason"], lost["message"])
    return len(ledger.lost_examples)


def _as_preview(
    split: str, sample: Sample, part: Rendered, encoded: Encoded, tokenizer: PreTrainedTokenizerBase
) -> dict[str, Any]:
    content = sample.content
    what = {"text": content.text} if isinstance(content, Text) else {"messages": content.messages}
    trained = encoded.labels[encoded.labels != IGNORE_INDEX]
    return {
        "split": split,
        "file": sample.row.file,
        "row": sample.row.index,
        "format": content.format,
        **what,
        "rendered": part.text,
        "input_ids": encoded.input_ids.tolist(),
        "labels": encoded.labels.tolist(),
        "trained_text": tokenizer.decode(trained.tolist(), clean_up_tokenization_spaces=False),
    }


def serving_contract(keys: DataKeys, tokenizer: PreTrainedTokenizerBase, *, limit: int = 32) -> ServingContract:
    """Compares the prompts of the first `limit` rows of each training source with those of a server.

    Lost rows are skipped.
    """
    encoder, contracts = RowEncoder(tokenizer, keys), []
    for source in training_sources(keys):
        samples = encoder.render(islice(source.rows(), limit), source, Ledger())
        chats = [s for s in samples if isinstance(s.content, Conversation)]
        pairs = [(s.content, encoder.encode_parts(s)[0]) for s in chats]
        contracts.append(check_prompts(tokenizer, pairs, source.train_on))  # type: ignore[arg-type]
    return merge_contracts(contracts)


def validation_conversations(
    keys: DataKeys, tokenizer: PreTrainedTokenizerBase, *, seed: int, limit: int
) -> list[Conversation]:
    """Returns at most `limit` validation rows that end with an answer, evenly spaced over all validation sets.

    A row that evaluation loses, e.g. because the chat template refuses it, is replaced by the next one.
    """
    found: list[tuple[DataSource, Row, Conversation]] = []
    for split, source, row in _rows_with_split(keys, split_seed(keys, seed), training=bool(keys.validation_split)):
        if split == "train" or row.data is None:
            continue
        try:
            content = normalize(row.data, source.format, source.columns, keys.system_prompt)
        except RowLost:
            continue
        if isinstance(content, Conversation) and content.ends_with_answer:
            found.append((source, row, content))
    limit = min(limit, len(found))
    encoder, at = RowEncoder(tokenizer, keys), 0
    picked: list[Conversation] = []
    for number in range(limit):
        at = max(at, number * len(found) // limit)
        while at < len(found) and not _is_kept(encoder, *found[at][:2]):
            at += 1
        picked += [content for _, _, content in found[at : at + 1]]
        at += 1
    return picked


def _is_kept(encoder: RowEncoder, source: DataSource, row: Row) -> bool:
    return any(len(documents) for documents in encoder.encode([row], source, Ledger(), Seen(set())))


def _rows_with_split(keys: DataKeys, seed: int, training: bool = True) -> Iterator[tuple[str, DataSource, Row]]:
    """Yields each row in source order with its split, drawn as the preparation draws it."""
    for number, source in enumerate(training_sources(keys) if training else []):
        held_out = held_out_rows(source, keys.validation_split, seed + number)
        for row in source.rows():
            yield ("validation" if row.index in held_out else "train"), source, row
    for source in validation_sources(keys):
        yield from ((source.name, source, row) for row in source.rows())
