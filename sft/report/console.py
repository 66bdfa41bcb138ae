"""Prints for people, on stderr (stdout is for results): the log, errors, the data ledger, samples, estimates."""

from __future__ import annotations

import logging
import os
import shlex
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import fields
from itertools import groupby
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from rich.table import Table
from rich.text import Text

from sft.errors import UserError
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
        # Lines are wrapped at words on a terminal, and kept whole in a file.
        text = _MARKS.get(record.levelno, "") + escape(record.getMessage())
        console.print(text, soft_wrap=not console.is_terminal)


def setup_logging(is_main_process: bool) -> None:
    """Sends the pipeline's log to the console; ranks other than 0 log errors only."""
    logger.handlers = [_ConsoleHandler()]
    logger.propagate = False
    logger.setLevel(logging.INFO if is_main_process else logging.ERROR)


def write_log_file(file: Path) -> None:
    """Appends the pipeline's log, with times, to `file` as well."""
    file.parent.mkdir(parents=True, exist_ok=True)
    handler = logging.FileHandler(file, encoding="utf-8")
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
    logger.addHandler(handler)


@contextmanager
def counting(what: str) -> Iterator[Callable[[int], None]]:
    """Shows a counter on the terminal, e.g. of prepared rows, and removes it at the end."""
    columns = (SpinnerColumn(), TextColumn("{task.description} {task.completed:,}"), TimeElapsedColumn())
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress:
        task = progress.add_task(what, total=None)
        yield lambda done: progress.advance(task, done)


def show_error(error: UserError) -> None:
    """Prints each problem: where it is, what is wrong, and what to do."""
    for problem in error.problems:
        line = Text("error: ", style="bold red")
        if where := problem.where():
            line.append(f"{where}: ", style="bold")
        line.append(problem.message)
        console.print(line, soft_wrap=True)
        if problem.hint:
            console.print(Text(f"       {problem.hint}", style="dim"), soft_wrap=True)


def show_ledger(document: dict[str, Any]) -> None:
    """Prints the ledger as a table that fits 80 columns, and logs the first lost rows with file and line."""
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
    """Prints a histogram of sample lengths: one bar for each range of tokens."""
    bars = ledger["length_histogram"]
    most = max((count for _, _, count in bars), default=0)
    console.print("samples by tokens" if bars else "", style="bold")
    for first, last, count in bars:
        bar = "#" * max(round(40 * count / most), int(count > 0))
        console.print(f"{first:>7,} - {last:>7,}  {bar:<40} {count:,}", highlight=False)


_NOTES = {
    "answers_cut": "answers lost their end to truncation: they teach the model not to stop",
    "control_tokens": "rows have control tokens typed in a message; they are encoded as plain text",
    "thoughts_left_out": "conversations have reasoning that the chat template does not render: it is not trained",
    "texts_left_out": "conversations have text next to a tool call that the chat template does not render: "
    "it is not trained",
    "unrolled": "conversations became one sample per answer, because the template rewrites earlier turns",
    "duplicates": "rows repeat an earlier one (dedupe: true removes them)",
    "in_validation": "training rows are in validation too, which makes its metrics too good (dedupe: true removes "
    "them from training)",
}


def show_sample(sample: dict[str, Any], tokenizer: Any) -> None:
    """Prints one sample, its trained parts in green, or in double brackets where there is no colour."""
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
    """Prints how these samples are packed: the length of each document in each sequence."""
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
    """Prints the run's results and the commands to run next.

    Args:
        results: metrics by name; values that are not numbers are skipped.
        seconds: run time of the whole process.
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


def show_estimate(estimate: dict[str, Any]) -> None:
    """Prints `estimate --json`'s numbers: the memory of a rank and of its device, and the run's batches and tokens."""
    from sft.data.loading.batch_plan import BatchPlan

    device, longest = estimate["device"], estimate["longest_pass"]
    table = Table(title=f"memory per rank ({device}), GiB", title_justify="left", show_header=False)
    for name, size in estimate["memory"].items():
        if size:
            table.add_row(name, f"{size / 2**30:.2f}", end_section=name == "process")
    table.add_row("available", f"{estimate['device_limit'] / 2**30:.2f}")
    console.print(table)
    console.print("the peak is not the sum: not everything is held at the same time", style="dim")
    console.print(
        f"longest micro-batch: {longest['rows']:,} rows, {longest['tokens']:,} tokens, "
        f"{longest['trained_tokens']:,} of them trained"
    )
    plan = BatchPlan(**{field.name: estimate[field.name] for field in fields(BatchPlan)})
    console.print(f"batches: {plan}", soft_wrap=True)
    if estimate["assumes_batch_size"]:
        console.print("per_device_train_batch_size: auto is chosen when the run starts; these rows are assumed")
    if estimate["total_tokens"] is not None:
        seconds = estimate["seconds_at_least"]
        least = "" if seconds is None else f", in no less than {seconds:,.3g} s"
        console.print(f"the run trains on {estimate['total_tokens']:,} tokens{least}")


def show_report(report: Report) -> None:
    """Prints `check`'s report."""
    if report.data is not None:
        show_ledger(report.data)
        show_lengths(report.data["total"])
    if report.serving is not None:
        console.print(f"serving: {report.serving_message}", markup=False)
    if report.estimate is not None:
        counts = {name: n for name, n in report.estimate.items() if type(n) is int and name != "device_limit"}
        console.print("  ".join(f"{name} {n:,}" for name, n in counts.items()), style="dim", highlight=False)
        if "memory" in report.estimate:
            peak, limit = report.estimate["memory"]["peak"], report.estimate["device_limit"]
            console.print(f"memory per rank: {peak / 2**30:.2f} GiB at the peak, {limit / 2**30:.2f} GiB available")
    show_error(UserError(*report.errors))
    console.print("[bold red]not ready[/]" if report.errors else "[bold green]ready to train[/]")


def quiet_libraries() -> None:
    """Turns off the libraries' progress bars (the pipeline shows its own) and deprecation warnings."""
    import datasets
    from transformers.utils import logging as transformers_logging

    from sft.model.quantization import import_bitsandbytes

    with suppress(UserError):  # where it cannot be loaded, only quantization is unavailable
        import_bitsandbytes()
    warnings.filterwarnings("ignore", category=FutureWarning)  # deprecations inside the libraries
    datasets.disable_progress_bars()
    transformers_logging.disable_progress_bar()
