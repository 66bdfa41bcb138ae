"""Packed documents must not see each other; a model in which they do is refused before it trains."""

from __future__ import annotations

import pytest
from transformers import AutoModelForCausalLM, OPTConfig, set_seed

from sft.collation import Collator
from sft.errors import UserError
from sft.isolation import measure_leak, require_isolation
from tests.builders import tiny_llama


@pytest.mark.parametrize("flatten", [False, True])
def test_rotary_attention_keeps_documents_apart(flatten: bool) -> None:
    model = tiny_llama(50)
    assert measure_leak(model, Collator(0, flatten=flatten)) < 1e-5
    require_isolation(model, Collator(0, flatten=flatten))
    assert model.training


def test_a_model_that_leaks_is_refused_by_name() -> None:
    set_seed(0)
    config = OPTConfig(
        vocab_size=50,
        hidden_size=32,
        ffn_dim=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=64,
    )
    model = AutoModelForCausalLM.from_config(config)
    with pytest.raises(UserError, match=r"packing: documents packed in one row see each other in this opt model"):
        require_isolation(model, Collator(1))
