"""A model in which documents of one row see each other is refused before it trains."""

from __future__ import annotations

from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, MambaConfig, NemotronConfig, OPTConfig, set_seed

from sft.data.loading.collator import Collator
from sft.errors import UserError
from sft.model.attention.document_attention import NAME, register
from sft.model.attention.isolation_check import Leak, computes_in_float32, measure_leak, require_isolation
from tests.builders import tiny_llama


@pytest.fixture(autouse=True)
def _registered() -> None:
    register()


def build(config: Any, attention: str) -> Any:
    set_seed(0)
    return AutoModelForCausalLM.from_config(config, attn_implementation=attention)


def opt(attention: str) -> Any:
    sizes: dict[str, Any] = {"hidden_size": 32, "ffn_dim": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    return build(OPTConfig(vocab_size=50, max_position_embeddings=64, **sizes), attention)


def mamba() -> Any:
    set_seed(0)
    config = MambaConfig(vocab_size=50, hidden_size=32, state_size=4, num_hidden_layers=2, pad_token_id=0)
    return AutoModelForCausalLM.from_config(config)


@pytest.mark.parametrize(("attention", "flatten"), [(NAME, True), ("sdpa", True), ("sdpa", False), ("eager", False)])
def test_rotary_attention_isolates_documents(attention: str, flatten: bool) -> None:
    model = tiny_llama(50)
    model.set_attn_implementation(attention)
    leak = measure_leak(model, Collator(0, flatten=flatten))
    assert max(leak) < 1e-5
    require_isolation(model, Collator(0, flatten=flatten))
    assert model.training


def test_a_model_in_bf16_is_not_refused_for_its_rounding() -> None:
    model: Any = tiny_llama(50).bfloat16()
    model.set_attn_implementation(NAME)
    require_isolation(model, Collator(0, flatten=True))


def test_learned_positions_are_isolated_by_sft_documents_only() -> None:
    """OPT does not search position_ids for documents: transformers' own mask lets them see each other."""
    require_isolation(opt(NAME), Collator(1, flatten=True))
    with pytest.raises(UserError, match=r"packing: documents packed in one row see each other in this opt model"):
        require_isolation(opt("sdpa"), Collator(1))


def test_recurrent_layers_leak() -> None:
    model = mamba()
    assert measure_leak(model, Collator(0)).from_neighbour > 1e-3
    with pytest.raises(UserError, match=r"packing: documents packed in one row see each other in this mamba model"):
        require_isolation(model, Collator(0))


def test_a_model_that_does_not_pass_the_offsets_on_is_refused_with_a_remedy() -> None:
    sizes: dict[str, Any] = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    model = build(NemotronConfig(vocab_size=50, num_attention_heads=4, num_key_value_heads=2, **sizes), NAME)
    with pytest.raises(UserError, match="NemotronAttention does not get the offsets of the documents") as raised:
        require_isolation(model, Collator(0, flatten=True))
    problem = raised.value.problems[0]
    assert problem.key == "attn_implementation"
    assert problem.hint == "set attn_implementation: sdpa"


@pytest.mark.parametrize(
    ("leak", "in_float32", "in_bf16"),
    [
        (Leak(0.0, 1e-6), False, False),
        (Leak(0.0, 1e-3), True, False),
        (Leak(0.02, 0.0), True, True),
        (Leak(0.0, 0.1), True, True),
    ],
)
def test_rounding_is_distinguished_from_a_leak(leak: Leak, in_float32: bool, in_bf16: bool) -> None:
    assert leak.exceeds(precise=True) is in_float32
    assert leak.exceeds(precise=False) is in_bf16


@pytest.fixture
def float32_backends() -> Iterator[Any]:
    """torch's settings of float32 matrix multiplications on CUDA devices, restored after the test."""
    backends: Any = torch.backends
    yield backends
    backends.fp32_precision = backends.cuda.matmul.fp32_precision = "none"
    torch.set_float32_matmul_precision("highest")


def on_cuda() -> Any:
    """A stand-in for a model in float32 on a CUDA device."""
    weight = SimpleNamespace(dtype=torch.float32, device=torch.device("cuda"))
    return SimpleNamespace(get_input_embeddings=lambda: SimpleNamespace(weight=weight))


def test_tf32_is_not_float32_by_whichever_setting(float32_backends: Any) -> None:
    """Those of transformers' `tf32: true`, of torch's older flag, and of `set_float32_matmul_precision`."""
    assert computes_in_float32(on_cuda())
    float32_backends.fp32_precision = "tf32"
    assert not computes_in_float32(on_cuda())
    assert computes_in_float32(tiny_llama(50)), "a CPU has no TF32"
    float32_backends.fp32_precision = "ieee"
    assert computes_in_float32(on_cuda())
    float32_backends.cuda.matmul.allow_tf32 = True
    assert not computes_in_float32(on_cuda())
    float32_backends.cuda.matmul.allow_tf32 = False
    assert computes_in_float32(on_cuda())
    torch.set_float32_matmul_precision("high")
    assert not computes_in_float32(on_cuda())
