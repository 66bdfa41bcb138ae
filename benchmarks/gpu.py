"""Measures speed and memory of training on one GPU, for this pipeline and the peers that are installed.

    benchmarks/gpu.sh                                              # everything; hours
    python benchmarks/gpu.py --sizes 0.6B --methods full --lengths 4096
    python benchmarks/gpu.py --device cpu --scale tiny             # runs every path without a GPU

What is measured and how: benchmarks/README.md. Each figure is printed and written at once to the file `--json` and to
the section `## One GPU` of RESULTS.md in `--out`. Earlier figures of the file are kept and shown, so the work can be
done in pieces.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import shutil
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import asdict
from operator import itemgetter
from pathlib import Path
from typing import Any

from rich.console import Console

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # for `python benchmarks/gpu.py`

from benchmarks._gpu_report import all_figures, device_line
from benchmarks._measure import ROOT, machine, run_worker
from benchmarks._models import GPU_SHAPES, Shape
from benchmarks._report import write_section
from benchmarks._runner import add_data_option, wide_console
from benchmarks._training_inputs import Contestant
from sft.training.mfu import peak_flops_by_name

METHODS = ("full", "full 8-bit", "lora", "qlora")
PACKAGES = ("torch", "transformers", "peft", "bitsandbytes", "trl", "liger_kernel", "cut_cross_entropy", "flash_attn")
WORKERS, HEADS = "benchmarks._train_contestants", "benchmarks._head_contestants"
OUT_OF_MEMORY = "out of memory"
HEAD_CONTESTANTS = {
    "ours": (),
    "torch_plain": (),
    "torch_compiled": (),
    "liger": ("liger_kernel",),
    "cut_cross_entropy": ("cut_cross_entropy",),
    "trl": ("trl",),
}


def is_installed(packages: tuple[str, ...]) -> bool:
    """Returns whether all packages can be imported."""
    return all(importlib.util.find_spec(package) for package in packages)


def list_contestants(method: str) -> list[Contestant]:
    """Returns the contestants that are installed; the bare loop has neither 8-bit states nor quantization."""
    attention = "flash_attention_2" if importlib.util.find_spec("flash_attn") else "sdpa"
    packed = {
        "model_init_kwargs": {"dtype": "bfloat16", "attn_implementation": attention},
        "packing": True,
        "packing_strategy": "bfd",
    }
    uncheckpointed = {**packed, "gradient_checkpointing": False}
    contestants = [
        Contestant("ours", "ours"),
        Contestant("bare loop", "bare"),
        Contestant("Trainer, bf16", "plain"),
        Contestant("Trainer, Liger", "plain", ("liger_kernel",), {"use_liger_kernel": True}),
        Contestant("Trainer, CCE", "plain", ("cut_cross_entropy",), extra={"cut_cross_entropy": True}),
        Contestant("TRL", "trl", ("trl",)),
        Contestant("TRL, packed", "trl", ("trl",), packed),
        Contestant("TRL, packed, no checkpointing", "trl", ("trl",), uncheckpointed),
        Contestant("TRL, packed, Liger", "trl", ("trl", "liger_kernel"), {**uncheckpointed, "use_liger_kernel": True}),
    ]
    return [c for c in contestants if is_installed(c.needs) and (c.worker != "bare" or method in ("full", "lora"))]


class Benchmark:
    """Runs the measurements in order, each in its own process.

    Args:
        work: a folder for the rows and one model at a time.
    """

    def __init__(self, options: argparse.Namespace, work: Path, console: Console) -> None:
        self._options, self._work, self._console = options, work, console
        arguments = {"work": str(work), "source": str(options.data.resolve()), "shapes": {}}
        arguments["files"] = {"rows": {"rows": options.rows, "joined": 1}}
        console.print("making the rows ...")
        made = run_worker(WORKERS, "inputs", arguments, work)
        self.data, self._mean, self._tokenizer = made["data"], made["means"]["rows"], made["tokenizer"]

    def train(self) -> Iterator[list[dict[str, Any]]]:
        """Yields the results of each size, method and length; only one model folder exists at a time."""
        for size in self._options.sizes:
            shape, folder = GPU_SHAPES[self._options.scale][size], self._work / size
            given = {"folder": str(folder), "shape": asdict(shape), "tokenizer": self._tokenizer}
            made = self._record(f"make {size}", WORKERS, "model_on_device", {**given, "device": self._options.device})
            for method in self._options.methods:
                for length in self._options.lengths:
                    yield self._compare(size, shape, method, length, made)
            shutil.rmtree(folder, ignore_errors=True)

    def _compare(self, size: str, shape: Shape, method: str, length: int, made: dict[str, Any]) -> list[dict[str, Any]]:
        who = list_contestants(method)
        runs: dict[str, list[dict[str, Any]]] = {contestant.name: [] for contestant in who}
        if "failed" in made:  # no model, no training
            runs = {name: [made] for name in runs}
        for _ in range(self._options.rounds):
            for contestant in who:
                if not any("failed" in run for run in runs[contestant.name]):  # it would only fail again
                    runs[contestant.name].append(self._run(contestant, size, method, length))
        at = {"size": size, "method": method, "length": length}
        operations = shape.operations(frozen=method in ("lora", "qlora"))
        at |= {"flops_per_token": operations, "pass_tokens": self._options.pass_tokens}
        return [{**at, "name": name, "runs": of_it} for name, of_it in runs.items()]

    def _run(self, who: Contestant, size: str, method: str, length: int) -> dict[str, Any]:
        options = self._options
        packed_rows = max(1, options.pass_tokens // length)
        eight_bits = {"optim": "adamw_8bit"} if method == "full 8-bit" else {}
        ours = options.ours if who.worker == "ours" else {}
        step_tokens = options.step_tokens
        if (size, method) == ("8B", "full 8-bit"):
            # 48 GB of weights, master weights and states leave no memory for float32 gradients (32 GB), which gradient
            # accumulation needs, nor for all activations. TRL checkpoints activations by default.
            step_tokens = options.pass_tokens
            ours = {"activation_checkpoint": {"mode": "full"}, **ours} if who.worker == "ours" else ours
        given = {
            "device": options.device,
            "max_length": length,
            "step_tokens": step_tokens,
            "packed_rows": packed_rows,
            "micro_batches": max(1, step_tokens // (packed_rows * length)),
            "micro_rows": max(1, round(options.pass_tokens / self._mean)),
            "steps": options.steps,
            "warm_up": options.warm_up,
            "settings": {**who.settings, **eight_bits, **ours},
            "lora": method in ("lora", "qlora"),
            "quantized": method == "qlora",
        }
        arguments = who.arguments(self._work / size, self._work / "rows", self._mean, **given)
        return self._record(f"{size} {method} {length:,} {who.name}", WORKERS, who.worker, arguments)

    def head(self) -> dict[str, list[dict[str, Any]]]:
        """Measures the output layer and the loss at one shape."""
        tokens, vocabulary, width = self._options.head
        arguments = {"device": self._options.device, "tokens": tokens, "vocabulary": vocabulary, "width": width}
        runs: dict[str, list[dict[str, Any]]] = {}
        for _ in range(self._options.rounds):
            for name, needs in HEAD_CONTESTANTS.items():
                if is_installed(needs) and not any("failed" in run for run in runs.get(name, [])):
                    report = self._record(f"head {name}", HEADS, name, {**arguments, "repeats": self._options.repeats})
                    runs.setdefault(name, []).append(report)
        return runs

    def _record(self, label: str, module: str, worker: str, arguments: dict[str, Any]) -> dict[str, Any]:
        """Returns the report of a run; a failed run is a result too."""
        try:
            report = run_worker(module, worker, arguments, self._work)
        except RuntimeError as error:
            lacks = "out of memory" in str(error).lower() or "outofmemory" in str(error).lower()
            report = {"failed": OUT_OF_MEMORY if lacks else str(error).strip().splitlines()[-1]}
            self._console.print(label, report["failed"] if lacks else str(error), markup=False, highlight=False)
            return report
        if "ms" in report:
            took = f"{report['ms']:.1f} ms"
        else:
            took = f"{report['tokens'] / report['seconds']:,.0f} tokens/s" if "tokens" in report else "done"
        self._console.print(f"{label}: {took}", highlight=False)
        return report


def read_options(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--scale", choices=tuple(GPU_SHAPES), default="real", help="tiny: every path, no real figures")
    parser.add_argument("--parts", nargs="+", choices=("train", "head"), default=("train", "head"))
    parser.add_argument("--sizes", nargs="+", choices=tuple(GPU_SHAPES["real"]), default=tuple(GPU_SHAPES["real"]))
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=METHODS)
    parser.add_argument("--lengths", nargs="+", type=int, default=[4096, 8192], help="tokens of a packed row")
    parser.add_argument("--pass-tokens", type=int, default=8192, help="tokens that go through the model together")
    parser.add_argument("--step-tokens", type=int, default=16_384, help="tokens of an optimizer step")
    parser.add_argument("--steps", type=int, default=24)
    parser.add_argument("--warm-up", type=int, default=8, help="first steps that are not timed")
    parser.add_argument("--rounds", type=int, default=1, help="turns that each contestant takes")
    parser.add_argument("--rows", type=int, default=20_000, help="chats to train on")
    head = [16_384, 248_320, 2048]
    parser.add_argument("--head", nargs=3, type=int, default=head, metavar=("TOKENS", "VOCABULARY", "WIDTH"))
    parser.add_argument("--repeats", type=int, default=20, help="timed repeats for `head`")
    parser.add_argument("--ours", type=json.loads, default={}, help="more config keys for ours, as JSON")
    add_data_option(parser)
    parser.add_argument("--work", type=Path, help="folder for temporary files; 34 GB for the largest model, twice")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks", help="folder of RESULTS.md")
    parser.add_argument("--json", type=Path, help="file of all figures; those it has are kept")
    options = parser.parse_args(argv)
    if options.steps < 2 * options.warm_up:
        parser.error("--steps must be at least twice --warm-up: logs are written every --warm-up steps")
    return options


def describe_device(kind: str) -> dict[str, Any]:
    """Returns the GPU's name, memory, and bfloat16 peak by its data sheet, where that is known."""
    import torch

    if kind == "cpu":
        return {"name": "no GPU: a trial of the script", "memory_gib": None, "peak": None}
    if not torch.cuda.is_available():
        raise SystemExit("no CUDA GPU was found; `--device cpu --scale tiny` tries the script without one")
    facts = torch.cuda.get_device_properties(0)
    memory = round(facts.total_memory / 2**30, 1)
    return {"name": facts.name, "memory_gib": memory, "peak": peak_flops_by_name(facts.name)}


