"""Raw files in, training and validation Parquet out: checked, filtered, without duplicates, shuffled and split.

    python prepare_data.py "outputs/*.jsonl" -o data/sft --val-split 0.1 --prompt-key question --response-key answer
    python prepare_data.py logs.jsonl.gz -o data/raw --convert-only       # the rows as they are, as Parquet

Rows of all formats are read as training reads them, and what is written trains with no further setting:
`dataset_path: data/sft`. Every row that is not written is counted with its reason, file and line.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import logging
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sft.data.formats.conversation import Conversation, RowLost, Text, require_valid_unicode
from sft.data.formats.normalize import EXCHANGE_KEYS, normalize
from sft.data.sources.files import Row, find_files, read_files
from sft.data.sources.table_readers import drop_null_keys
from sft.errors import Problem, UserError
from sft.report.console import console, setup_logging, show_error

if TYPE_CHECKING:
    import pyarrow as pa

logger = logging.getLogger("sft")


@dataclass(frozen=True)
class Kept:
    """A row that is written: the file it came from, and its columns."""

    file: str
    columns: dict[str, Any]


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command; returns the exit code: 0, or 2 when an argument or the data is wrong."""
    setup_logging(is_main_process=True)
    try:
        return _run(_parser().parse_args(argv))
    except UserError as error:
        show_error(error)
        return error.exit_code


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("files", nargs="+", help="files, globs or folders")
    parser.add_argument("-o", "--output-dir", type=Path, required=True, help="where the Parquet files go")
    parser.add_argument("--val-split", type=float, default=0.0, help="share of the rows for validation (0)")
    parser.add_argument("--stratify", action="store_true", help="take that share of each input file")
    parser.add_argument("--format", default="auto", choices=("auto", "alpaca", "chat", "qa", "text"))
    parser.add_argument("--prompt-key", help="the column with the question; a dotted path reaches nested fields")
    parser.add_argument("--response-key", help="the column with the answer")
    parser.add_argument("--min-chars", type=int, default=0, help="shorter rows are left out (0)")
    parser.add_argument("--max-chars", type=int, help="longer rows are left out")
    parser.add_argument("--keep-duplicates", action="store_true", help="write rows that repeat an earlier one, too")
    parser.add_argument("--seed", type=int, default=42, help="of the shuffle and the split (42)")
    parser.add_argument("--convert-only", action="store_true", help="write the rows as they are, in their order")
    return parser


def _run(options: argparse.Namespace) -> int:
    if not 0 <= options.val_split < 1:
        raise UserError(Problem(f"expected a share from 0 to below 1, got {options.val_split}", "", "--val-split"))
    if bool(options.prompt_key) != bool(options.response_key):
        raise UserError(Problem("--prompt-key and --response-key go together", "", "command line"))
    lost: Counter[str] = Counter()
    rows = list(read_files(find_files(options.files, "files")))
    convert = _as_they_are if options.convert_only else _normalized
    kept = list(convert(rows, options, lost))
    if not kept:
        raise UserError(Problem(f"none of {len(rows)} rows is left: {_reasons(lost)}", "see the rows named above"))
    train: list[Kept] = kept
    validation: list[Kept] = []
    if not options.convert_only:
        train, validation = split(kept, options.val_split, options.seed, options.stratify)
    report = {"rows_read": len(rows), "rows_written": len(kept), "rows_lost": dict(lost.most_common())}
    try:
        _write_all(train, validation, report, options.output_dir)
    except OSError as error:
        hint = "give a folder to write to, on a disk with room"
        raise UserError(Problem(f"cannot be written: {error}", hint, "--output-dir")) from None
    console.print(f"{len(rows):,} rows read, {len(kept):,} written, {lost.total():,} left out: {_reasons(lost)}")
    return 0


