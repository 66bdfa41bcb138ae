"""The position of a run in its stream: gathered from all ranks, saved with each checkpoint, restored on resume."""

from __future__ import annotations

import json
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from itertools import count
from pathlib import Path
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from sft.checkpoint.discovery import STREAM_STATE
from sft.data.ledger import MAX_EXAMPLES, Ledger, as_document, as_state, from_state, require_enough_rows
from sft.data.streaming.shard_reader import Cursor
from sft.data.streaming.stream import Account, Place, Step, TrainingStream
from sft.distributed.collectives import gather_objects
from sft.errors import Problem, UserError

_ENOUGH_TO_JUDGE = 1000  # rows; with fewer, a few bad ones at the start would be a large share


class StreamProgress(TrainerCallback):
    """Tracks what this rank has trained of its stream. After a resume rank 0 continues the account of all ranks.

    Args:
        stream: the training rows.
        end_token_ids: those that are known before the first row is read.
        evals: ledgers of the evaluation sets.

    Attributes:
        places: the position of each shard after the rows that were trained.
        batches: the number that this rank has trained.
        account: of the rows that were read for them.
    """

    def __init__(self, stream: TrainingStream, end_token_ids: Sequence[int], evals: Mapping[str, Ledger]) -> None:
        self.stream, self._evals = stream, evals
        self._end_token_ids = list(end_token_ids)
        self._loaded: dict[str, Any] | None = None
        self.rewind()

    def rewind(self) -> None:
        """Restarts the stream at the loaded state, or at the beginning."""
        self.places: dict[int, Place] = {}
        self.batches, self.account = 0, Account(end_token_ids=list(self._end_token_ids))
        if self._loaded is not None:
            for entry in self._loaded["places"]:
                place = Place(**{**entry, "cursors": tuple(Cursor(**cursor) for cursor in entry["cursors"])})
                if self.stream.owns(place.shard):
                    self.places[place.shard] = place
            self.batches = self._loaded["batches"]
            account = account_in(self._loaded)
            self.account = account if self.stream.owns(0) else Account(end_token_ids=account.end_token_ids)
        self.stream.start_from(self.places, self.batches)

    def consume(self, step: Step) -> None:
        """Counts a batch that is about to be trained.

        Raises:
            UserError: too many rows were lost, of at least a thousand or of all.
        """
        self.places[step.place.shard] = step.place
        self.batches += 1
        if step.account is None:
            return
        self.account.add(step.account)
        _keep_few_examples(self.account)
        self.require_enough_rows(self.account, is_whole=step.account.ends_epoch and self.stream.plan.world_size == 1)

    def require_enough_rows(self, account: Account, is_whole: bool = False) -> None:
        """Raises `UserError` for data sets of which too many rows were lost; few rows count only if they are all."""
        enough = {n: one for n, one in account.ledgers.items() if is_whole or one.rows_read >= _ENOUGH_TO_JUDGE}
        require_enough_rows(self.stream.keys, as_document(enough))

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Sets the epoch of the logs to the number of times that all rows were read: its length is not known."""
        state.epoch = float(min(place.epoch for place in self.places.values()))

    def gather(self) -> dict[str, Any]:
        """Collects the state of all ranks, in the form that is saved. All ranks must call it."""
        states = gather_objects((list(self.places.values()), self.account))
        account = Account()
        for _, part in states:
            account.add(part)
        _keep_few_examples(account)
        places = sorted((place for part, _ in states for place in part), key=lambda place: place.shard)
        ledgers = {name: as_state(ledger) for name, ledger in account.ledgers.items()}
        counts = {"end_token_ids": account.end_token_ids, "again": account.again, "ledgers": ledgers}
        return {"batches": self.batches, "places": [asdict(place) for place in places], **counts}

    def load(self, checkpoint: Path) -> None:
        """Restores a checkpoint's state. Raises `UserError` where it is not of a streaming run, or is damaged."""
        file = checkpoint / STREAM_STATE
        try:
            self._loaded = json.loads(file.read_text())
            self.rewind()
        except (OSError, ValueError, KeyError, TypeError) as error:
            message = f"cannot resume from {checkpoint}: the position in its stream is not known ({error})"
            hint = "take another checkpoint; or start from its weights: model_name_or_path, and another output_dir"
            raise UserError(Problem(message, hint, "resume_from_checkpoint", str(file))) from None

    def document(self, gathered: dict[str, Any]) -> dict[str, Any]:
        """Makes the LEDGER of what `gather` returned, with those of the evaluation sets."""
        account = account_in(gathered)
        read = account.ledgers
        for name, rows in account.again.items():
            read[name].passes = 1 + rows / read[name].rows_read
        trained = {s.name: read[s.name] for s in self.stream.plan.sources if s.name in read}
        return as_document(trained, self._evals)

    def final_account(self) -> tuple[dict[str, Any], tuple[int, ...]]:
        """Returns the LEDGER of all rows streamed to all ranks, and their end tokens. All ranks must call it."""
        streamed = self.gather()
        return self.document(streamed), tuple(streamed["end_token_ids"])


def save(folder: Path, gathered: dict[str, Any]) -> None:
    """Writes what `StreamProgress.gather` returned into a checkpoint."""
    (folder / STREAM_STATE).write_text(json.dumps(gathered) + "\n")


def _keep_few_examples(account: Account) -> None:
    for ledger in account.ledgers.values():
        earlier: defaultdict[str, count[int]] = defaultdict(count)  # examples of each reason
        ledger.lost_examples = [e for e in ledger.lost_examples if next(earlier[e["reason"]]) < MAX_EXAMPLES]


def account_in(saved: dict[str, Any]) -> Account:
    """Reads the account from what `StreamProgress.gather` returned."""
    ledgers = {name: from_state(state) for name, state in saved["ledgers"].items()}
    return Account(ledgers, Counter(saved["again"]), list(saved["end_token_ids"]))
