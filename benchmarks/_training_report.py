"""Tables, targets and the plot of the training benchmark."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from operator import itemgetter
from pathlib import Path
from typing import Any

from benchmarks._measure import median, speed, speed_and_range
from benchmarks._report import Figures, Target, compare_with_targets, name_medians, save_svg, target_figures

Reports = dict[str, list[dict[str, Any]]]
Sweeps = dict[str, dict[str, dict[str, dict[str, Any]]]]  # reports by axis, value and contestant
OURS, BARE, PLAIN, PLAIN_32 = "ours", "bare loop", "Trainer, bf16", "Trainer, float32"
TRL, TRL_PACKED = "TRL", "TRL, packed"
_MEASURES: dict[str, Callable[[dict[str, Any]], float]] = {
    "tokens/s": lambda run: speed([run]),
    "whole run, s": itemgetter("wall_s"),
    "peak MiB": itemgetter("peak_mib"),
}


def targets(results: dict[str, Any]) -> list[dict[str, Any]]:
    """Compares what was measured with its targets."""
    found: list[Target] = []
    for method, parts in results.get("speed", {}).items():
        found += _speed_targets(method, parts["rounds"])
    process = results.get("process", {})
    for rival in (name for name in process if name != OURS):
        ratio = median(process[rival], "wall_s") / median(process[OURS], "wall_s")
        found.append((f"whole run, times faster than {rival}", ratio, *((">=", 2) if rival == TRL else ("", 0))))
    memory = results.get("memory", {})
    for rival in (name for name in memory if name != OURS):
        share = median(memory[OURS], "peak_mib") / median(memory[rival], "peak_mib")
        ratio = speed(memory[OURS]) / speed(memory[rival])
        most, least = (("<=", 0.35), (">=", 1)) if rival in (PLAIN, PLAIN_32) else (("", 0), ("", 0))
        found.append((f"peak memory with the large vocabulary, share of {rival}", share, *most))
        found.append((f"tokens/s with it, times those of {rival}", ratio, *least))
    return compare_with_targets(found)


def _speed_targets(method: str, reports: Reports) -> list[Target]:
    limits = {TRL: 8, TRL_PACKED: 3.5, PLAIN: 3, BARE: 0.95} if method == "full" else {BARE: 0.95}
    found: list[Target] = []
    for rival in (name for name in reports if name != OURS):
        # The median of the ratios within a round, whose runs follow each other.
        pairs = zip(reports[OURS], reports[rival], strict=False)  # a rival may have failed in some rounds
        middle = statistics.median(speed([one]) / speed([other]) for one, other in pairs)
        limit = (">=", limits[rival]) if rival in limits else ("", 0)
        found.append((f"{method}: tokens/s, times those of {rival}", middle, *limit))
    return found


def figures(title: str, reports: Reports) -> Figures:
    """Returns the table of medians by contestant, with the range of its speeds."""
    head = ("", "tokens/s", "slowest–fastest", "tokens a step", "whole run, s", "peak MiB", "last loss")
    lines = []
    for name, of_it in reports.items():
        step_tokens, loss = f"{of_it[0]['tokens'] / of_it[0]['steps']:,.0f}", f"{of_it[0]['loss']:.3f}"
        wall, peak = f"{median(of_it, 'wall_s'):.1f}", f"{median(of_it, 'peak_mib'):,.0f}"
        lines.append((name, *speed_and_range(of_it), step_tokens, wall, peak, loss))
    return Figures(title, head, lines)


def sweep_figures(axis: str, points: dict[str, dict[str, dict[str, Any]]]) -> Figures:
    """Returns the table of one axis of the sweeps."""
    lines = [
        (name, value, f"{speed([one]):,.0f}", f"{one['wall_s']:.1f}", f"{one['peak_mib']:,.0f}")
        for value, reports in points.items()
        for name, one in reports.items()
    ]
    return Figures(f"Along {axis}, one run per point", ("", axis, *_MEASURES), lines)


def all_figures(results: dict[str, Any]) -> list[Figures]:
    """Returns every table of a run, the targets first."""
    tables = [target_figures(results["targets"], digits=3)] if results["targets"] else []
    for method, parts in results.get("speed", {}).items():
        title = f"{'Full training' if method == 'full' else 'LoRA'}, {name_medians(parts['rounds'][OURS])}"
        tables.append(figures(title, parts["rounds"]))
        if parts["heats"]:
            tables.append(figures(f"TRL's settings, one run each ({method})", parts["heats"]))
    if "process" in results:
        tables.append(figures("Short runs from process start to end", results["process"]))
    if "memory" in results:
        tables.append(figures("A large vocabulary, all tokens of a step in one micro-batch", results["memory"]))
    return tables + [sweep_figures(axis, points) for axis, points in results.get("sweeps", {}).items()]


def plot_sweeps(file: Path, sweeps: Sweeps) -> bool:
    """Draws each measure along each axis, one line per contestant; returns False where matplotlib is not installed."""

    def draw(pyplot: Any) -> Any:
        size = (2.4 * len(sweeps), 5.4)
        figure, grid = pyplot.subplots(len(_MEASURES), len(sweeps), figsize=size, layout="constrained", squeeze=False)
        for column, (axis, points) in enumerate(sweeps.items()):
            names = list(dict.fromkeys(name for reports in points.values() for name in reports))
            for row, (title, measure) in enumerate(_MEASURES.items()):
                axes = grid[row][column]
                for name in names:
                    drawn = {at: measure(runs[name]) for at, runs in enumerate(points.values()) if name in runs}
                    axes.plot(list(drawn), list(drawn.values()), marker="o", label=name)
                axes.set_xticks(range(len(points)), [f"{int(at):,}" if at.isdigit() else at for at in points])
                axes.set_ylim(bottom=0)
                axes.grid(alpha=0.3)
                if not column:
                    axes.set_ylabel(title)
            grid[-1][column].set_xlabel(axis)
        lines, names = grid[0][0].get_legend_handles_labels()
        figure.legend(lines, names, loc="outside upper center", ncols=len(names))
        return figure

    return save_svg(file, draw, {"svg.hashsalt": "train", "font.size": 8})
