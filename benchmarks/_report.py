"""Tables, targets, plots and the results file of the benchmarks."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table


@dataclass(frozen=True)
class Figures:
    """A table of results."""

    title: str
    head: tuple[str, ...]
    rows: Sequence[tuple[str, ...]]

    def show(self, console: Console) -> None:
        """Prints the table."""
        table = Table(title=self.title, title_justify="left")
        for number, name in enumerate(self.head):
            table.add_column(name, justify="right" if number else "left")
        for row in self.rows:
            table.add_row(*row)
        console.print(table)

    def markdown(self) -> str:
        """Returns the table as Markdown."""
        rule = ("---", *["---:"] * (len(self.head) - 1))
        lines = [" | ".join(row).join(("| ", " |")) for row in (self.head, rule, *self.rows)]
        return f"**{self.title}**\n\n" + "\n".join(lines)


Target = tuple[str, float, str, float]
"""Name, value reached, comparison (`>=`, `<=`; empty without a target), target value."""


def compare_with_targets(found: Sequence[Target]) -> list[dict[str, Any]]:
    """Returns each value with its target and whether it is met; a value without a target is for information."""
    return [
        {"what": what, "reached": reached}
        | ({"target": f"{sign} {limit}", "met": reached >= limit if sign == ">=" else reached <= limit} if sign else {})
        for what, reached, sign, limit in found
    ]


def target_figures(compared: Sequence[dict[str, Any]], digits: int) -> Figures:
    """Returns the table of `compare_with_targets`."""
    verdicts = {True: "yes", False: "no", None: ""}
    rows = [(t["what"], f"{t['reached']:.{digits}g}", t.get("target", ""), verdicts[t.get("met")]) for t in compared]
    return Figures("Targets", ("", "reached", "target", "met"), rows)


def write_section(file: Path, title: str, text: str) -> None:
    """Replaces the section `## title` of a Markdown file, or appends it; other sections stay."""
    known = file.read_text() if file.exists() else "# Results\n"
    section = f"## {title}\n\n{text.strip()}\n"
    pattern = re.compile(rf"^## {re.escape(title)}\n.*?(?=^## |\Z)", re.MULTILINE | re.DOTALL)
    if pattern.search(known):
        known = pattern.sub(lambda _: section + "\n", known)
    else:
        known = f"{known.rstrip()}\n\n{section}"
    file.write_text(known.rstrip() + "\n")


def plot_scaling(file: Path, speeds: dict[str, dict[int, float]]) -> bool:
    """Draws tokens per second by rows, one line per contestant; returns False where matplotlib is not installed."""
    try:
        import matplotlib
    except ImportError:
        return False
    matplotlib.use("svg")
    from matplotlib import pyplot
    from matplotlib.ticker import FuncFormatter

    with pyplot.rc_context({"svg.hashsalt": "data", "svg.fonttype": "none"}):  # the same figures give the same file
        figure, axes = pyplot.subplots(figsize=(6, 3.2), layout="constrained")
        for name, by_rows in speeds.items():
            if by_rows:
                rows = sorted(by_rows)
                axes.plot(rows, [by_rows[n] / 1e6 for n in rows], marker="o", label=name)
        axes.set_xscale("log")
        axes.xaxis.set_major_formatter(FuncFormatter(lambda rows, _: f"{rows:,.0f}"))
        axes.set_ylim(bottom=0)
        axes.set_xlabel("rows")
        axes.set_ylabel("million tokens/s")
        axes.grid(alpha=0.3)
        figure.legend(loc="outside upper center", ncols=len(speeds))
        file.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(file, metadata={"Date": None})
        pyplot.close(figure)
    return True
