"""What people see: the log on stderr (stdout is for results), the ledger, a coloured sample, the errors."""

from __future__ import annotations

import logging
import os
import shlex
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.markup import escape
from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from rich.table import Table
from rich.text import Text

from sft.errors import UserError

if TYPE_CHECKING:
    from sft.estimate.run import RunEstimate
    from sft.report.check_report import Report

logger = logging.getLogger("sft")
console = Console(stderr=True, highlight=False)

_MARKS = {
    logging.WARNING: "[yellow]warning:[/] ",
    logging.ERROR: "[red]error:[/] ",
    logging.CRITICAL: "[red]error:[/] ",
}


class _ConsoleHandler(logging.Handler):
    def emit(self, record: logging.LogRecord) -> None:
        # A terminal gets lines broken between words, a file whole lines.
        text = _MARKS.get(record.levelno, "") + escape(record.getMessage())
        console.print(text, soft_wrap=not console.is_terminal)


def setup_logging(is_main_process: bool) -> None:
    """Sends the pipeline's log to the console; other ranks than the first only log errors."""
    logger.handlers = [_ConsoleHandler()]
    logger.propagate = False
    logger.setLevel(logging.INFO if is_main_process else logging.ERROR)


def write_log_file(file: Path) -> None:
    """Sends the pipeline's log, with times, to `file` as well; a resumed run goes on in it."""
    file.parent.mkdir(parents=True, exist_ok=True)
    handler = logging.FileHandler(file, encoding="utf-8")
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
    logger.addHandler(handler)


@contextmanager
def counting(what: str) -> Iterator[Callable[[int], None]]:
    """A line on the terminal that counts, e.g. prepared rows; it goes away when it is done."""
    columns = (SpinnerColumn(), TextColumn("{task.description} {task.completed:,}"), TimeElapsedColumn())
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress:
        task = progress.add_task(what, total=None)
        yield lambda done: progress.advance(task, done)


def show_error(error: UserError) -> None:
    """All problems, each with its place, what is wrong and what to do."""
    for problem in error.problems:
        line = Text("error: ", style="bold red")
        if where := problem.where():
            line.append(f"{where}: ", style="bold")
        line.append(problem.message)
        console.print(line, soft_wrap=True)
        if problem.hint:
            console.print(Text(f"       {problem.hint}", style="dim"), soft_wrap=True)


def show_ledger(document: dict[str, Any]) -> None:
    """The account of the data as a table that fits 80 columns, and the first lost rows with their places."""
    table = Table(title="data", title_justify="left")
    for name in ("set", "rows trained", "tokens", "trained", "p50 / max length", "fill"):
        table.add_column(name, justify="left" if name == "set" else "right", overflow="fold")
    for name, ledger in document["datasets"].items():
        tokens, lengths, fill = ledger["tokens"], ledger["length_percentiles"], ledger["packing"]["fill"]
        table.add_row(
            name,
            f"{ledger['rows_trained']:,} of {ledger['rows_read']:,}",
            f"{tokens['total']:,}",
            f"{tokens['trained'] / max(tokens['total'], 1):.1%}",
            f"{lengths.get('p50', 0):,} / {lengths.get('p100', 0):,}",
            "-" if fill is None else f"{fill:.1%}",
        )
    console.print(table)
    for name, ledger in document["datasets"].items():
        if ledger["rows_lost"]:
            reasons = ", ".join(f"{count:,} {reason}" for reason, count in ledger["rows_lost"].items())
            logger.warning("%s: rows lost: %s", name, reasons)
        for key, meaning in _NOTES.items():
            if ledger[key]:
                logger.warning("%s: %d %s", name, ledger[key], meaning)
        for example in ledger["lost_examples"][:3]:
            logger.warning("%s:%s: lost: %s: %s", *(example[k] for k in ("file", "line", "reason", "message")))


def show_lengths(ledger: dict[str, Any]) -> None:
    """How long the samples are, as a bar of characters for each range of tokens."""
    bars = ledger["length_histogram"]
    most = max((count for _, _, count in bars), default=0)
    console.print("samples by tokens" if bars else "", style="bold")
    for first, last, count in bars:
        bar = "#" * max(round(40 * count / most), int(count > 0))
        console.print(f"{first:>7,} - {last:>7,}  {bar:<40} {count:,}", highlight=False)


_NOTES = {
    "answers_cut": "answers lost their end to truncation: they teach the model not to stop",
    "control_tokens": "rows have control tokens typed in a message, which are encoded as plain text",
    "thoughts_left_out": "conversations have reasoning that the chat template does not write: it is not trained",
    "texts_left_out": "conversations have text beside a call that the chat template does not write: it is not trained",
    "unrolled": "conversations became a sample for each answer, for the template rewrites earlier turns",
    "duplicates": "rows repeat an earlier one (dedupe: true leaves them out of training)",
    "in_validation": "training rows stand in validation too, whose metrics flatter (dedupe: true leaves them out)",
}