def _write_all(train: list[Kept], validation: list[Kept], report: dict[str, Any], folder: Path) -> None:
    """Raises `OSError` where the folder cannot be made or written to."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, part in (("train", train), ("validation", validation)):
        file = folder / f"{name}.parquet"
        if part:
            _write(part, file)
            console.print(f"{file}: {len(part):,} rows", markup=False)
        elif file.exists():
            _set_aside(file)
    (folder / "data_report.json").write_text(json.dumps(report, indent=2) + "\n")


def _normalized(rows: list[Row], options: argparse.Namespace, lost: Counter[str]) -> Iterator[Kept]:
    """The rows in the one form that training knows, without those that fail a check."""
    columns = {"question": options.prompt_key, "answer": options.response_key} if options.prompt_key else None
    seen: set[bytes] = set()
    for row in rows:
        try:
            if row.data is None:
                raise RowLost(*(row.lost or ("bad_schema", "no data")))
            written = _columns(normalize(row.data, options.format, columns))
            text = json.dumps(written, sort_keys=True, ensure_ascii=False)
            require_valid_unicode(text)
            _check_length(written, options.min_chars, options.max_chars)
            mark = hashlib.blake2b(text.encode(), digest_size=16).digest()
            if mark in seen and not options.keep_duplicates:
                raise RowLost("duplicate", "the same row stands earlier")
            seen.add(mark)
        except RowLost as reason:
            _lose(row, reason, lost)
            continue
        yield Kept(row.file, written)


def _as_they_are(rows: list[Row], options: argparse.Namespace, lost: Counter[str]) -> Iterator[Kept]:  # noqa: ARG001
    for row in rows:
        try:
            if row.data is None:
                raise RowLost(*(row.lost or ("bad_schema", "no data")))
            require_valid_unicode(_as_json(row.data))
        except RowLost as reason:
            _lose(row, reason, lost)
            continue
        yield Kept(row.file, row.data)


def _columns(content: Conversation | Text) -> dict[str, Any]:
    """What is written for a row: `text`, or `messages` and `tools` as JSON, whose messages may have any fields."""
    if isinstance(content, Text):
        return {"text": content.text}
    messages = [
        message if trained or message["role"] != "assistant" else {**message, "train": False}
        for message, trained in zip(content.messages, content.trainable, strict=True)
    ]
    written = {"messages": json.dumps(messages, ensure_ascii=False)}
    if content.tools:
        written["tools"] = json.dumps(content.tools, ensure_ascii=False)
    return written


def _check_length(columns: dict[str, Any], minimum: int, maximum: int | None) -> None:
    length = (
        len(columns["text"]) if "text" in columns else sum(len(m["content"]) for m in json.loads(columns["messages"]))
    )
    if length < minimum:
        raise RowLost("too_short", f"{length} characters, --min-chars is {minimum}")
    if maximum is not None and length > maximum:
        raise RowLost("too_long", f"{length} characters, --max-chars is {maximum}")


def _lose(row: Row, reason: RowLost, lost: Counter[str]) -> None:
    lost[reason.reason] += 1
    if lost[reason.reason] <= 3:
        logger.warning("%s:%d: left out: %s: %s", row.file, row.line, reason.reason, reason.message)


def split(kept: list[Kept], share: float, seed: int, stratify: bool) -> tuple[list[Kept], list[Kept]]:
    """Shuffles the rows and takes `share` of them (of each file, if `stratify`) for validation.

    The same rows and seed give the same two lists. No group is given away whole: a row is left for training.
    """
    import numpy as np

    order = np.random.default_rng(seed).permutation(len(kept)).tolist()
    groups: dict[str, list[int]] = {}
    for index in order:
        groups.setdefault(kept[index].file if stratify else "", []).append(index)
    held = {index for group in groups.values() for index in group[: min(round(len(group) * share), len(group) - 1)]}
    return [kept[i] for i in order if i not in held], [kept[i] for i in order if i in held]


def _write(rows: list[Kept], file: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    names = list(dict.fromkeys(name for row in rows for name in row.columns))
    table = pa.table({name: _array(name, [row.columns.get(name) for row in rows]) for name in names})
    pq.write_table(table, file, compression="zstd")


def _set_aside(file: Path) -> None:
    """Takes an earlier file out of the way: the new train.parquet may well hold an older validation set's rows."""
    earlier = file.with_name(f"{file.name}.earlier")  # which nothing takes for data
    file.replace(earlier)
    logger.warning("%s was there before, and is no part of this: it is %s now", file, earlier.name)


def _array(name: str, values: list[Any]) -> pa.Array:
    """The column; as JSON text, which training reads as well, where Arrow would change lists and objects in it."""
    import pyarrow as pa

    problem: Exception | str = "objects without keys, or lists whose values it would change"
    try:
        array = pa.array(values)
        if _holds(array, name, values):
            return array
    except (pa.ArrowInvalid, pa.ArrowTypeError, OverflowError) as error:
        problem = error
    # A question or an answer as JSON text would be trained as that text.
    is_plain = not isinstance(problem, OverflowError) and not any(isinstance(value, dict | list) for value in values)
    if name in EXCHANGE_KEYS or is_plain:
        hint = "leave --convert-only out, or make the column's values of one kind"
        raise UserError(Problem(f"the column {name!r} has values that no column of Parquet holds: {problem}", hint))
    logger.info("the column %r is written as JSON text, as a column of Parquet does not hold its values", name)
    return pa.array([None if value is None else _as_json(value) for value in values])


def _holds(array: pa.Array, name: str, values: list[Any]) -> bool:
    """Whether Parquet can write the column, and lists in it come back as they are: none gets the keys of others."""
    if "struct<>" in str(array.type):
        return False
    if not any(isinstance(value, list) for value in values):
        return True
    held = array.to_pylist()
    if name in EXCHANGE_KEYS:  # it is not to be JSON text: what counts is how it will be read
        held, values = drop_null_keys(held), list(map(_without_empty_keys, values))
    return _as_json(held) == _as_json(values)


def _without_empty_keys(messages: Any) -> Any:
    """Messages without keys that hold nothing, e.g. the content beside a call; in a call they may be meant."""
    if not isinstance(messages, list):
        return messages
    return [{k: v for k, v in m.items() if v is not None} if isinstance(m, dict) else m for m in messages]


def _as_json(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False, default=str)


def _reasons(lost: Counter[str]) -> str:
    return ", ".join(f"{count:,} {reason}" for reason, count in lost.most_common()) or "none"


if __name__ == "__main__":
    sys.exit(main())
