"""Converts raw files to training and validation Parquet: checked, filtered, deduplicated, shuffled and split.

    python prepare_data.py "outputs/*.jsonl" -o data/sft --val-split 0.1 --prompt-key question --response-key answer
    python prepare_data.py logs.jsonl.gz -o data/raw --convert-only       # the rows as they are, as Parquet

Rows of all formats are read as training reads them, and the result needs no further setting to train on:
`dataset_path: data/sft`. Every row that is skipped is counted with its reason, file and line.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import logging
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
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
class OutputRow:
    """A row to write: the file that it was read from, and its columns."""

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
    parser.add_argument("-o", "--output-dir", type=Path, required=True, help="folder for the Parquet files")
    parser.add_argument("--val-split", type=float, default=0.0, help="share of the rows for validation (0)")
    parser.add_argument("--stratify", action="store_true", help="take that share from each input file")
    parser.add_argument("--format", default="auto", choices=("auto", "alpaca", "chat", "qa", "text"))
    parser.add_argument("--prompt-key", help="the column with the question; a dotted path reaches nested fields")
    parser.add_argument("--response-key", help="the column with the answer")
    parser.add_argument("--min-chars", type=int, default=0, help="skip shorter rows (0)")
    parser.add_argument("--max-chars", type=int, help="skip longer rows")
    parser.add_argument("--keep-duplicates", action="store_true", help="also write rows that repeat an earlier one")
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
    convert = _check_characters if options.convert_only else _make_normalizer(options)
    kept = list(_convert_rows(rows, convert, lost))
    if not kept:
        message = f"none of {len(rows)} rows is left: {_format_reasons(lost)}"
        raise UserError(Problem(message, "see the rows named above"))
    train: list[OutputRow] = kept
    validation: list[OutputRow] = []
    if not options.convert_only:
        train, validation = split(kept, options.val_split, options.seed, options.stratify)
    report = {"rows_read": len(rows), "rows_written": len(kept), "rows_lost": dict(lost.most_common())}
    try:
        _write_all(train, validation, report, options.output_dir)
    except OSError as error:
        hint = "give a writable folder on a disk with free space"
        raise UserError(Problem(f"cannot be written: {error}", hint, "--output-dir")) from None
    console.print(f"{len(rows):,} rows read, {len(kept):,} written, {lost.total():,} skipped: {_format_reasons(lost)}")
    return 0


def _write_all(train: list[OutputRow], validation: list[OutputRow], report: dict[str, Any], folder: Path) -> None:
    """Writes the Parquet files and the report; raises `OSError` where the folder cannot be created or written to."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, part in (("train", train), ("validation", validation)):
        file = folder / f"{name}.parquet"
        if part:
            _write_parquet(part, file)
            console.print(f"{file}: {len(part):,} rows", markup=False)
        elif file.exists():  # of an earlier run: the new train.parquet may hold rows of an old validation.parquet
            earlier = file.with_name(f"{file.name}.earlier")  # a suffix that no reader accepts
            file.replace(earlier)
            logger.warning("%s is from an earlier run, and was renamed to %s", file, earlier.name)
    (folder / "data_report.json").write_text(json.dumps(report, indent=2) + "\n")


def _convert_rows(
    rows: list[Row], convert: Callable[[dict[str, Any]], dict[str, Any]], lost: Counter[str]
) -> Iterator[OutputRow]:
    """Yields the converted rows; counts in `lost` those that are skipped, and logs the first three of each reason."""
    for row in rows:
        try:
            if row.data is None:
                raise RowLost(*(row.lost or ("bad_schema", "no data")))
            columns = convert(row.data)
        except RowLost as error:
            lost[error.reason] += 1
            if lost[error.reason] <= 3:
                logger.warning("%s:%d: skipped: %s: %s", row.file, row.line, error.reason, error.message)
        else:
            yield OutputRow(row.file, columns)


