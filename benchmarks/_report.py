"""Tables, targets, plots and the results file of the benchmarks."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
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


def name_medians(reports: Sequence[Any]) -> str:
    """Returns `medians of N rounds`, for the title of a table."""
    return f"medians of {len(reports)} round{'s' * (len(reports) > 1)}"


Target = tuple[str, float, str, float]
"""Name, value reached, comparison (`>=`, `<=`; empty without a target), target value."""


def is_met(reached: float, sign: str, limit: float) -> bool:
    """Returns whether the value has reached its target."""
    return reached >= limit if sign == ">=" else reached <= limit


def compare_with_targets(found: Sequence[Target]) -> list[dict[str, Any]]:
    """Returns each value with its target and whether it is met; a value without a target is for information."""
    return [
        {"what": what, "reached": reached}
        | ({"target": f"{sign} {limit}", "met": is_met(reached, sign, limit)} if sign else {})
        for what, reached, sign, limit in found
    ]


def target_figures(compared: Sequence[dict[str, Any]], digits: int) -> Figures:
    """Returns the table of `compare_with_targets`."""
    verdicts = {True: "yes", False: "no", None: ""}
    rows = [(t["what"], f"{t['reached']:.{digits}g}", t.get("target", ""), verdicts[t.get("met")]) for t in compared]
    return Figures("Targets", ("", "reached", "target", "met"), rows)


def write_section(file: Path, title: str, paragraphs: Sequence[str]) -> None:
    """Replaces the section `## title` of a Markdown file, or appends it; other sections stay."""
    file.parent.mkdir(parents=True, exist_ok=True)
    known = file.read_text() if file.exists() else "# Results\n"
    section = f"## {title}\n\n" + "\n\n".join(paragraphs).strip() + "\n"
    pattern = re.compile(rf"^## {re.escape(title)}\n.*?(?=^## |\Z)", re.MULTILINE | re.DOTALL)
    known, replaced = pattern.subn(lambda _: section + "\n", known)
    if not replaced:
        known = f"{known.rstrip()}\n\n{section}"
    file.write_text(known.rstrip() + "\n")


def save_svg(file: Path, draw: Callable[[Any], Any], settings: dict[str, Any]) -> bool:
    """Saves the figure that `draw` makes with `matplotlib.pyplot`; returns False where matplotlib is not installed.

    Args:
        settings: of matplotlib; with a fixed `svg.hashsalt` the same figures give the same file.
    """
    try:
        import matplotlib
    except ImportError:
        return False
    matplotlib.use("svg")
    from matplotlib import pyplot

    with pyplot.rc_context({"svg.fonttype": "none", **settings}):
        figure = draw(pyplot)
        file.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(file, metadata={"Date": None})
        pyplot.close(figure)
    return True
