"""Measures speed and memory of training: this pipeline, transformers.Trainer, TRL's SFTTrainer, a bare PyTorch loop.

    python benchmarks/train.py             # everything; almost an hour on two cores
    python benchmarks/train.py --quick     # the speeds of full training, one round: some two minutes

What is measured and how: benchmarks/README.md. The figures are printed, written to the section `## Training` of
RESULTS.md and to train.svg in `--out`, and with `--json FILE` to a file. TRL is measured when it is installed
(requirements-bench.txt).
"""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.console import Console

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # for `python benchmarks/train.py`

from benchmarks._measure import ROOT, describe_machine, run_worker
from benchmarks._models import Shape, square
from benchmarks._report import write_section
from benchmarks._runner import add_data_option, is_trl_measured, run_parts, show, wide_console
from benchmarks._training_inputs import Contestant
from benchmarks._training_report import Reports, Sweeps, all_figures, plot_sweeps, targets

PARTS = ("speed", "process", "memory", "sweeps")
METHODS = ("full", "lora")
WORKERS = "benchmarks._train_contestants"
PACKAGES = ("trl", "transformers", "accelerate", "peft", "datasets", "torch")

OURS = Contestant("ours", "ours")
BARE = Contestant("bare loop", "bare")  # takes the dtype that ours chooses
PLAIN = Contestant("Trainer, bf16", "plain")
PLAIN_32 = Contestant("Trainer, float32", "plain", extra={"dtype": "float32"})
TRL = Contestant("TRL", "trl")
_BF16 = {
    "model_init_kwargs": {"dtype": "bfloat16", "attn_implementation": "sdpa"},
    "bf16": False,  # the weights are bfloat16; autocast would only cost time
    "gradient_checkpointing": False,
}
TRL_PACKED = Contestant("TRL, packed", "trl", settings={**_BF16, "packing": True, "packing_strategy": "bfd"})
# Other settings that may be TRL's fastest on some machine: each runs once, and the fastest joins the rounds.
TRL_OTHERS = (
    Contestant("TRL, packed at 1,024", "trl", settings={**TRL_PACKED.settings, "max_length": 1024}),
    Contestant("TRL, padded", "trl", settings=_BF16),
    Contestant("TRL, grouped", "trl", settings={**_BF16, "train_sampling_strategy": "group_by_length"}),
)


