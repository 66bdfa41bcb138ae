"""What the benchmark scripts share: their parts run one after another, and their figures are shown and written."""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

from benchmarks._measure import machine
from benchmarks._report import Figures


def run_parts(
    make: Callable[[argparse.Namespace, Path, Console], Any],
    options: argparse.Namespace,
    console: Console,
    packages: Sequence[str],
) -> tuple[dict[str, Any], int]:
    """The figures of each part in `options.parts`, by name, with the machine; and how many parts failed.

    Args:
        make: a benchmark, with an attribute `data` and a method for each part.
        options: as given, with `work`, the folder for temporary files.
        packages: whose versions are noted.
    """
    results: dict[str, Any] = {"machine": machine(packages), "options": {k: str(v) for k, v in vars(options).items()}}
    failed = 0
    with tempfile.TemporaryDirectory(prefix="benchmark_", dir=options.work) as work:
        benchmark = make(options, Path(work), console)
        results["data"] = benchmark.data
        for part in options.parts:
            try:
                results[part] = getattr(benchmark, part)()
            except RuntimeError as error:  # the other parts' figures are not lost for it
                console.print(f"{part}: {error}", markup=False, highlight=False)
                failed += 1
    return results, failed


def wide_console() -> Console:
    """The terminal, or 150 columns of text where there is none."""
    console = Console()
    return console if console.is_terminal else Console(width=150)


def show(console: Console, tables: Sequence[Figures], results: dict[str, Any], options: argparse.Namespace) -> None:
    """Prints the tables; writes all figures to `options.json` where it is given."""
    for table in tables:
        table.show(console)
    if options.json:
        options.json.write_text(json.dumps(results, indent=1))
