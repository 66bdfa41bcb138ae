"""Measures speed, memory and packing of the data stage, TRL's SFTTrainer and the bare tokenizer.

    python benchmarks/data.py                          # everything, about ten minutes on two cores
    python benchmarks/data.py --rows 20000 --rounds 1 --parts compare

What is measured and how: benchmarks/README.md. The figures are printed, written to RESULTS.md and data.svg in `--out`,
and with `--json FILE` to a file. TRL is measured when it is installed (requirements-bench.txt).
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

from rich.console import Console

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # for `python benchmarks/data.py`

from benchmarks._data_contestants import MAX_LENGTH
from benchmarks._measure import ROOT, added_memory, describe_machine, median, run_worker, speed, speed_and_range
from benchmarks._report import (
    Figures,
    Target,
    compare_with_targets,
    name_medians,
    save_svg,
    target_figures,
    write_section,
)
from benchmarks._runner import add_data_option, is_trl_measured, run_parts, show, wide_console

PARTS = ("compare", "packing", "scale")
CONTESTANTS = "benchmarks._data_contestants"
PACKAGES = ("trl", "transformers", "tokenizers", "datasets", "pyarrow", "numpy", "torch")
OURS, DISTINCT, TRL, TRL_2, BARE = "ours", "ours, no row twice", "TRL", "TRL, 2 processes", "encode_batch_fast"
Reports = dict[str, list[dict[str, Any]]]


class Benchmark:
    """Runs the measurements in order, each in its own process.

    Args:
        work: a folder for the inputs and the prepared data.
    """

    def __init__(self, options: argparse.Namespace, work: Path, console: Console) -> None:
        self._options, self._work, self._console = options, work, console
        self._with_trl = is_trl_measured(options, console)
        files = set(options.scale if "scale" in options.parts else [])
        compared = options.rows if "compare" in options.parts else None
        arguments = {
            "work": str(work),
            "source": str(options.data.resolve()),
            "tokenizer": str(options.tokenizer.resolve()) if options.tokenizer else None,
            "files": sorted(files | {compared} if compared else files),
            "compared": compared,
        }
        self._console.print("making the inputs ...")
        made = run_worker(CONTESTANTS, "inputs", arguments, work)
        self._tokenizer, self.data = made["tokenizer"], made["data"]

    def _file(self, name: int | str) -> str:
        return str(self._work / f"{name}.jsonl")

    def _take_turn(self, found: Reports, label: str, worker: str, **arguments: Any) -> None:
        """Adds a measurement to `found`; when TRL fails, it is skipped from then on."""
        try:
            report = run_worker(CONTESTANTS, worker, {"tokenizer": self._tokenizer, **arguments}, self._work)
        except RuntimeError as error:
            if not worker.startswith("trl"):
                raise
            found.pop(label, None)
            self._with_trl = False
            self._console.print(f"TRL failed and is skipped: {error}", markup=False, highlight=False)
        else:
            found.setdefault(label, []).append(report)
            self._console.print(f"{label}: {report['seconds']:.2f} s, {report['peak_mib']:.0f} MiB", highlight=False)

    def compare(self) -> Reports:
        """Compares the contestants, which take turns so that a slow minute of the machine hits them all."""
        file, found = self._file(self._options.rows), Reports()
        for round_number in range(self._options.rounds):
            self._take_turn(found, OURS, "ours", file=file)
            for label, processes in ((TRL, None), (TRL_2, 2)):
                if self._with_trl:
                    self._take_turn(found, label, "trl", file=file, processes=processes)
            self._take_turn(found, BARE, "bare", rendered=self._file("rendered"))
            if round_number == 0:
                self._take_turn(found, DISTINCT, "ours", file=self._file("distinct"))
        return found

    def packing(self) -> Reports:
        """Measures packing; TRL runs once, and also moves the tokens, of one byte each."""
        found = Reports()
        for _ in range(self._options.rounds):
            self._take_turn(found, OURS, "our_packing", lengths=self._options.lengths)
        if self._with_trl:
            self._take_turn(found, TRL, "trl_packing", lengths=self._options.lengths)
        return found

    def scale(self) -> dict[str, Any]:
        """Measures tokens per second by rows, and a second start of the largest set, from its cache."""
        by_rows: dict[str, dict[int, dict[str, Any]]] = {OURS: {}, TRL: {}}
        cache = str(self._work / "kept")
        largest = max(self._options.scale)
        for rows in self._options.scale:
            found = Reports()
            kept = {"cache": cache} if rows == largest else {}
            self._take_turn(found, OURS, "ours", file=self._file(rows), **kept)
            if self._with_trl and rows <= self._options.scale_trl:
                self._take_turn(found, TRL, "trl", file=self._file(rows), processes=None)
            for name, reports in found.items():
                by_rows[name][rows] = reports[0]
        second = Reports()
        for _ in range(self._options.rounds):
            self._take_turn(second, "second start", "ours", file=self._file(largest), cache=cache)
        if not all(report["from_cache"] for report in second["second start"]):
            raise RuntimeError("the second start did not use the cache of the first")
        return {"by_rows": by_rows, "second_start": second["second start"]}


def fill(report: dict[str, Any]) -> float:
    return report["tokens"] / (report["packed_rows"] * MAX_LENGTH)


def compared_figures(found: Reports, rows: int) -> Figures:
    speeds = ("tokens/s", "slowest–fastest")
    head = ("", "s", "CPU s", "tokens", *speeds, "peak MiB", "at start", "private", "packed rows", "fill")
    lines = []
    for name, reports in found.items():
        one = reports[0]
        seconds, cpu = f"{median(reports, 'seconds'):.2f}", f"{median(reports, 'cpu_s'):.1f}"
        memory = (f"{median(reports, key):,.0f}" for key in ("peak_mib", "ready_mib", "private_mib"))
        packed = (f"{one['packed_rows']:,}", f"{fill(one):.2%}") if "packed_rows" in one else ("", "")
        lines.append((name, seconds, cpu, f"{one['tokens']:,}", *speed_and_range(reports), *memory, *packed))
    return Figures(f"{rows:,} rows, {name_medians(found[OURS])}", head, lines)


def packing_figures(found: Reports, lengths: int) -> Figures:
    lines = [
        (name, f"{median(reports, 'seconds'):.2f}", f"{reports[0]['packed_rows']:,}", f"{fill(reports[0]):.3%}")
        for name, reports in found.items()
    ]
    title = f"Packing {lengths:,} documents, log-normal lengths with a mean of 196, at 2,048"
    return Figures(title, ("", "seconds", "rows", "fill"), lines)


def scale_figures(found: dict[str, Any]) -> list[Figures]:
    lines = [
        (name, f"{rows:,}", f"{one['seconds']:.1f}", f"{speed([one]):,.0f}", f"{one['peak_mib']:,.0f}")
        for name, by_rows in found["by_rows"].items()
        for rows, one in by_rows.items()
    ]
    second = found["second_start"]
    rows = max(found["by_rows"][OURS])
    imports, done = median(second, "ready_s"), median(second, "done_s")
    head = ("", "data stage, s", "imports and tokenizer before it, s", "both, s", "peak MiB")
    values = [f"{median(second, 'seconds'):.2f}", f"{imports:.2f}", f"{done:.2f}", f"{median(second, 'peak_mib'):,.0f}"]
    return [
        Figures("Tokens per second by rows", ("", "rows", "seconds", "tokens/s", "peak MiB"), lines),
        Figures(f"A second start of {rows:,} rows, from the cache", head, [("ours", *values)]),
    ]


def targets(results: dict[str, Any]) -> list[dict[str, Any]]:
    """Compares what was measured with its targets."""
    found: list[Target] = []
    if compared := results.get("compare"):
        rivals = [name for name in (TRL, TRL_2) if name in compared]
        ours = compared[OURS]
        found += [(f"tokens/s, times those of {r}", speed(ours) / speed(compared[r]), ">=", 3) for r in rivals]
        found.append((f"tokens/s, share of {BARE}", speed(ours) / speed(compared[BARE]), ">=", 0.8))
        for rival in rivals:
            share = median(ours, "peak_mib") / median(compared[rival], "peak_mib")
            found.append((f"peak memory, share of that of {rival}", share, "<=", 0.5))
            share = added_memory(ours) / added_memory(compared[rival])
            found.append((f"memory that the work adds, share of that of {rival}", share, "", 0))
    if packed := results.get("packing"):
        found.append(("fill of log-normal lengths", fill(packed[OURS][0]), ">=", 0.998))
        found.append(("seconds to pack them", median(packed[OURS], "seconds"), "<=", 2))
    if scaled := results.get("scale"):
        found.append(("seconds of a second start", median(scaled["second_start"], "seconds"), "<=", 1))
        speeds = [speed([one]) for one in scaled["by_rows"][OURS].values()]
        found.append(("slowest by fastest tokens/s over the numbers of rows", min(speeds) / max(speeds), "", 0))
    return compare_with_targets(found)


def read_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=75_000, help="rows that each contestant prepares")
    parser.add_argument("--rounds", type=int, default=3, help="turns that each contestant takes")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS)
    parser.add_argument("--lengths", type=int, default=1_000_000, help="documents to pack, for `packing`")
    parser.add_argument("--scale", type=int, nargs="+", default=[10_000, 100_000, 1_000_000], help="rows, for `scale`")
    parser.add_argument("--scale-trl", type=int, default=10_000, help="most rows that TRL prepares for `scale`")
    add_data_option(parser)
    parser.add_argument("--tokenizer", type=Path, help="a tokenizer's folder; default: one trained on the data")
    parser.add_argument("--without-trl", action="store_true")
    parser.add_argument("--work", type=Path, help="folder for temporary files; some 4 GB for a million rows")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks", help="folder of RESULTS.md and data.svg")
    parser.add_argument("--json", type=Path, help="also write all figures to this file")
    return parser.parse_args()


def main() -> int:
    options, console = read_options(), wide_console()
    results, failed = run_parts(Benchmark, options, console, PACKAGES)
    results["targets"] = targets(results)
    tables = all_figures(results, options)
    show(console, tables, results, options)
    write_report(options.out, results, tables)
    return min(failed, 1)


def all_figures(results: dict[str, Any], options: argparse.Namespace) -> list[Figures]:
    tables = [target_figures(results["targets"], digits=4)]
    if "compare" in results:
        tables.append(compared_figures(results["compare"], options.rows))
    if "packing" in results:
        tables.append(packing_figures(results["packing"], options.lengths))
    if "scale" in results:
        tables += scale_figures(results["scale"])
    return tables


def write_report(folder: Path, results: dict[str, Any], tables: list[Figures]) -> None:
    """Writes the section `## Data` of RESULTS.md, and the plot."""
    text = [describe_machine(results["machine"]), f"Rows: {results['data']}.", *(table.markdown() for table in tables)]
    if "scale" in results:
        by_name = results["scale"]["by_rows"].items()
        speeds = {name: {rows: speed([one]) for rows, one in by_rows.items()} for name, by_rows in by_name}
        if TRL in results.get("compare", {}):
            speeds[TRL][int(results["options"]["rows"])] = speed(results["compare"][TRL])
        if plot_scaling(folder / "data.svg", speeds):
            text.append("![tokens per second by rows](data.svg)")
    write_section(folder / "RESULTS.md", "Data", text)


def plot_scaling(file: Path, speeds: dict[str, dict[int, float]]) -> bool:
    """Draws tokens per second by rows, one line per contestant; returns False where matplotlib is not installed."""

    def draw(pyplot: Any) -> Any:
        figure, axes = pyplot.subplots(figsize=(6, 3.2), layout="constrained")
        for name, by_rows in speeds.items():
            if by_rows:
                rows = sorted(by_rows)
                axes.plot(rows, [by_rows[n] / 1e6 for n in rows], marker="o", label=name)
        axes.set_xscale("log")
        axes.xaxis.set_major_formatter(lambda rows, _: f"{rows:,.0f}")
        axes.set_ylim(bottom=0)
        axes.set_xlabel("rows")
        axes.set_ylabel("million tokens/s")
        axes.grid(alpha=0.3)
        figure.legend(loc="outside upper center", ncols=len(speeds))
        return figure

    return save_svg(file, draw, {"svg.hashsalt": "data"})


if __name__ == "__main__":
    sys.exit(main())
