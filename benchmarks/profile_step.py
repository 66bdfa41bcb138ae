"""Profiles the command's start, by import and log line, and its training steps, by operation.

    python benchmarks/profile_step.py                          # both, for a small random model on the CPU
    python benchmarks/profile_step.py --config my.yaml --steps 8 --parts step

Start: the command runs for one step under `python -X importtime`; its output is printed with the seconds in front.
Step: optimizer steps of the same run under torch.profiler, after `--warm-up` steps. The text is printed, and written to
`--out`.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any
from unittest import mock

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # for `python benchmarks/profile_step.py`

from benchmarks._measure import ROOT, run_worker
from benchmarks._models import square
from benchmarks._runner import add_data_option

PARTS = ("start", "step")
_IMPORT = re.compile(r"import time:\s+(\d+) \|\s+(\d+) \| *(\S+)")


def make_config(work: Path, options: argparse.Namespace) -> dict[str, Any]:
    """Makes the training benchmark's model and rows in `work`; returns a config for them."""
    shape = square(options.layers, options.width, options.vocabulary)
    rows = {"rows": {"rows": 2000, "joined": 1}}
    arguments = {"work": str(work), "source": str(options.data), "files": rows, "shapes": {"model": asdict(shape)}}
    run_worker("benchmarks._train_contestants", "inputs", arguments, work)
    return {
        "model_name_or_path": str(work / "model"),
        "train_file": str(work / "rows.jsonl"),
        "per_device_train_batch_size": 2,
    }


def list_imports(output: str, longest: int) -> str:
    """Lists the slowest imports, nested imports included, from the output of `-X importtime`."""
    found = sorted(((int(total), int(own), name) for own, total, name in _IMPORT.findall(output)), reverse=True)
    lines = [f"{total / 1e6:8.2f} {own / 1e6:8.2f}  {name}" for total, own, name in found[:longest]]
    return "\n".join([f"{'seconds':>8} {'own':>8}  module", *lines])


def profile_start(config_file: Path, longest: int) -> str:
    """Runs the command for one step; returns its slowest imports and its output with times."""
    command = [sys.executable, "-X", "importtime", str(ROOT / "sft_main.py"), "--config_file", str(config_file)]
    started = time.perf_counter()
    process = subprocess.Popen(
        [*command, "max_steps=1"], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, bufsize=1
    )
    import_lines, timed = [], []
    assert process.stdout is not None
    for line in process.stdout:
        if _IMPORT.match(line):
            import_lines.append(line)
        elif line.strip() and not line.startswith("import time:"):
            timed.append(f"{time.perf_counter() - started:8.2f}  {line.rstrip()}")
    if process.wait():
        raise SystemExit("\n".join(timed))
    whole = time.perf_counter() - started
    slowest = list_imports("".join(import_lines), longest)
    return "\n".join([slowest, "", " seconds  output", *timed, f"{whole:8.2f}  the end"])


@contextlib.contextmanager
def profiled_steps(warm_up: int, found: list[Any]) -> Iterator[None]:
    """Profiles the optimizer steps after the first `warm_up` of the training in this block."""
    import torch
    from torch.profiler import ProfilerActivity, profile
    from transformers import Trainer, TrainerCallback

    activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * torch.cuda.is_available()
    profiler = profile(activities=activities, acc_events=True)

    class Watch(TrainerCallback):
        started = 0.0

        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if state.global_step == warm_up:
                profiler.start()
                Watch.started = time.perf_counter()
            elif state.global_step == state.max_steps:
                seconds = time.perf_counter() - Watch.started
                profiler.stop()
                found.extend((profiler, seconds, state.global_step - warm_up))

    original = Trainer.train

    def train(trainer: Any, *args: Any, **kwargs: Any) -> Any:
        trainer.add_callback(Watch)
        return original(trainer, *args, **kwargs)

    with mock.patch.object(Trainer, "train", train):
        yield


def profile_step(config_file: Path, steps: int, warm_up: int, longest: int) -> str:
    """Runs the command in this process; returns the operations of its steps, by their own time."""
    import sft_main

    found: list[Any] = []
    with profiled_steps(warm_up, found):
        code = sft_main.main(["--config_file", str(config_file), f"max_steps={warm_up + steps}"])
    if code or not found:
        raise SystemExit(f"the run ended with {code} before it was profiled")
    profiler, seconds, taken = found
    events = profiler.key_averages()
    on_gpu = any(event.self_device_time_total for event in events)
    key = "self_device_time_total" if on_gpu else "self_cpu_time_total"
    table = events.table(sort_by=key, row_limit=longest, max_name_column_width=60)
    share = sum(event.self_cpu_time_total for event in events) / 1e6 / seconds
    return f"{seconds / taken:.3f} s per step over {taken} steps; torch operations take {share:.1%} of it\n{table}"


def read_options(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", type=Path, help="a config of yours; its output_dir is not touched")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS)
    parser.add_argument("--steps", type=int, default=4, help="optimizer steps that are profiled")
    parser.add_argument("--warm-up", type=int, default=2, help="steps before them")
    parser.add_argument("--longest", type=int, default=30, help="lines of a table")
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--width", type=int, default=512)
    parser.add_argument("--vocabulary", type=int, default=32_000)
    add_data_option(parser)
    parser.add_argument("--out", type=Path, help="a file for the text")
    return parser.parse_args(argv)


def main() -> int:
    options = read_options()
    texts = []
    with tempfile.TemporaryDirectory(prefix="profile_") as folder:
        work = Path(folder)
        if options.config:
            import yaml

            config = yaml.safe_load(options.config.read_text())
        else:
            config = make_config(work, options)
        for part in options.parts:
            file = work / f"{part}.json"  # JSON is YAML
            places = {"output_dir": str(work / part), "cache_dir": str(work / "cache"), "save_strategy": "no"}
            file.write_text(json.dumps({**config, **places, "eval_strategy": "no", "save_total_limit": None}))
            if part == "start":
                texts.append("START\n" + profile_start(file, options.longest))
            else:
                texts.append("STEP\n" + profile_step(file, options.steps, options.warm_up, options.longest))
    text = "\n\n".join(texts) + "\n"
    if options.out:
        options.out.write_text(text)
    print(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
