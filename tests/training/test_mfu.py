"""Operations per token, counted by hand from the shapes of the weights."""

from __future__ import annotations

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import MixtralConfig, MixtralForCausalLM

from sft.training.mfu import flops_per_token, peak_flops, peak_flops_by_name
from tests.builders import tiny_llama

# Of `tiny_llama`: width 64, 2 layers, 4 heads of 16 with 2 for keys and values, 128 in the middle.
ATTENTION = 64 * 64 + 2 * 64 * 32 + 64 * 64
LAYERS = 2 * (ATTENTION + 3 * 64 * 128 + 2 * 64) + 64
HEAD = 100 * 64


def test_six_per_trained_weight_and_none_for_the_input_embedding() -> None:
    assert flops_per_token(tiny_llama(100)) == 6 * (LAYERS + HEAD)


def test_a_tied_embedding_counts_as_the_head() -> None:
    assert flops_per_token(tiny_llama(100, tie_word_embeddings=True)) == 6 * (LAYERS + HEAD)


def test_four_per_frozen_weight_and_six_per_adapter_weight() -> None:
    model = get_peft_model(tiny_llama(100), LoraConfig(r=4, target_modules=["q_proj"]))
    assert flops_per_token(model) == 4 * (LAYERS + HEAD) + 6 * 2 * (4 * 64 + 64 * 4)


@pytest.mark.parametrize(("experts", "chosen"), [(4, 2), (8, 2)])
def test_only_the_experts_that_a_token_is_routed_to_count(experts: int, chosen: int) -> None:
    config = MixtralConfig(
        vocab_size=100,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        num_local_experts=experts,
        num_experts_per_tok=chosen,
    )
    a_layer = ATTENTION + chosen * 3 * 64 * 128 + experts * 64 + 2 * 64
    assert flops_per_token(MixtralForCausalLM(config)) == 6 * (2 * a_layer + 64 + HEAD)


def test_the_peak_is_that_of_the_data_sheet_or_none() -> None:
    assert peak_flops_by_name("NVIDIA H100 80GB HBM3") == 989.4e12
    assert peak_flops_by_name("NVIDIA H100 PCIe") == 756e12
    assert peak_flops_by_name("NVIDIA L40S") == 362e12
    assert peak_flops_by_name("NVIDIA GeForce GTX 1080") is None
    assert peak_flops(torch.device("cpu")) is None
