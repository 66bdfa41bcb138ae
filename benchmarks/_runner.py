"""What the benchmark scripts share: options, running the parts in order, printing and writing the figures."""

from __future__ import annotations

import argparse
import importlib.util
import json
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

from benchmarks._measure import ROOT, machine
from benchmarks._report import Figures


def run_parts(
    make: Callable[[argparse.Namespace, Path, Console], Any],
    options: argparse.Namespace,
    console: Console,
    packages: Sequence[str],
) -> tuple[dict[str, Any], int]:
    """Runs each part in `options.parts`; returns the figures by part, with the machine, and how many parts failed.

    Args:
        make: makes a benchmark, which has an attribute `data` and a method for each part.
        options: of the command line; `work` is the folder for temporary files.
        packages: their versions are recorded.
    """
    results: dict[str, Any] = {"machine": machine(packages), "options": {k: str(v) for k, v in vars(options).items()}}
    failed = 0
    with tempfile.TemporaryDirectory(prefix="benchmark_", dir=options.work) as work:
        benchmark = make(options, Path(work), console)
        results["data"] = benchmark.data
        for part in options.parts:
            try:
                results[part] = getattr(benchmark, part)()
            except RuntimeError as error:  # keep the figures of the other parts
                console.print(f"{part}: {error}", markup=False, highlight=False)
                failed += 1
    return results, failed


def is_trl_measured(options: argparse.Namespace, console: Console) -> bool:
    """Returns whether TRL is installed and not excluded; prints how to install it where it is missing."""
    found = importlib.util.find_spec("trl") is not None
    if not found and not options.without_trl:
        console.print("TRL is not installed: it is skipped (pip install -r requirements-bench.txt)")
    return found and not options.without_trl


def add_data_option(parser: argparse.ArgumentParser) -> None:
    """Adds `--data`, the questions that the rows are made of."""
    data = ROOT.parent / "shared" / "data" / "gsm8k" / "train.jsonl"
    parser.add_argument("--data", type=Path, default=data, help="rows of question and answer; absent: generated text")


def wide_console() -> Console:
    """Returns a console for the terminal, or for text of 150 columns."""
    console = Console()
    return console if console.is_terminal else Console(width=150)


def show(console: Console, tables: Sequence[Figures], results: dict[str, Any], options: argparse.Namespace) -> None:
    """Prints the tables, and writes all figures to `options.json` if it is set."""
    for table in tables:
        table.show(console)
    if options.json:
        options.json.write_text(json.dumps(results, indent=1))
