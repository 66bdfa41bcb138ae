"""NEFTune's noise is uniform within alpha / sqrt(L · d), where L is each document's own length; only in training."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model

import sft_main
from sft.data.loading.collator import Collator
from sft.data.loading.document_offsets import DocumentOffsets
from sft.training.neftune import Neftune, noise_scale
from tests.builders import tiny_llama
from tests.runs import arithmetic, log_history, losses, write_config, write_rows

ALPHA = 5.0
WIDTH = 64
LENGTHS = [3, 40, 9, 148]
PACKED_LENGTHS = [[3, 40], [9, 148]]


def rows(lengths: list[int]) -> list[dict[str, Any]]:
    ids = [np.arange(1, length + 1) for length in lengths]
    return [{"input_ids": each, "labels": each} for each in ids]


def packed_rows() -> list[dict[str, Any]]:
    return [
        {**row, "seq_lengths": np.array(lengths)}
        for row, lengths in zip(rows([sum(lengths) for lengths in PACKED_LENGTHS]), PACKED_LENGTHS, strict=True)
    ]


def noise_of(neftune: Neftune, model: Any, batch: dict[str, Any], step: int = 0, number: int = 0) -> torch.Tensor:
    """Returns what is added to the embeddings of one micro-batch: (B, T, d)."""
    embeddings = model.get_input_embeddings()
    clean = embeddings(batch["input_ids"])
    with neftune.training_pass(batch, step, number):
        noisy = embeddings(batch["input_ids"])
    return (noisy - clean).detach()


@pytest.fixture
def model() -> Any:
    return tiny_llama(400)


def documents_in(batch: dict[str, Any], noise: torch.Tensor) -> list[torch.Tensor]:
    """The noise of each document, by the lengths that the test knows."""
    if "documents" in batch:
        return list(noise[0].split(LENGTHS))
    if "attention_mask" in batch:
        return [noise[at, :length] for at, length in enumerate(LENGTHS)]
    return [part for at, lengths in enumerate(PACKED_LENGTHS) for part in noise[at, : sum(lengths)].split(lengths)]


@pytest.mark.parametrize(
    "batch",
    [
        pytest.param(Collator(0, flatten=True)(rows(LENGTHS)), id="flattened"),
        pytest.param(Collator(0, flatten=True)(packed_rows()), id="flattened and packed"),
        pytest.param(Collator(0)(rows(LENGTHS)), id="padded"),
        pytest.param(Collator(0)(packed_rows()), id="padded and packed"),
    ],
)
def test_each_document_has_the_noise_of_its_own_length(model: Any, batch: dict[str, Any]) -> None:
    """A uniform number within ±b has the mean 0 and the variance b² / 3."""
    neftune = Neftune(model, ALPHA, seed=3)
    drawn = [documents_in(batch, noise_of(neftune, model, batch, step)) for step in range(30)]
    for at, length in enumerate(LENGTHS):
        noise = torch.stack([each[at] for each in drawn]).double()
        assert noise.shape == (30, length, WIDTH)
        bound = ALPHA / math.sqrt(length * WIDTH)
        assert 0.99 * bound < noise.abs().max() <= bound * (1 + 1e-5)
        assert float(noise.var()) == pytest.approx(bound**2 / 3, rel=0.04)
        assert abs(float(noise.mean())) < 4 * bound / math.sqrt(3 * noise.numel())


def test_the_length_of_the_tensor_would_give_too_little_noise(model: Any) -> None:
    """8 times too little for a document of 3 tokens among 200."""
    batch = Collator(0, flatten=True)(rows(LENGTHS))
    noise = noise_of(Neftune(model, ALPHA, seed=3), model, batch)
    assert noise[0, :3].abs().max() > 5 * ALPHA / math.sqrt(sum(LENGTHS) * WIDTH)


def test_there_is_no_noise_outside_a_training_pass(model: Any) -> None:
    batch = Collator(0, flatten=True)(rows([5, 6]))
    clean = model(input_ids=batch["input_ids"]).logits
    neftune = Neftune(model, ALPHA, seed=3)
    assert model(input_ids=batch["input_ids"]).logits.equal(clean)
    with neftune.training_pass(batch, 0, 0):
        assert not model(input_ids=batch["input_ids"]).logits.equal(clean)
    assert model(input_ids=batch["input_ids"]).logits.equal(clean), "evaluation follows training"


def test_an_error_in_the_forward_pass_ends_the_noise(model: Any) -> None:
    batch = Collator(0, flatten=True)(rows([5]))
    clean = model(input_ids=batch["input_ids"]).logits
    neftune = Neftune(model, ALPHA, seed=3)
    with pytest.raises(MemoryError), neftune.training_pass(batch, 0, 0):
        raise MemoryError
    assert model(input_ids=batch["input_ids"]).logits.equal(clean)


def test_noise_depends_on_seed_rank_step_and_micro_batch_and_not_on_the_global_random_state(model: Any) -> None:
    batch = Collator(0, flatten=True)(rows([5, 6]))
    state = torch.get_rng_state()
    first = noise_of(Neftune(model, ALPHA, seed=3, rank=0), model, batch, step=7, number=1)
    assert torch.get_rng_state().equal(state)
    torch.manual_seed(99)
    resumed = tiny_llama(400)
    assert (
        noise_of(Neftune(resumed, ALPHA, seed=3, rank=0), resumed, batch, step=7, number=1).sub(first).abs().max()
        < 1e-6
    )
    others = [{"seed": 4}, {"rank": 1}, {"step": 8}, {"number": 0}]
    for other in others:
        given = {"seed": 3, "rank": 0, "step": 7, "number": 1} | other
        fresh = tiny_llama(400)
        neftune = Neftune(fresh, ALPHA, given["seed"], given["rank"])
        noise = noise_of(neftune, fresh, batch, given["step"], given["number"])
        correlation = float(torch.corrcoef(torch.stack([noise.flatten(), first.flatten()]))[0, 1])
        assert abs(correlation) < 0.15, other  # of 704 numbers: 4 / sqrt(704)


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_gradients_under_an_adapter_and_checkpointing_are_those_without_checkpointing(use_reentrant: bool) -> None:
    batch = Collator(0, flatten=True)(rows([9, 6]))
    gradients = []
    for checkpointing in (False, True):
        base = tiny_llama(400)
        if checkpointing:
            base.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
            base.enable_input_require_grads()
        torch.manual_seed(0)
        model = get_peft_model(base, LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False))
        model.train()
        neftune = Neftune(model, ALPHA, seed=3)
        inputs = {name: batch[name] for name in ("input_ids", "position_ids")}
        with neftune.training_pass(batch, 0, 0):
            logits = model(**inputs, use_cache=False).logits
        logits.logsumexp(-1).sum().backward()
        gradients.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
        assert len(gradients[-1]) == 28
    assert all(gradient.abs().max() > 0 for gradient in gradients[0].values())
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient, msg=name)


def test_noise_keeps_the_dtype_of_the_model() -> None:
    model = tiny_llama(400).bfloat16()
    batch = Collator(0, flatten=True)(rows([5]))
    with Neftune(model, ALPHA, seed=3).training_pass(batch, 0, 0):
        assert model.get_input_embeddings()(batch["input_ids"]).dtype == torch.bfloat16


def test_the_scale_of_flattened_documents_is_one_number_per_token() -> None:
    ids = torch.zeros(1, 6, dtype=torch.int64)
    scale = noise_scale(ids, 4, 2.0, documents=DocumentOffsets.of([1, 4, 1]))
    assert scale.flatten().tolist() == pytest.approx([1.0, 0.5, 0.5, 0.5, 0.5, 1.0])


@pytest.mark.slow
def test_a_resumed_run_has_the_noise_of_the_one_that_never_stopped(tmp_path: Path, model_dir: Path) -> None:
    """With two micro-batches per step; the noise changes the losses, but not the evaluation."""
    config_file = write_config(
        tmp_path / "run.yaml",
        model_name_or_path=str(model_dir),
        train_file=str(write_rows(tmp_path / "train.jsonl", arithmetic(24))),
        validation_file=str(write_rows(tmp_path / "validation.jsonl", arithmetic(5, start=90))),
        cache_dir=str(tmp_path / "cache"),
        max_seq_length=128,
        per_device_train_batch_size=2,
        gradient_accumulation_steps=2,
        learning_rate=3e-3,
        lr_scheduler_type="constant",
        neftune_noise_alpha=15,
        max_steps=6,
        logging_steps=1,
        eval_strategy="steps",
        eval_steps=1,
        save_steps=3,
    )

    def trained(name: str, *overrides: str) -> Path:
        out = tmp_path / name
        assert sft_main.main(["--config_file", str(config_file), f"output_dir={out}", *overrides]) == 0
        return out

    whole = trained("whole")
    parts = trained("parts", f"resume_from_checkpoint={whole / 'checkpoint-3'}")
    quiet = trained("quiet", "neftune_noise_alpha=null")
    frozen = [trained(f"frozen_{alpha}", "learning_rate=0", f"neftune_noise_alpha={alpha}") for alpha in (15, "null")]
    assert losses(parts) == losses(whole)
    assert [e["grad_norm"] for e in log_history(parts)] == [e["grad_norm"] for e in log_history(whole)]
    assert min(abs(np.subtract(losses(whole), losses(quiet)))) > 1e-4
    evaluated = [(out / "logs" / "eval_results.json").read_text() for out in frozen]
    assert evaluated[0] == evaluated[1]
    assert losses(frozen[0]) != losses(frozen[1])