def _make_normalizer(options: argparse.Namespace) -> Callable[[dict[str, Any]], dict[str, Any]]:
    """Returns a function that converts a row to the format of training and raises `RowLost` where a check fails."""
    names = {"question": options.prompt_key, "answer": options.response_key} if options.prompt_key else None
    seen: set[bytes] = set()

    def convert(data: dict[str, Any]) -> dict[str, Any]:
        columns = _columns(normalize(data, options.format, names))
        text = json.dumps(columns, sort_keys=True, ensure_ascii=False)
        require_valid_unicode(text)
        _check_length(columns, options.min_chars, options.max_chars)
        digest = hashlib.blake2b(text.encode(), digest_size=16).digest()
        if digest in seen and not options.keep_duplicates:
            raise RowLost("duplicate", "repeats an earlier row")
        seen.add(digest)
        return columns

    return convert


def _check_characters(data: dict[str, Any]) -> dict[str, Any]:
    require_valid_unicode(_as_json(data))
    return data


def _columns(content: Conversation | Text) -> dict[str, Any]:
    """Returns a row's columns: `text`, or `messages` and `tools` as JSON text, since messages may have any fields."""
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
    texts = [columns["text"]] if "text" in columns else [m["content"] for m in json.loads(columns["messages"])]
    length = sum(map(len, texts))
    if length < minimum:
        raise RowLost("too_short", f"{length} characters, --min-chars is {minimum}")
    if maximum is not None and length > maximum:
        raise RowLost("too_long", f"{length} characters, --max-chars is {maximum}")


def split(kept: list[OutputRow], share: float, seed: int, stratify: bool) -> tuple[list[OutputRow], list[OutputRow]]:
    """Shuffles the rows and takes `share` of them (of each file, if `stratify`) for validation.

    The same rows and seed give the same two lists. At least one row of each group is kept for training.
    """
    import numpy as np

    order = np.random.default_rng(seed).permutation(len(kept)).tolist()
    groups: dict[str, list[int]] = {}
    for index in order:
        groups.setdefault(kept[index].file if stratify else "", []).append(index)
    held = {index for group in groups.values() for index in group[: min(round(len(group) * share), len(group) - 1)]}
    return [kept[i] for i in order if i not in held], [kept[i] for i in order if i in held]


def _write_parquet(rows: list[OutputRow], file: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    names = list(dict.fromkeys(name for row in rows for name in row.columns))
    table = pa.table({name: _array(name, [row.columns.get(name) for row in rows]) for name in names})
    pq.write_table(table, file, compression="zstd")


def _array(name: str, values: list[Any]) -> pa.Array:
    """Builds the column; as JSON text, which training reads too, where Arrow would change its lists and objects."""
    import pyarrow as pa

    problem: Exception | str = "objects without keys, or lists whose values it would change"
    try:
        array = pa.array(values)
        if _can_hold(array, name, values):
            return array
    except (pa.ArrowInvalid, pa.ArrowTypeError, OverflowError) as error:
        problem = error
    # A question or an answer in JSON text would be trained on as that text.
    is_plain = not isinstance(problem, OverflowError) and not any(isinstance(value, dict | list) for value in values)
    if name in EXCHANGE_KEYS or is_plain:
        hint = "run without --convert-only, or give the column values of one type"
        raise UserError(Problem(f"the column {name!r} has values that no column of Parquet holds: {problem}", hint))
    logger.info("the column %r is written as JSON text: a column of Parquet cannot hold its values", name)
    return pa.array([None if value is None else _as_json(value) for value in values])


def _can_hold(array: pa.Array, name: str, values: list[Any]) -> bool:
    """Tells whether Parquet can hold the column and returns its lists unchanged, without keys of other objects."""
    if "struct<>" in str(array.type):
        return False
    if not any(isinstance(value, list) for value in values):
        return True
    held = array.to_pylist()
    if name in EXCHANGE_KEYS:  # never JSON text: compare what training will read
        held, values = drop_null_keys(held), list(map(_without_empty_keys, values))
    return _as_json(held) == _as_json(values)


def _without_empty_keys(messages: Any) -> Any:
    """Removes null keys of messages, e.g. the content beside a tool call; inside a call they may be intended."""
    if not isinstance(messages, list):
        return messages
    return [{k: v for k, v in m.items() if v is not None} if isinstance(m, dict) else m for m in messages]


def _as_json(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False, default=str)


def _format_reasons(lost: Counter[str]) -> str:
    return ", ".join(f"{count:,} {reason}" for reason, count in lost.most_common()) or "none"


if __name__ == "__main__":
    sys.exit(main())
