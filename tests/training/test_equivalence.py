"""Runs that must give the same numbers: accumulation, processes, checkpointing, packing, a resume, a loop by hand.

They are compared by their curves of loss and gradient norm. Losses alone would not show a gradient of the wrong scale,
which Adam divides out.
"""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import sft_main
from sft.data.loading.sampler import EpochSampler
from tests.by_hand import model_in, rows_of, summed_nll
from tests.runs import arithmetic, log_history, losses, run, write_config, write_rows

STEPS = 30
FULL = ["learning_rate=3e-3"]
# At a higher rate rounding shows in the first digits: while B is zero, Adam divides the rounding errors of A's
# gradient by their own size.
LORA = ["learning_rate=1e-3", "lora_config.r=8"]
WEIGHTS = {"full": FULL, "lora": LORA}


@pytest.fixture(scope="module")
def config_file(tmp_path_factory: pytest.TempPathFactory, model_dir: Path) -> Path:
    """8 rows a step; 76 rows, so that the tenth step of each epoch has 4; 13 validation rows, which is odd."""
    folder = tmp_path_factory.mktemp("equivalence")
    return write_config(
        folder / "run.yaml",
        model_name_or_path=str(model_dir),
        dtype="float32",
        train_file=str(write_rows(folder / "train.jsonl", arithmetic(76))),
        validation_file=str(write_rows(folder / "validation.jsonl", arithmetic(13, start=1000))),
        cache_dir=str(folder / "cache"),
        output_dir=str(folder / "out"),
        max_seq_length=128,
        packing=False,
        per_device_train_batch_size=8,
        per_device_eval_batch_size=4,
        train_sampling_strategy="random",
        learning_rate=3e-3,
        max_steps=STEPS,
        logging_steps=1,
        save_strategy="no",
    )


def trained(config_file: Path, name: str, *overrides: str) -> Path:
    output_dir = config_file.parent / name
    assert sft_main.main(["--config_file", str(config_file), f"output_dir={output_dir}", *overrides]) == 0
    return output_dir


SEVERAL_RUNS = """
import json, os, sys
import torch.distributed as dist
import distributed_utils, sft_main

folder, *commands = sys.argv[1:]
for number, command in enumerate(commands):
    # Each group has a store of its own: in the launcher's it would find the addresses of the one before.
    store = f"file://{folder}/store{number}"
    dist.init_process_group("gloo", store, rank=int(os.environ["RANK"]), world_size=int(os.environ["WORLD_SIZE"]))
    if code := sft_main.main(json.loads(command)):
        break
distributed_utils.end_process(code)
"""


def trained_on_two_processes(config_file: Path, runs: dict[str, list[str]]) -> dict[str, Path]:
    """The output folders of runs, by name, with these overrides; the two processes start once for all of them."""
    folders = {name: config_file.parent / name for name in runs}
    commands = [
        json.dumps(["--config_file", str(config_file), f"output_dir={folders[name]}", *overrides])
        for name, overrides in runs.items()
    ]
    script = config_file.parent / "several_runs.py"
    script.write_text(SEVERAL_RUNS)
    done = run(config_file.parent, *commands, processes=2, script=script)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stderr.count("Batches:") == len(runs), "only the first process prints"
    return folders


@pytest.fixture(scope="module")
def references(config_file: Path) -> dict[str, Path]:
    """Runs in one process with each step in one micro-batch: of all weights, and of an adapter."""
    return {name: trained(config_file, name, *overrides) for name, overrides in WEIGHTS.items()}


def grad_norms(out: Path) -> list[float]:
    return [entry["grad_norm"] for entry in log_history(out)]