def show_sample(sample: dict[str, Any], tokenizer: Any) -> None:
    """One sample with its trained parts in green, or between double brackets where there is no colour."""
    labels = sample["labels"]
    trained = sum(label != -100 for label in labels)
    coloured = console.is_terminal and not console.no_color
    text = Text()
    pairs = zip(sample["input_ids"], labels, strict=True)
    for is_trained, run in groupby(pairs, key=lambda pair: pair[1] != -100):
        piece = tokenizer.decode([token for token, _ in run], clean_up_tokenization_spaces=False)
        brackets = is_trained and not coloured
        text.append(f"[[{piece}]]" if brackets else piece, style="bold green" if is_trained else "dim")
    title = f"{sample['split']} row {sample['row']} of {sample['file']} ({sample['format']})"
    marked = "green" if coloured else "[[in brackets]]"
    console.print(Text(f"{title}: {trained} of {len(labels)} tokens are trained, {marked}:", style="bold"))
    console.print(text, soft_wrap=True)


def show_packed(samples: list[dict[str, Any]], packing: str, max_seq_length: int) -> None:
    """How samples share a sequence: the documents of each, with their lengths, as the packing lays these few out."""
    import numpy as np

    from sft.data.preparation.packing import pack

    lengths = np.array([len(s["input_ids"]) for s in samples if len(s["input_ids"]) <= max_seq_length])
    if not len(lengths):
        return
    layout = pack(lengths, packing, max_seq_length)
    console.print(f"packed ({packing}), these samples would fill {len(layout.counts)} sequences:", style="bold")
    for row in np.split(layout.lengths, np.cumsum(layout.counts)[:-1]):
        documents = " | ".join(f"{n:,}" for n in row.tolist())
        console.print(f"  [{documents}] {row.sum():,} of {max_seq_length:,} tokens", markup=False, highlight=False)


def show_conclusion(output_dir: Path, results: dict[str, Any], seconds: float) -> None:
    """The run's result and what to do next.

    Args:
        results: numbers by name; what is no number is left out.
        seconds: that the whole process took.
    """
    table = Table(title=f"done in {seconds:.0f} s: {escape(str(output_dir))}", title_justify="left", show_header=False)
    sets = results.get("datasets", {})
    for prefix, numbers in [("", results), *(sets.items() if len(sets) > 1 else ())]:
        for name, value in numbers.items():
            if isinstance(value, int | float):
                table.add_row(f"{prefix} {name}".strip(), f"{value:,}" if isinstance(value, int) else f"{value:.4f}")
    console.print(table)
    if {"exact_match_before", "exact_match_after"} <= results.keys():
        before, after = results["exact_match_before"], results["exact_match_after"]
        console.print(f"[bold]exact match: {before:.1%} before training, {after:.1%} after[/]")
    console.print("next:")
    commands = [["generate", "--model", str(output_dir), "--chat"]]
    if (output_dir / "adapter_config.json").is_file():
        commands.append(["merge", "--model", str(output_dir), "--output_dir", f"{output_dir}-merged"])
    python = os.path.relpath(sys.executable) if sys.executable.startswith(os.getcwd()) else sys.executable
    for command in commands:
        console.print("  " + shlex.join([python, "sft_main.py", *command]), markup=False, soft_wrap=True)


def show_estimate(told: RunEstimate) -> None:
    """The memory of a rank, beside what its device has, and the run's arithmetic."""
    table = Table(title=f"memory of a rank ({told.device}), GiB", title_justify="left", show_header=False)
    for name, size in told.memory.as_json().items():
        if size:
            table.add_row(name, f"{size / 2**30:.2f}", end_section=name == "process")
    table.add_row("there is", f"{told.limit / 2**30:.2f}")
    console.print(table)
    freed = ", and blocks that were freed stay with the process" if told.device == "cpu" else ""
    console.print(f"the peak is not the sum: not all is held at once{freed}", style="dim")
    console.print(f"longest pass: {told.rows:,} rows, {told.tokens:,} tokens, {told.trained_tokens:,} of them trained")
    console.print(f"batches: {told.plan}", soft_wrap=True)
    if told.assumes_batch_size:
        console.print("per_device_train_batch_size: auto is chosen when the run starts; these rows are assumed")
    if told.total_tokens is not None:
        least = "" if told.seconds_at_least is None else f", in no less than {told.seconds_at_least:,.3g} s"
        console.print(f"the run trains on {told.total_tokens:,} tokens{least}")


def show_report(report: Report) -> None:
    """`check`'s report for eyes."""
    if report.data is not None:
        show_ledger(report.data)
        show_lengths(report.data["total"])
    if report.serving is not None:
        console.print(f"serving: {report.serving.message}", markup=False)
    if report.estimate is not None:
        told = {name: value for name, value in report.estimate.items() if type(value) is int and name != "device_limit"}
        console.print("  ".join(f"{name} {value:,}" for name, value in told.items()), style="dim", highlight=False)
        if "memory" in report.estimate:
            peak, limit = report.estimate["memory"]["peak"], report.estimate["device_limit"]
            console.print(f"memory of a rank: {peak / 2**30:.2f} GiB at the peak, there is {limit / 2**30:.2f}")
    show_error(UserError(*report.errors))
    console.print("[bold red]not ready[/]" if report.errors else "[bold green]ready to train[/]")


def quiet_libraries() -> None:
    """Turns off the libraries' own progress bars, whose place the pipeline's take, and their deprecations."""
    import datasets
    from transformers.utils import logging as transformers_logging

    from sft.model.quantization import import_bitsandbytes

    with suppress(UserError):  # a machine that it does not load on trains without quantization
        import_bitsandbytes()
    warnings.filterwarnings("ignore", category=FutureWarning)  # deprecations inside the libraries
    datasets.disable_progress_bars()
    transformers_logging.disable_progress_bar()