class Benchmark:
    """Runs the measurements in order, each in its own process.

    Args:
        work: a folder for the inputs, the models and the runs.
    """

    def __init__(self, options: argparse.Namespace, work: Path, console: Console) -> None:
        self._options, self._work, self._console = options, work, console
        self._with_trl = is_trl_measured(options, console)
        self._models: dict[str, Shape] = {"model": square(options.layers, options.width, options.vocabulary)}
        self._files: dict[str, dict[str, int]] = {"rows": {"rows": options.rows, "joined": 1}}
        if "memory" in options.parts:
            self._models["large_head"] = square(options.layers, options.width, options.large_vocabulary, tied=True)
        self._axes = self._plan_sweeps() if "sweeps" in options.parts else {}
        self._console.print("making the inputs ...")
        arguments = {"work": str(work), "source": str(options.data.resolve()), "files": self._files}
        shapes = {name: asdict(shape) for name, shape in self._models.items()}
        made = run_worker(WORKERS, "inputs", {**arguments, "shapes": shapes}, work)
        self.data, self._means = made["data"], made["means"]

    def _plan_sweeps(self) -> dict[str, dict[str, tuple[str, str]]]:
        """Returns for each axis, by value, the names of its model and file; adds those that must be made.

        A point that several axes share has the same names on each, and is measured once.
        """
        options, models, files = self._options, self._models, self._files
        axes: dict[str, dict[str, tuple[str, str]]] = {"vocabulary": {}, "layers x width": {}, "length": {}, "rows": {}}
        for vocabulary in options.sweep_vocabulary:
            shape = square(options.layers, options.width, vocabulary)
            axes["vocabulary"][str(vocabulary)] = find_name(models, shape, "model"), "rows"
        for size in options.sweep_size:
            layers, width = map(int, size.split("x"))
            shape = square(layers, width, options.vocabulary)
            axes["layers x width"][size] = find_name(models, shape, "model"), "rows"
        for joined in options.sweep_joined:
            content = {"rows": max(64, options.rows // joined), "joined": joined}
            axes["length"][str(joined)] = "model", find_name(files, content, "rows")
        for rows in options.sweep_rows:
            axes["rows"][str(rows)] = "model", find_name(files, {"rows": rows, "joined": 1}, "rows")
        return axes

    def _train(
        self, who: Contestant, label: str, model: str = "model", file: str = "rows", **arguments: Any
    ) -> dict[str, Any]:
        options = self._options
        given = {
            "device": "cpu",
            "max_length": options.max_length,
            "step_tokens": options.step_tokens,
            "packed_rows": max(1, round(options.step_tokens / options.max_length)),
            "micro_batches": 1,
            "micro_rows": 8,
            "steps": options.steps,
            "warm_up": options.warm_up,
            "settings": options.ours if who is OURS else who.settings,
            **arguments,
        }
        given = who.arguments(self._work / model, self._work / file, self._means[file], **given)
        report = run_worker(WORKERS, who.worker, given, self._work)
        speed = report["tokens"] / report["seconds"]
        line = f"{label}: {speed:,.0f} tokens/s, {report['wall_s']:.1f} s, {report['peak_mib']:,.0f} MiB"
        self._console.print(line, highlight=False)
        return report

    def _take_turn(self, found: Reports, who: Contestant, label: str, **arguments: Any) -> None:
        """Adds a measurement to `found`; a rival that fails is printed and skipped."""
        if who.worker == "trl" and not self._with_trl:
            return
        try:
            report = self._train(who, f"{label}, {who.name}", **arguments)
        except RuntimeError as error:
            if who.worker in ("ours", "bare"):
                raise
            self._console.print(f"{label}: {who.name} failed and is skipped: {error}", markup=False, highlight=False)
        else:
            found.setdefault(who.name, []).append(report)

    def speed(self) -> dict[str, Any]:
        """Measures tokens per second; the contestants take turns, so a slow minute of the machine hits them all."""
        return {method: self._speed(method) for method in self._options.methods}

    def _speed(self, method: str) -> dict[str, Any]:
        lora = method == "lora"
        rivals = [PLAIN, PLAIN_32, TRL, TRL_PACKED]
        heats: Reports = {}
        if self._with_trl and not self._options.quick:
            for who in (TRL_PACKED, *TRL_OTHERS):
                self._take_turn(heats, who, f"heat, {method}", lora=lora)
            fastest = max(heats, key=lambda name: heats[name][0]["tokens"] / heats[name][0]["seconds"], default="")
            rivals += [who for who in TRL_OTHERS if who.name == fastest]
        found: Reports = {}
        for turn in range(self._options.rounds):
            for who in (OURS, BARE, *rivals):
                self._take_turn(found, who, f"{method}, round {turn + 1}", lora=lora)
        return {"rounds": found, "heats": heats}

    def process(self) -> Reports:
        """Measures whole short runs, from the start of the process to its end, with checkpoint and final model."""
        found: Reports = {}
        for turn in range(self._options.rounds):
            for who in (OURS, PLAIN, TRL, TRL_PACKED):
                label = f"process, round {turn + 1}"
                self._take_turn(found, who, label, steps=self._options.process_steps, save=True)
        return found

    def memory(self) -> Reports:
        """Measures peak memory with a large vocabulary and all tokens of a step in one micro-batch."""
        found: Reports = {}
        for who in (OURS, PLAIN, PLAIN_32, TRL, TRL_PACKED):
            arguments = {"micro_rows": 1_000_000, "steps": 2 * self._options.warm_up}
            self._take_turn(found, who, "memory", model="large_head", **arguments)
        return found

    def sweeps(self) -> Sweeps:
        """Measures speed, time of a whole run and peak memory along each axis, one run per point."""
        found: Sweeps = {}
        measured: dict[tuple[str, str], Reports] = {}
        steps = self._options.sweep_steps
        for axis, points in self._axes.items():
            for value, (model, file) in points.items():
                at = str(round(self._means[file])) if axis == "length" else value
                if (model, file) not in measured:
                    reports = measured[model, file] = {}
                    for who in (OURS, PLAIN, TRL, TRL_PACKED):
                        label = f"{axis} {at}"
                        self._take_turn(reports, who, label, steps=steps, save=True, model=model, file=file)
                found.setdefault(axis, {})[at] = {name: one[0] for name, one in measured[model, file].items()}
        return found


def find_name(known: dict[str, Any], content: Any, prefix: str) -> str:
    """Returns the name of `content` in `known`, to which it is added if it is new."""
    name = next((name for name, other in known.items() if other == content), f"{prefix}_{len(known)}")
    known[name] = content
    return name


def read_options(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="one round of the speeds of full training")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS)
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=METHODS, help="for `speed`")
    parser.add_argument("--rounds", type=int, default=3, help="turns that each contestant takes")
    parser.add_argument("--steps", type=int, default=10, help="optimizer steps of a run")
    parser.add_argument("--warm-up", type=int, default=2, help="first steps that are not timed")
    parser.add_argument("--process-steps", type=int, default=12, help="steps of a run for `process`")
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--width", type=int, default=512, help="of the hidden states, a multiple of 64")
    parser.add_argument("--vocabulary", type=int, default=32_000)
    parser.add_argument("--large-vocabulary", type=int, default=151_936, help="for `memory`, with tied embeddings")
    parser.add_argument("--max-length", type=int, default=2048, help="limit of a row and of a packed sequence")
    parser.add_argument("--step-tokens", type=int, default=4096, help="tokens of an optimizer step")
    parser.add_argument("--rows", type=int, default=7473, help="chats to train on")
    parser.add_argument("--sweep-steps", type=int, default=6)
    parser.add_argument("--sweep-vocabulary", type=int, nargs="*", default=[32_000, 64_000, 151_936])
    parser.add_argument("--sweep-size", nargs="*", default=["2x256", "4x512", "8x768"], metavar="LAYERSxWIDTH")
    parser.add_argument(
        "--sweep-joined", type=int, nargs="*", default=[1, 3, 10], help="questions in a row: its length"
    )
    parser.add_argument("--sweep-rows", type=int, nargs="*", default=[1_000, 7_473, 50_000])
    parser.add_argument("--ours", type=json.loads, default={}, help="more config keys for ours, as JSON")
    add_data_option(parser)
    parser.add_argument("--without-trl", action="store_true")
    parser.add_argument("--work", type=Path, help="folder for temporary files; some 4 GB")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks", help="folder of RESULTS.md and train.svg")
    parser.add_argument("--json", type=Path, help="also write all figures to this file")
    options = parser.parse_args(argv)
    if options.quick:
        options.parts, options.methods, options.rounds, options.steps, options.warm_up = ("speed",), ("full",), 1, 4, 1
    if min(options.steps, options.process_steps, options.sweep_steps) < 2 * options.warm_up:
        parser.error("each number of steps must be at least twice --warm-up: logs are written every --warm-up steps")
    return options


def main() -> int:
    options, console = read_options(), wide_console()
    results, failed = run_parts(Benchmark, options, console, PACKAGES)
    results["targets"] = targets(results)
    tables = all_figures(results)
    show(console, tables, results, options)
    write_report(options, results, [table.markdown() for table in tables])
    return min(failed, 1)


def write_report(options: argparse.Namespace, results: dict[str, Any], tables: list[str]) -> None:
    """Writes the section `## Training` of RESULTS.md, and the plot."""
    text = [
        describe_machine(results["machine"]),
        f"Rows: {results['data']}. Model: a Llama of {options.layers} layers, width {options.width}, "
        f"{options.vocabulary:,} tokens, randomly initialized; {options.step_tokens:,} tokens per step.",
        *tables,
    ]
    if results.get("sweeps") and plot_sweeps(options.out / "train.svg", results["sweeps"]):
        text.append("![speed, time and memory along each axis](train.svg)")
    write_section(options.out / "RESULTS.md", "Training", text)


if __name__ == "__main__":
    sys.exit(main())