def read_earlier(file: Path | None, device: str) -> dict[str, Any]:
    """Reads the earlier figures of `--json`; empty without a file."""
    if file is None or not file.is_file():
        return {}
    found: dict[str, Any] = json.loads(file.read_text())
    if found["device"]["name"] != device:
        raise SystemExit(f"{file} has figures of {found['device']['name']}, and this is {device}: name another file")
    return found


def merge_runs(found: list[dict[str, Any]], new: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Returns `found` with `new`, which replaces earlier results of the same measurement."""
    key = itemgetter("size", "method", "length", "pass_tokens", "name")
    keys = set(map(key, new))
    return [one for one in found if key(one) not in keys] + new


def write(results: dict[str, Any], options: argparse.Namespace) -> None:
    """Writes all figures so far, as tables and as JSON."""
    text = [device_line(results), *(table.markdown() for table in all_figures(results))]
    write_section(options.out / "RESULTS.md", "One GPU", text)
    if options.json:
        unfinished = options.json.with_suffix(".unfinished")
        unfinished.write_text(json.dumps(results, indent=1))
        unfinished.replace(options.json)


def main() -> int:
    options, console = read_options(), wide_console()
    device = describe_device(options.device)
    results = read_earlier(options.json, device["name"]) | {"machine": machine(PACKAGES), "device": device}
    results |= {"options": {key: str(value) for key, value in vars(options).items()}}
    now: list[dict[str, Any]] = []  # our runs
    with tempfile.TemporaryDirectory(prefix="gpu_benchmark_", dir=options.work) as work:
        benchmark = Benchmark(options, Path(work), console)
        results["data"] = benchmark.data
        if "train" in options.parts:
            for compared in benchmark.train():
                results["train"] = merge_runs(results.get("train", []), compared)
                now += [run for one in compared if one["name"] == "ours" for run in one["runs"]]
                write(results, options)
        if "head" in options.parts:
            results |= {"head": benchmark.head(), "head_shape": options.head}
            now += results["head"].get("ours", [])
            write(results, options)
    for table in all_figures(results):
        table.show(console)
    return int(any(run.get("failed", OUT_OF_MEMORY) != OUT_OF_MEMORY for run in now))


if __name__ == "__main__":
    sys.exit(main())
