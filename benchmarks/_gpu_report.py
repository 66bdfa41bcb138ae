"""Tables and targets of the GPU benchmark."""

from __future__ import annotations

from statistics import median
from typing import Any

from benchmarks._report import Figures, is_met

# Targets for one H100 with 80 GB: tokens per second by model size and method, at any length.
H100_SPEEDS = {
    ("8B", "lora"): 13_500,
    ("8B", "full 8-bit"): 8_500,
    ("1.7B", "full"): 34_000,
    ("0.6B", "full"): 70_000,
}
H100_HEAD_MS, H100_HEAD_GB, H100_HEAD_SHAPE = 90, 3.0, [16_384, 248_320, 2048]
H100_8BIT_GB = 72
H100_QLORA_GIB, QLORA_OF_LORA = 7.0, 0.85  # memory with 2 sequences of 2,048 tokens
TIMES_TRL, TIMES_TRL_BEST = 1.5, 1.15
Measured = dict[str, Any]


def device_line(results: Measured) -> str:
    """Describes the machine and how the figures are computed."""
    at, device = results["machine"], results["device"]
    versions = ", ".join(f"{name} {version}" for name, version in at["versions"].items())
    memory = f", {device['memory_gib']} GiB" if device["memory_gib"] else ""
    peak = f"{device['peak'] / 1e12:,.1f} TFLOP/s" if device["peak"] else "unknown: no MFU"
    return (
        f"{device['name']}{memory}; {at['cpu']}, {at['system']}; {versions}. Rows: {results['data']}.\n\n"
        "Operations per token: 6 N for full training, 4 N where the weights are frozen; N counts the weights that a "
        "token is multiplied with, the output layer included, without embeddings, adapters, the matrix multiplications "
        f"of attention and recomputed activations. Dense bfloat16 peak by the data sheet: {peak}."
    )


def tokens_per_second(one: Measured) -> float | None:
    """Returns the median over the successful runs, None without any."""
    speeds = [run["tokens"] / run["seconds"] for run in one["runs"] if "failed" not in run]
    return median(speeds) if speeds else None


def _failure(runs: list[Measured]) -> str:
    return next((run["failed"] for run in runs if "failed" in run), "")


def _peak_gb(runs: list[Measured]) -> float | None:
    peaks = [run["device_peak_mib"] for run in runs if run.get("device_peak_mib") is not None]
    return max(peaks) * 2**20 / 1e9 if peaks else None


def all_figures(results: Measured) -> list[Figures]:
    """Returns the tables: targets that apply to this device, training by model size, the output layer."""
    tables = []
    if found := targets(results):
        lines = []
        for what, reached, sign, limit in found:
            shown = reached if isinstance(reached, str) else f"{reached:,.3g}"
            met = not isinstance(reached, str) and is_met(reached, sign, limit)
            lines.append((what, shown, f"{sign} {limit:,}", "yes" if met else "no"))
        tables.append(Figures("Targets", ("", "reached", "target", "met"), lines))
    sizes = dict.fromkeys(one["size"] for one in results.get("train", []))
    tables += [training_figures(size, results) for size in sizes]
    if "head" in results:
        tables.append(head_figures(results["head"], results["head_shape"]))
    return tables


def training_figures(size: str, results: Measured) -> Figures:
    """Returns the table of one model size, with all methods and lengths."""
    peak = results["device"]["peak"]
    lines = []
    for one in results["train"]:
        if one["size"] != size:
            continue
        speed, held = tokens_per_second(one), _peak_gb(one["runs"])
        mfu = f"{speed * one['flops_per_token'] / peak:.1%}" if speed and peak else ""
        shown = f"{speed:,.0f}" if speed else _failure(one["runs"])
        lines.append((one["method"], f"{one['length']:,}", one["name"], shown, mfu, f"{held:.1f}" if held else ""))
    return Figures(size, ("", "row", "who", "tokens/s", "MFU", "peak GB"), lines)


def head_figures(runs: dict[str, list[Measured]], shape: list[int]) -> Figures:
    """Returns the table of the output layer and the loss."""
    lines = []
    for name, of_it in runs.items():
        times, held = [run["ms"] for run in of_it if "ms" in run], _peak_gb(of_it)
        shown = f"{median(times):.1f}" if times else _failure(of_it)
        lines.append((name, shown, f"{held:.2f}" if held else ""))
    tokens, vocabulary, width = shape
    title = f"Output layer and loss, forward and backward: {tokens:,} tokens x {vocabulary:,} x {width:,}"
    return Figures(title, ("", "ms", "peak GB"), lines)


Target = tuple[str, float | str, str, float]
"""Name, value reached (or why there is none), comparison, target value."""


def targets(results: Measured) -> list[Target]:
    """Compares ratios to peers with their targets on any GPU, and absolute figures on an H100."""
    is_h100 = "H100" in results["device"]["name"]
    found: list[Target] = []
    places: dict[tuple[str, str, int, int], dict[str, Measured]] = {}
    for one in results.get("train", []) if results["device"]["memory_gib"] is not None else []:
        place = (one["size"], one["method"], one["length"], one["pass_tokens"])
        places.setdefault(place, {})[one["name"]] = one
    for (size, method, length, pass_tokens), by_name in places.items():
        what, ours = f"{size} {method} {length:,}", by_name["ours"]
        reached = tokens_per_second(ours)
        if is_h100 and (promised := H100_SPEEDS.get((size, method))):
            found.append((f"{what}: tokens/s", reached or _failure(ours["runs"]), ">=", promised))
        if reached is None:
            continue
        if is_h100 and (size, method) == ("8B", "full 8-bit") and (held := _peak_gb(ours["runs"])):
            found.append((f"{what}: peak GB", held, "<=", H100_8BIT_GB))
        is_small = (length, pass_tokens) == (2048, 4096)
        if is_small and (size, method) == ("8B", "qlora") and (held := _peak_gb(ours["runs"])):
            found.append((f"{what}: peak GiB", held * 1e9 / 2**30, "<=", H100_QLORA_GIB))
        lora = places.get((size, "lora", length, pass_tokens), {}) if method == "qlora" else {}
        if lora and (beside := tokens_per_second(lora["ours"])):
            found.append((f"{what}: share of LoRA's tokens/s", reached / beside, ">=", QLORA_OF_LORA))
        found += _beside_trl(what, reached, by_name)
    head = [run for run in results.get("head", {}).get("ours", []) if "ms" in run]
    if is_h100 and head and list(results["head_shape"]) == H100_HEAD_SHAPE:
        found.append(("head and loss: ms", median(run["ms"] for run in head), "<=", H100_HEAD_MS))
        if (held := _peak_gb(head)) is not None:
            found.append(("head and loss: peak GB", held, "<=", H100_HEAD_GB))
    return found


def _beside_trl(what: str, reached: float, by_name: dict[str, Measured]) -> list[Target]:
    speeds = {name: speed for name, one in by_name.items() if name[:3] == "TRL" and (speed := tokens_per_second(one))}
    if not speeds:
        return []
    found: list[Target] = []
    if "TRL" in speeds:
        found.append((f"{what}: times TRL's default", reached / speeds["TRL"], ">=", TIMES_TRL))
    best = max(speeds, key=lambda name: speeds[name])
    found.append((f"{what}: times TRL's best ({best})", reached / speeds[best], ">=", TIMES_TRL_BEST))
    return found
