"""The data stage: from files to token data sets, with an account of every row.

    files → rows → conversations → text with trained spans → input_ids and labels → fitted → mixed → packed → cached

`prepare_data` runs it all (once per machine, see `sft.data.preparation.cache`); `preview` shows what it does to the
first rows.
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

# torch and datasets take 230 MiB and 1.6 s, and nothing here needs them while rows are prepared: checking data, looking
# at it and preparing it do without.
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

_HEAD = 1000  # rows of a stream that are looked at before training


@dataclass(frozen=True)
class PreparedData:
    """What the trainer needs of the data.

    Attributes:
        train: rows of `input_ids` and `labels`; packed rows also have `seq_lengths`. Or a stream of them.
        evals: evaluation sets by name, in the same form.
        train_tokens: tokens of `train`; None of a stream.
        ledger: SPEC's LEDGER document; of a stream, that of its first rows.
        end_token_ids: the tokens that end the trained answers, in the order of first use.
        sample: the preview of the first row that is not lost; None when only evaluation sets were prepared.
        from_cache: whether an earlier preparation was found.
        packing: what `packing: auto` chose for the training rows, in words; empty where it was not asked.
        eval_ledgers: of the evaluation sets.
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
        """Whether `train` is read while training."""
        return self.train_tokens is None

    @property
    def is_packed(self) -> bool:
        """Whether samples share rows."""
        return bool(self.train.is_packed) if self.is_stream else "seq_lengths" in self.train.column_names

    @property
    def train_rows(self) -> int | None:
        """Rows of an epoch; None of a stream."""
        return None if self.is_stream else len(self.train)

    def identity(self) -> dict[str, Any]:
        """What all processes must find alike."""
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
    """Prepares all data sets that `keys` names, or reads an earlier preparation of the same.

    Args:
        keys: the data section of the config.
        tokenizer: with its chat template set.
        seed: what `shuffle_seed: null` stands for.
        training: False prepares the evaluation sets alone.
        auto: what `packing: auto` goes by.
        on_rows: told how many rows have been prepared since it was last told.

    Raises:
        UserError: data that does not exist or cannot be read.
    """
    plan = Preparation(keys, tokenizer, split_seed(keys, seed), training, auto, on_rows)
    folder = cache_root(keys.cache_dir) / plan.key()
    from_cache = make_once(folder, plan.make)
    facts = json.loads((folder / "facts.json").read_text())
    evals = {name: read_rows(folder / file) for name, file in facts["evals"].items()}
    return PreparedData(
        train=read_rows(folder / "train.arrow"),
        evals=evals,
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
    """The training data as a stream, and the evaluation sets prepared as always.

    Args:
        keys, tokenizer, seed, auto, on_rows: as for `prepare_data`.
        order_seed: of the order of training rows (`Config.order_seed`).
        rank, world_size: which process this is, of how many that train together.
        workers: processes that each of them has for its data; at least 1, for itself.
        shuffle: whether the rows of a window are shuffled.
        whole_window: whether the ledger is of the first window's rows, not of the first thousand.

    Raises:
        UserError: data that does not exist or cannot be read.
    """
    from sft.data.streaming.stream import StreamPlan, TrainingStream

    prepared = prepare_data(keys, tokenizer, seed=seed, training=False, auto=auto, on_rows=on_rows)
    sources = training_sources(keys)
    weights = tuple(source.weight for source in sources if source.weight is not None)
    packing = packing_mode(keys.packing)
    if packing == "auto":  # its steps are given, and a window has samples enough
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
    account = stream.head(max(_HEAD, keys.streaming_window) if whole_window else _HEAD, on_rows)
    if not account.ends_epoch:
        read = sum(ledger.rows_read for ledger in account.ledgers.values())
        logger.warning(
            "streaming: the data has been looked at up to row %s; the rest is read while training", f"{read:,}"
        )
    return replace(
        prepared,
        train=stream,
        train_tokens=None,
        ledger=as_document(account.ledgers, prepared.eval_ledgers),
        end_token_ids=tuple(dict.fromkeys([*account.end_token_ids, *prepared.end_token_ids])),
        sample=first_sample(keys, tokenizer, seed=seed),
    )
