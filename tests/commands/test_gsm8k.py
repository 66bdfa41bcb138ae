"""The main job on real input: 7,473 real problems through the command, full, LoRA and QLoRA, packed or not."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

import sft_main
from tests.builders import CHATML, tiny_llama
from tests.runs import losses, write_config

pytestmark = pytest.mark.slow
Train = Callable[..., Path]


@pytest.fixture(scope="module")
def gsm8k(shared_data: Path) -> Path:
    return shared_data / "gsm8k" / "train.jsonl"


@pytest.fixture(scope="module")
def base(gsm8k: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Llama with a byte-level tokenizer of 2,000 tokens made from the questions."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=2000, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    backend.train_from_iterator((json.loads(line)["question"] for line in gsm8k.open()), trainer)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<|endoftext|>")
    tokenizer.chat_template = CHATML
    folder = tmp_path_factory.mktemp("gsm8k_base")
    tokenizer.save_pretrained(folder)
    tiny_llama(len(tokenizer), max_position_embeddings=1024).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def train(gsm8k: Path, base: Path, tmp_path_factory: pytest.TempPathFactory) -> Train:
    """Runs the command on GSM8K; returns the output folder."""
    folder = tmp_path_factory.mktemp("gsm8k")
    config_file = write_config(
        folder / "run.yaml",
        model_name_or_path=str(base),
        train_file=str(gsm8k),
        cache_dir=str(folder / "cache"),
        max_seq_length=512,
        per_device_train_batch_size=8,
        learning_rate=2e-3,
        warmup_ratio=0.05,
        lr_scheduler_type="cosine",
        logging_steps=10,
        save_strategy="no",
    )

    def train(name: str, *overrides: str) -> Path:
        output_dir = folder / name
        assert sft_main.main(["--config_file", str(config_file), f"output_dir={output_dir}", *overrides]) == 0
        return output_dir

    return train


@pytest.fixture(scope="module")
def full(train: Train) -> Path:
    """Full fine-tuning for 200 steps on packed rows."""
    return train("full", "max_steps=200", "packing=bfd", "per_device_train_batch_size=4")


@pytest.fixture(scope="module")
def pretrained(train: Train, shared_data: Path) -> Path:
    """A model that has read encyclopedia articles and never a problem: what adapters are put on."""
    articles = shared_data / "formats" / "wiki_demo.txt"
    return train("pretrained", f"train_file={articles}", "packing=wrapped", "max_steps=60")


def assert_falls_smoothly(curve: list[float]) -> None:
    assert np.isfinite(curve).all()
    quarters = [float(np.mean(part)) for part in np.array_split(curve, 4)]
    assert quarters == sorted(quarters, reverse=True)
    assert max(np.diff(curve)) < 0.25, "a jump"


def test_full_fine_tuning_on_packed_rows(full: Path) -> None:
    curve = losses(full)
    assert len(curve) == 20
    assert_falls_smoothly(curve)
    assert curve[-1] < 0.6 * curve[0]
    ledger = json.loads((full / "logs" / "data_report.json").read_text())["total"]
    assert ledger["rows_read"] == 7473
    assert ledger["rows_trained"] + sum(ledger["rows_lost"].values()) == 7473
    assert ledger["packing"]["fill"] > 0.97


def test_full_fine_tuning_on_lone_rows(train: Train) -> None:
    curve = losses(train("lone", "max_steps=100"))
    assert_falls_smoothly(curve)
    assert curve[-1] < 0.7 * curve[0]


ADAPTER = ("max_steps=60", "lora_config.r=16", "learning_rate=1e-2")


def test_lora(train: Train, pretrained: Path) -> None:
    out = train("lora", f"model_name_or_path={pretrained}", *ADAPTER)
    assert_falls_smoothly(losses(out))
    assert (out / "adapter_model.safetensors").is_file()


def test_qlora_trains_on_really_quantized_layers(
    train: Train, pretrained: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = train("qlora", f"model_name_or_path={pretrained}", *ADAPTER, "quantization_config.load_in_4bit=true")
    assert "Quantized to 4 bits: 14 linear layers" in capsys.readouterr().err  # 7 in each of the 2 layers
    assert_falls_smoothly(losses(out))
    import model_manager

    model, _ = model_manager.load_trained(out)
    kinds = [type(module).__name__ for module in model.modules()]
    assert sum("Linear4bit" in kind for kind in kinds) >= 14