def assert_same_run(one: Path, other: Path, tolerance: float = 1e-5) -> None:
    """The same losses, gradients, token counts and evaluation, at each step."""
    curves = losses(one), losses(other)
    assert len(curves[0]) == STEPS
    assert curves[0][-1] < 0.9 * curves[0][0], "nothing was learned, so the comparison proves nothing"
    assert curves[0] == pytest.approx(curves[1], abs=tolerance)
    assert grad_norms(one) == pytest.approx(grad_norms(other), rel=1e-3)
    for name in ("num_tokens", "token_accuracy", "sequence_accuracy"):
        assert [e[name] for e in log_history(one)] == [e[name] for e in log_history(other)]
    results = [json.loads((out / "logs" / "eval_results.json").read_text()) for out in (one, other)]
    assert results[0]["eval_tokens"] == results[1]["eval_tokens"]
    assert results[0]["eval_loss"] == pytest.approx(results[1]["eval_loss"], abs=tolerance)
    assert results[0]["eval_sequence_accuracy"] == results[1]["eval_sequence_accuracy"]


VARIANTS = {
    "4x2": ["per_device_train_batch_size=4", "gradient_accumulation_steps=2"],
    "1x8": ["per_device_train_batch_size=1", "gradient_accumulation_steps=8"],
    "global_batch_size": ["per_device_train_batch_size=2", "global_batch_size=8"],
    "checkpointed": ["gradient_checkpointing=true"],
    "padded": ["attn_implementation=sdpa"],
    "padded_4x2": ["attn_implementation=sdpa", "per_device_train_batch_size=4", "gradient_accumulation_steps=2"],
    "chunks_of_7_tokens": ["loss_chunk_size=7"],
}
ON_TWO_PROCESSES = {
    "4x1": ["per_device_train_batch_size=4"],
    "2x2": ["per_device_train_batch_size=2", "gradient_accumulation_steps=2"],
    "1x4_checkpointed": [
        "per_device_train_batch_size=1",
        "gradient_accumulation_steps=4",
        "gradient_checkpointing=true",
    ],
    "4x1_padded": ["per_device_train_batch_size=4", "attn_implementation=sdpa"],
}


@pytest.fixture(scope="module")
def two_process_runs(config_file: Path, sgd_rows: list[str], resume_settings: list[str]) -> dict[str, Path]:
    """All runs on two processes that start from the beginning."""
    runs = {
        f"two_{weights}_{variant}": [*overrides, *ON_TWO_PROCESSES[variant]]
        for weights, overrides in WEIGHTS.items()
        for variant in ON_TWO_PROCESSES
    }
    runs["two_sgd"] = [*sgd_rows, *SGD, *TWO_STEPS, "per_device_train_batch_size=1"]
    runs["two_whole"] = resume_settings
    return trained_on_two_processes(config_file, runs)


@pytest.mark.slow
@pytest.mark.parametrize("weights", WEIGHTS)
@pytest.mark.parametrize("variant", VARIANTS)
def test_one_loss_whatever_the_micro_batches(
    config_file: Path, references: dict[str, Path], weights: str, variant: str
) -> None:
    settings = [*WEIGHTS[weights], *VARIANTS[variant]]
    assert_same_run(references[weights], trained(config_file, f"{weights}_{variant}", *settings))


@pytest.mark.slow
@pytest.mark.parametrize("weights", WEIGHTS)
@pytest.mark.parametrize("variant", ON_TWO_PROCESSES)
def test_one_loss_on_two_processes(
    references: dict[str, Path], two_process_runs: dict[str, Path], weights: str, variant: str
) -> None:
    assert_same_run(references[weights], two_process_runs[f"two_{weights}_{variant}"])


@pytest.mark.slow
def test_grouping_by_length_sees_the_same_rows(config_file: Path, references: dict[str, Path]) -> None:
    grouped = trained(config_file, "grouped", "train_sampling_strategy=group_by_length")
    epoch_ends = [entry["num_tokens"] for entry in log_history(grouped)][9::10]
    assert epoch_ends == [entry["num_tokens"] for entry in log_history(references["full"])][9::10]


