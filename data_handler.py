"""The data stage: turns files into tokenized data sets and accounts for every row in a ledger.

    files → rows → conversations → text with spans → input_ids and labels → truncated → mixed → packed → cached

`prepare_data` runs all of it, once per machine (see `sft.data.preparation.cache`). `stream_data` does so for training
rows while training. `preview` shows the result for the first rows, `require_enough_rows` rejects a ledger with too
many lost rows, `serving_contract` compares training with serving, and `validation_conversations` are for generation.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from transformers import PreTrainedTokenizerBase

from sft.config.schema import DataKeys
from sft.data.ledger import Ledger, as_document, from_state, require_enough_rows
from sft.data.preparation.cache import cache_root, make_once, read_rows
from sft.data.preparation.packing import NEVER, AutoPacking
from sft.data.preparation.prepare import Preparation, packing_mode
from sft.data.preparation.preview import first_sample, preview, serving_contract, validation_conversations
from sft.data.sources.dataset_source import split_seed, training_sources

# Importing torch and datasets takes 230 MiB and 1.6 s; checking, previewing and preparing data need neither.
if TYPE_CHECKING:
    from datasets import Dataset

logger = logging.getLogger("sft")

__all__ = [
    "PreparedData",
    "prepare_data",
    "preview",
    "require_enough_rows",
    "serving_contract",
    "stream_data",
    "validation_conversations",
]

_HEAD_ROWS = 1000  # rows of a stream that are read before training


@dataclass(frozen=True)
class PreparedData:
    """The data that the trainer needs, and the ledger of how it was made.

    Attributes:
        train: samples with `input_ids` and `labels`, packed ones also with `seq_lengths`; or a stream of them.
        evals: evaluation sets by name, in the same form.
        train_tokens: number of tokens in `train`; None for a stream.
        ledger: the ledger document; for a stream, that of its first rows.
        end_token_ids: the tokens that end the answers, in the order of first use.
        sample: the preview of the first row that is not lost; None when only evaluation sets were prepared.
        from_cache: whether an earlier preparation was found.
        packing: describes what `packing: auto` chose for the training rows; empty for other settings.
        eval_ledgers: ledgers of the evaluation sets.
        known: fingerprints of the evaluation sets' rows, in hexadecimal.
    """

    train: Any  # Dataset | TrainingStream
    evals: dict[str, Dataset]
    train_tokens: int | None
    ledger: dict[str, Any]
    end_token_ids: tuple[int, ...]
    sample: dict[str, Any] | None = None
    from_cache: bool = False
    packing: str = ""
    eval_ledgers: dict[str, Ledger] = field(default_factory=dict)
    known: Sequence[str] = ()

    @property
    def is_stream(self) -> bool:
        """Whether `train` is a stream that is read while training."""
        return self.train_tokens is None

    @property
    def is_packed(self) -> bool:
        """Whether the training samples are packed."""
        return bool(self.train.is_packed) if self.is_stream else "seq_lengths" in self.train.column_names

    @property
    def train_rows(self) -> int | None:
        """Samples of an epoch, packed ones counted once; None for a stream."""
        return None if self.is_stream else len(self.train)

    def identity(self) -> dict[str, Any]:
        """Returns what must be equal in all processes."""
        if self.is_stream:
            return dict(self.train.identity())
        return {"training rows": len(self.train), "training tokens": self.train_tokens}


def prepare_data(
    keys: DataKeys,
    tokenizer: PreTrainedTokenizerBase,
    *,
    seed: int,
    training: bool = True,
    auto: AutoPacking = NEVER,
    on_rows: Callable[[int], None] = lambda _: None,
) -> PreparedData:
    """Prepares all data sets that `keys` names, or reads them from the cache.

    Args:
        keys: the data section of the config.
        tokenizer: with its chat template set.
        seed: the run's seed, used for `shuffle_seed: null`.
        training: False prepares only the evaluation sets.
        auto: what `packing: auto` decides by.
        on_rows: called with the number of rows prepared since its last call.

    Raises:
        UserError: data does not exist or cannot be read.
    """
    plan = Preparation(keys, tokenizer, split_seed(keys, seed), training, auto, on_rows)
    folder = cache_root(keys.cache_dir) / plan.key()
    from_cache = make_once(folder, plan.make)
    facts = json.loads((folder / "facts.json").read_text())
    return PreparedData(
        train=read_rows(folder / "train.arrow"),
        evals={name: read_rows(folder / file) for name, file in facts["evals"].items()},
        train_tokens=facts["train_tokens"],
        ledger=facts["ledger"],
        end_token_ids=tuple(facts["end_token_ids"]),
        sample=facts["sample"],
        from_cache=from_cache,
        packing=facts["packing"],
        eval_ledgers={name: from_state(state) for name, state in facts["eval_ledgers"].items()},
        known=facts["known"],
    )


def stream_data(
    keys: DataKeys,
    tokenizer: PreTrainedTokenizerBase,
    *,
    seed: int,
    order_seed: int,
    rank: int = 0,
    world_size: int = 1,
    workers: int = 1,
    shuffle: bool = True,
    whole_window: bool = False,
    auto: AutoPacking = NEVER,
    on_rows: Callable[[int], None] = lambda _: None,
) -> PreparedData:
    """Opens the training data as a stream; the evaluation sets are prepared by `prepare_data`.

    Args:
        keys, tokenizer, seed, auto, on_rows: as for `prepare_data`.
        order_seed: seed of the order of training rows (`Config.order_seed`).
        rank, world_size: this process, and the number of processes that train together.
        workers: data loader processes per rank; 1 if the rank itself loads the data.
        shuffle: whether the rows of a window are shuffled.
        whole_window: whether the ledger covers the first window instead of the first thousand rows.

    Raises:
        UserError: data does not exist or cannot be read.
    """
    from sft.data.streaming.stream import TrainingStream
    from sft.data.streaming.window import StreamPlan

    prepared = prepare_data(keys, tokenizer, seed=seed, training=False, auto=auto, on_rows=on_rows)
    sources = training_sources(keys)
    weights = tuple(source.weight for source in sources if source.weight is not None)
    packing = packing_mode(keys.packing)
    if packing == "auto":  # a stream has a fixed number of steps, and each window enough samples to pack
        packing = None if auto.obstacle else "bfd"
    plan = StreamPlan(
        sources=tuple(sources),
        weights=weights if len(weights) == len(sources) else None,
        packing=packing,
        seed=order_seed,
        shuffle=shuffle,
        known=set(map(bytes.fromhex, prepared.known)),
        world_size=world_size,
        workers=workers,
    )
    stream = TrainingStream(tokenizer, keys, plan, rank)
    account = stream.head(max(_HEAD_ROWS, keys.streaming_window) if whole_window else _HEAD_ROWS, on_rows)
    if not account.ends_epoch:
        read = sum(ledger.rows_read for ledger in account.ledgers.values())
        logger.warning("streaming: checked the first %s rows; the rest is read while training", f"{read:,}")
    return replace(
        prepared,
        train=stream,
        train_tokens=None,
        ledger=as_document(account.ledgers, prepared.eval_ledgers),
        end_token_ids=tuple(dict.fromkeys([*account.end_token_ids, *prepared.end_token_ids])),
        sample=first_sample(keys, tokenizer, seed=seed),
    )