@pytest.mark.slow
def test_packed_rows_give_the_loss_of_lone_rows(config_file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The model's loss on the same rows is the same packed and padded: no document attends to another."""
    out = trained(config_file, "short", "max_steps=2")
    results = []
    for settings in (["packing=false", "attn_implementation=sdpa"], ["packing=false"], ["packing=bfd"]):
        capsys.readouterr()
        arguments = ["--config_file", str(config_file), "--model", str(out), "--json", *settings]
        assert sft_main.main(["evaluate", *arguments]) == 0
        results.append(json.loads(capsys.readouterr().out))
    for other in results[1:]:
        assert results[0]["eval_tokens"] == other["eval_tokens"]
        assert results[0]["eval_loss"] == pytest.approx(other["eval_loss"], abs=1e-6)
        assert results[0]["eval_sequence_accuracy"] == other["eval_sequence_accuracy"]


# The size of a gradient


SGD = ["optim=sgd", "learning_rate=0.1", "lr_scheduler_type=constant", "weight_decay=0", "max_grad_norm=0"]
TWO_STEPS = ["max_steps=2", "gradient_accumulation_steps=2"]


@pytest.fixture(scope="module")
def sgd_rows(config_file: Path) -> list[str]:
    """Seven rows of unequal length."""
    return [f"train_file={write_rows(config_file.parent / 'seven.jsonl', arithmetic(7))}"]


@pytest.fixture(scope="module")
def sgd_run(config_file: Path, sgd_rows: list[str]) -> Path:
    """Plain gradient descent: a step of 4 rows and one of 3, in micro-batches of 2 and of 1."""
    return trained(config_file, "sgd", *sgd_rows, *SGD, *TWO_STEPS, "per_device_train_batch_size=2")


def largest_difference(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> float:
    assert one.keys() == other.keys()
    return max(float((one[name].double() - other[name].double()).abs().max()) for name in one)


def test_gradient_descent_equals_a_loop_by_hand(sgd_run: Path, model_dir: Path) -> None:
    """w ← w − 0.1 · d/dw (summed −log p of the step's trained tokens / their number), row by row in float64."""
    model, rows = model_in(model_dir), rows_of(sgd_run).train
    order = EpochSampler(7, 0, seed=42).order().tolist()
    curve = []
    for step in (order[:4], order[4:]):
        tokens = sum(int((rows[i]["labels"] != -100).sum()) for i in step)
        loss = torch.stack([summed_nll(model, rows[i]) for i in step]).sum() / tokens
        curve.append(loss.item())
        weights = list(model.parameters())
        gradients = torch.autograd.grad(loss, weights)
        with torch.no_grad():
            for weight, gradient in zip(weights, gradients, strict=True):
                weight.sub_(0.1 * gradient)
    assert losses(sgd_run) == pytest.approx(curve, abs=1e-5)
    saved = load_file(sgd_run / "model.safetensors")
    assert largest_difference(saved, load_file(model_dir / "model.safetensors")) > 1e-2, "nothing moved"
    assert largest_difference(saved, model.state_dict()) < 1e-5


@pytest.mark.slow
def test_gradient_descent_in_two_processes_reaches_the_same_weights(
    sgd_run: Path, two_process_runs: dict[str, Path]
) -> None:
    files = [load_file(folder / "model.safetensors") for folder in (sgd_run, two_process_runs["two_sgd"])]
    assert largest_difference(*files) < 1e-6


# A resume


@pytest.fixture(scope="module")
def resume_settings(config_file: Path) -> list[str]:
    rows = write_rows(config_file.parent / "resume.jsonl", arithmetic(44))
    return [
        f"train_file={rows}",
        "per_device_train_batch_size=2",
        "gradient_accumulation_steps=2",
        "lora_config.r=8",
        "lora_config.lora_dropout=0.1",
        "lr_scheduler_type=constant",
        "learning_rate=1e-2",
        "logging_steps=2",
        "save_strategy=steps",
        "save_steps=3",
        "max_steps=14",
    ]


@pytest.mark.slow
def test_two_processes_that_were_stopped_in_mid_epoch_resume_exactly(
    config_file: Path, resume_settings: list[str], two_process_runs: dict[str, Path]
) -> None:
    """44 rows are 6 steps per epoch. The stop at step 9 is in the middle of the second epoch, between the logs of
    steps 8 and 10; dropout makes each step depend on the random state of its process.
    """
    whole, parts = two_process_runs["two_whole"], config_file.parent / "two_resumed"
    settings = [*resume_settings, f"output_dir={parts}", f"resume_from_checkpoint={whole / 'checkpoint-9'}"]
    done = run("--config_file", config_file, *settings, processes=2)
    assert done.returncode == 0, done.stderr[-3000:]
    assert [entry["step"] for entry in log_history(whole)] == [2, 4, 6, 8, 10, 12, 14]
    compared = ("step", "loss", "grad_norm", "num_tokens", "token_accuracy")
    curves = [[[entry[name] for name in compared] for entry in log_history(out)] for out in (whole, parts)]
    assert curves[0] == curves[1]
    first, second = (load_file(out / "adapter_model.safetensors") for out in (whole, parts))
    assert first.keys() == second.keys()
    assert all(first[name].equal(second[name]) for name in first)


# Packing


DOCUMENTS = [27, 13, 26, 14, 24, 16, 22, 18, 5]
"""Lengths in tokens: pairs that fill rows of 40 exactly, and one document that fits in none of them."""


@pytest.fixture(scope="module")
def unpacked_runs(config_file: Path) -> dict[str, Path]:
    """Each step takes all documents at once, each in a row of its own."""
    rng = random.Random(0)
    # Characters that no merge joins, so that each is a token; the pipeline puts another at the end.
    texts = ["".join(rng.choices("zqxj790", k=length - 1)) for length in DOCUMENTS]
    write_rows(config_file.parent / "documents.jsonl", [{"text": text} for text in texts])
    whole = ["packing=false", "per_device_train_batch_size=9"]
    return {
        name: train_on_documents(config_file, f"unpacked_{name}", *weights, *whole) for name, weights in WEIGHTS.items()
    }


def train_on_documents(config_file: Path, name: str, *overrides: str) -> Path:
    rows = config_file.parent / "documents.jsonl"
    common = [f"train_file={rows}", "validation_file=null", "max_seq_length=40"]
    return trained(config_file, name, *common, *overrides)


@pytest.mark.slow
@pytest.mark.parametrize("weights", WEIGHTS)
@pytest.mark.parametrize(
    ("packing", "batch_size", "attention"),
    [("bfd", 5, "auto"), ("bfd", 1, "auto"), ("bfd", 5, "sdpa"), ("wrapped", 5, "auto"), ("wrapped", 1, "sdpa")],
)
def test_packed_documents_train_as_they_do_alone(
    config_file: Path, unpacked_runs: dict[str, Path], weights: str, packing: str, batch_size: int, attention: str
) -> None:
    """Five rows in one micro-batch (with SDPA the last one is mostly padding), or one row per micro-batch."""
    unpacked_run = unpacked_runs[weights]
    settings = [
        *WEIGHTS[weights],
        f"packing={packing}",
        f"per_device_train_batch_size={batch_size}",
        "global_batch_size=5",
        f"attn_implementation={attention}",
    ]
    packed_run = train_on_documents(config_file, f"{weights}_{packing}_{batch_size}_{attention}", *settings)
    lone, packed = rows_of(unpacked_run).train, rows_of(packed_run).train
    assert [len(row["input_ids"]) for row in lone] == DOCUMENTS
    assert [row["seq_lengths"].tolist() for row in packed] == [[27, 13], [26, 14], [24, 16], [22, 18], [5]]
    assert len(losses(unpacked_run)) == STEPS
    assert losses(packed_run) == pytest.approx(losses(unpacked_run), abs=1e-5)
    assert grad_norms(packed_run) == pytest.approx(grad_norms(unpacked_run), rel=1e-3)
    for name in ("num_tokens", "token_accuracy", "sequence_accuracy"):
        assert [e[name] for e in log_history(packed_run)] == [e[name] for e in log_history(unpacked_run)]
