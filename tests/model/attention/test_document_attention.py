"""Documents that share a row are computed as if each were alone, in every model with an attention interface."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from itertools import pairwise
from typing import Any, cast

import pytest
import torch
import transformers
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoConfig, AutoModelForCausalLM, masking_utils, set_seed

from sft.data.loading.document_offsets import DocumentOffsets
from sft.model.attention import document_attention
from sft.model.attention import kernel as document_kernel
from sft.model.attention.document_attention import (
    NAME,
    DocumentsLost,
    attention_inputs,
    fits_varlen,
    obstacle_to_documents,
    register,
    takes_documents,
)
from sft.model.attention.kernel import attend
from tests.builders import tiny_llama

VOCAB = 50
LENGTHS = (5, 1, 150, 30, 9)  # one document of two blocks of queries
SIZES: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 256,
    "pad_token_id": 0,
    "bos_token_id": None,
    "eos_token_id": None,
}
LAYERS = ["sliding_attention", "full_attention"]
EXPERTS: dict[str, Any] = {
    "num_local_experts": 4,
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 16,
}
MODELS: dict[str, dict[str, Any]] = {
    "llama": {},
    "qwen2": {"use_sliding_window": True, "sliding_window": 12, "max_window_layers": 1},
    "qwen3": {},
    "mistral": {"sliding_window": 12},
    "gemma2": {"sliding_window": 12, "layer_types": LAYERS, "attn_logit_softcapping": 2.0, "query_pre_attn_scalar": 8},
    "gemma3_text": {"sliding_window": 12, "layer_types": LAYERS},
    "phi3": {"sliding_window": 140},
    "gpt_neox": {},
    "gpt2": {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 256},
    "granite": {"attention_multiplier": 0.3},
    "cohere2": {"sliding_window": 12, "layer_types": LAYERS},
    "mixtral": EXPERTS,
    "qwen3_moe": EXPERTS,
    "gpt_oss": {**EXPERTS, "sliding_window": 12, "layer_types": LAYERS},
    "deepseek_v2": {"q_lora_rank": None, "kv_lora_rank": 8, "qk_rope_head_dim": 8, "qk_nope_head_dim": 4,
                    "v_head_dim": 8, "n_routed_experts": 4, "first_k_dense_replace": 1, "num_experts_per_tok": 2,
                    "moe_intermediate_size": 16, "num_key_value_heads": 4},
}  # fmt: skip


@pytest.fixture(autouse=True)
def _registered() -> None:
    register()


def build(kind: str, attention: str = NAME, **settings: Any) -> Any:
    """A tiny random model whose attention matters: weights of 0.2, sinks included."""
    known = AutoConfig.for_model(kind)
    given = {**SIZES, **MODELS.get(kind, {}), **settings}
    config = AutoConfig.for_model(kind, **{name: value for name, value in given.items() if hasattr(known, name)})
    model = AutoModelForCausalLM.from_config(config, attn_implementation=attention)
    set_seed(0)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, 1.0 if parameter.ndim == 1 else 0.0, 0.2)
    return model.eval()


def twin(model: Any, attention: str) -> Any:
    """The same weights with another attention."""
    other = type(model)._from_config(copy.deepcopy(model.config), attn_implementation=attention)
    other.load_state_dict(model.state_dict())
    return other.train(model.training)


def row(lengths: tuple[int, ...] = LENGTHS, seed: int = 0) -> tuple[Tensor, Tensor, DocumentOffsets]:
    """Tokens and positions (1, N) of documents of these lengths."""
    ids = torch.randint(VOCAB, (1, sum(lengths)), generator=torch.Generator().manual_seed(seed))
    positions = torch.cat([torch.arange(length) for length in lengths])[None]
    return ids, positions, DocumentOffsets.of(lengths)


def packed_logits(model: Any, **overrides: Any) -> Tensor:
    ids, positions, documents = row()
    inputs = {**attention_inputs(model.config, documents), "use_cache": False, **overrides}
    return model(input_ids=ids, position_ids=positions, **inputs).logits[0]


def lone_logits(model: Any) -> Tensor:
    """Each document by itself, as any model runs it: (N, V)."""
    ids, _, documents = row()
    parts = ids.split(list(documents.lengths), dim=1)
    return torch.cat([model(input_ids=part, use_cache=False).logits[0] for part in parts])


def gradients(model: Any, logits: Tensor) -> dict[str, Tensor]:
    """Of a loss that weighs every logit differently."""
    weights = torch.randn(logits.shape, generator=torch.Generator().manual_seed(1))
    model.zero_grad()
    (logits * weights).sum().backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def assert_same_gradients(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert expected
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        assert (found[name] - gradient).norm() <= 1e-5 * gradient.norm() + 1e-6, name


# Models


@pytest.mark.parametrize("kind", MODELS)
def test_packed_documents_have_the_logits_and_gradients_of_lone_ones(kind: str) -> None:
    model = build(kind)
    alone = twin(model, "eager")
    assert obstacle_to_documents(model.config, type(model)) is None
    packed, expected = packed_logits(model), lone_logits(alone)
    assert (packed - expected).abs().max() <= 1e-5 * expected.abs().max().clamp(min=1)
    assert_same_gradients(gradients(model, packed), gradients(alone, expected))


@pytest.mark.parametrize("kind", ["mistral", "gemma3_text", "cohere2", "gpt_oss"])
def test_the_window_changes_the_logits(kind: str) -> None:
    """The comparison above would not notice a window that both sides ignore."""
    wide = build(kind, sliding_window=200)
    assert (packed_logits(build(kind)) - packed_logits(wide)).abs().max() > 1e-2


def test_bf16_agrees_to_its_rounding() -> None:
    model = build("llama").to(torch.bfloat16)
    expected = lone_logits(twin(model.float(), "eager"))
    found = packed_logits(model.to(torch.bfloat16)).float()
    assert (found - expected).norm() < 0.03 * expected.norm()


# Traps


TRAPS: dict[str, dict[str, Any]] = {
    "the cache is on": {"use_cache": True},
    "a mask of ones is given": {"attention_mask": torch.ones(1, sum(LENGTHS), dtype=torch.long)},
    "a mask of ones is given with the cache on": {
        "attention_mask": torch.ones(1, sum(LENGTHS), dtype=torch.long),
        "use_cache": True,
    },
    "attentions are asked for": {"output_attentions": True},
}


@pytest.mark.parametrize("trap", TRAPS)
@pytest.mark.parametrize("kind", ["llama", "gemma3_text"])
@pytest.mark.parametrize("training", [False, True])
def test_documents_are_isolated_although(trap: str, kind: str, training: bool) -> None:
    model = build(kind).train(training)
    assert (packed_logits(model, **TRAPS[trap]) - lone_logits(model)).abs().max() <= 1e-5


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_gradient_checkpointing_recomputes_with_the_same_documents(use_reentrant: bool) -> None:
    model = build("llama").train()
    expected = gradients(model, packed_logits(model))
    model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
    model.enable_input_require_grads()
    assert_same_gradients(gradients(model, packed_logits(model)), expected)


def test_a_lora_adapter_trains_on_separate_documents() -> None:
    from peft import LoraConfig, get_peft_model

    settings = LoraConfig(target_modules="all-linear", init_lora_weights=False, task_type="CAUSAL_LM")
    model = get_peft_model(build("llama"), settings)
    packed, alone = packed_logits(model), lone_logits(model)
    assert (packed - alone).abs().max() <= 1e-5
    assert_same_gradients(gradients(model, packed), gradients(model, lone_logits(model)))


@pytest.mark.parametrize("kind", ["llama", "gemma3_text", "gemma2", "gpt_oss"])
def test_generation_with_left_padding_is_that_of_the_models_own_attention(kind: str) -> None:
    model = build(kind)
    own = twin(model, "sdpa" if model._supports_sdpa else "eager")
    ids, _, _ = row((20, 20))
    prompts, mask = ids.view(2, 20), torch.ones(2, 20, dtype=torch.long)
    mask[0, :7] = 0
    options = {"attention_mask": mask, "max_new_tokens": 12, "do_sample": False}
    assert model.generate(prompts, **options).tolist() == own.generate(prompts, **options).tolist()


def test_without_boundaries_it_is_sdpa_to_the_bit() -> None:
    model = build("llama")
    sdpa = twin(model, "sdpa")
    ids, positions, _ = row()
    mask = torch.ones_like(ids)
    mask[:, -4:] = 0
    for inputs in ({}, {"position_ids": positions}, {"attention_mask": mask}):
        for use_cache in (False, True):
            calls = [m(input_ids=ids, use_cache=use_cache, **inputs).logits for m in (model, sdpa)]
            assert torch.equal(calls[0], calls[1])


# No mask


class Largest(TorchDispatchMode):
    """The elements of the largest tensor that any operation made."""

    elements = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, tuple | list) else [result]:
            if isinstance(tensor, Tensor):
                self.elements = max(self.elements, tensor.untyped_storage().nbytes() // tensor.itemsize)
        return result


@pytest.mark.parametrize("kind", ["llama", "gemma3_text"])
def test_no_mask_is_built_and_no_positions_are_searched(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[str] = []

    def spied(name: str) -> Any:
        real = getattr(masking_utils, name)

        def spy(*args: Any, **kwargs: Any) -> Any:
            calls.append(name)
            return real(*args, **kwargs)

        return spy

    monkeypatch.setattr(masking_utils, "find_packed_sequence_indices", spied("find_packed_sequence_indices"))
    monkeypatch.setitem(masking_utils.AttentionMaskInterface._global_mapping, NAME, spied("sdpa_mask"))
    model = build(kind)
    with Largest() as largest:
        gradients(model, packed_logits(model))
    tokens = sum(LENGTHS)
    assert calls == []
    assert largest.elements < tokens * tokens
    with Largest() as largest:
        ids, positions, _ = row()
        model(input_ids=ids, position_ids=positions, use_cache=False)
    assert set(calls) == {"sdpa_mask", "find_packed_sequence_indices"}  # the spies do see them
    assert largest.elements >= tokens * tokens


def test_the_placeholder_mask_takes_no_memory() -> None:
    mask = attention_inputs(build("llama").config, DocumentOffsets.of([1000, 9000]))["attention_mask"]
    assert mask.shape == (1, 1, 1, 10_000)
    assert mask.untyped_storage().nbytes() == 1


# The kernel


OFFSETS = [0, 3, 4, 200, 210]


def dense(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    offsets: list[int] = OFFSETS,
    scale: float = 0.3,
    window: int | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
) -> Tensor:
    """Attention by its formula, with a mask: (N, H, Dv)."""
    tokens, groups = query.shape[1], query.shape[0] // key.shape[0]
    document = torch.repeat_interleave(torch.arange(len(offsets) - 1), torch.tensor(offsets).diff())
    back = torch.arange(tokens)[:, None] - torch.arange(tokens)
    seen = (document[:, None] == document) & (back >= 0)
    if window is not None:
        seen &= back < window
    scores = query @ key.repeat_interleave(groups, 0).transpose(1, 2) * scale
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    exponents = scores.exp() * seen
    total = exponents.sum(-1, keepdim=True)
    if sinks is not None:
        total = total + sinks.exp()[:, None, None]
    return (exponents / total @ value.repeat_interleave(groups, 0)).transpose(0, 1)


def heads(dtype: torch.dtype = torch.float64) -> list[Tensor]:
    """Query, key and value with 4 heads over 2, tokens major in memory as projections give them."""
    generator = torch.Generator().manual_seed(0)
    shapes = ((4, 8), (2, 8), (2, 6))
    return [torch.randn(OFFSETS[-1], h, d, generator=generator, dtype=dtype).transpose(0, 1) for h, d in shapes]


@pytest.mark.parametrize(
    "options", [{}, {"window": 1}, {"window": 7}, {"window": 128}, {"softcap": 1.5}, {"softcap": 1.5, "window": 50}]
)
@pytest.mark.parametrize("with_sinks", [False, True])
def test_the_kernel_is_the_formula(options: dict[str, Any], with_sinks: bool) -> None:
    sinks = torch.tensor([0.5, -1.0, 2.0, 0.0], dtype=torch.float64) if with_sinks else None
    upstream = torch.randn(OFFSETS[-1], 4, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    results = []
    for function, offsets in ((attend, torch.tensor(OFFSETS)), (dense, OFFSETS)):
        query, key, value = (tensor.clone().requires_grad_() for tensor in heads())
        scores = sinks.clone().requires_grad_() if sinks is not None else None
        out = cast(Any, function)(query, key, value, offsets, 0.3, sinks=scores, **options)
        out.backward(upstream)
        leaves = [query, key, value, *([] if scores is None else [scores])]
        results.append([out.detach(), *(leaf.grad for leaf in leaves)])
    for found, expected in zip(*results, strict=True):
        assert (found - expected).norm() <= 1e-6 * expected.norm() + 1e-12  # the sinks' gradients are summed in float32


def test_dropout_keeps_the_mean_and_its_gradient_is_exact() -> None:
    query, key, value = heads()
    offsets = torch.tensor(OFFSETS)
    set_seed(0)
    mean = sum(attend(query, key, value, offsets, 0.3, dropout=0.5) for _ in range(150)) / 150
    assert (mean - dense(query, key, value)).abs().mean() < 0.05
    assert not torch.equal(*(attend(query, key, value, offsets, 0.3, dropout=0.5) for _ in range(2)))

    def repeated(*tensors: Tensor) -> Tensor:
        torch.manual_seed(3)
        query, key, value = tensors
        return attend(query, key, value, torch.tensor([0, 4, 20]), 0.3, dropout=0.3)

    few = [tensor[:, :20].clone().requires_grad_() for tensor in (query, key, value)]
    assert torch.autograd.gradcheck(repeated, few)


def test_checkpointing_draws_the_same_dropout_again() -> None:
    model = build("llama", attention_dropout=0.4).train()
    set_seed(5)
    expected = gradients(model, packed_logits(model))
    model.gradient_checkpointing_enable({"use_reentrant": False})
    set_seed(5)
    assert_same_gradients(gradients(model, packed_logits(model)), expected)


def test_autocast_computes_in_its_dtype() -> None:
    query, key, value = heads(torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        out = attend(query, key, value.bfloat16(), torch.tensor(OFFSETS), 0.3)
    assert out.dtype == torch.bfloat16
    assert (out.float() - dense(query, key, value)).abs().max() < 0.05


def test_the_operator_keeps_torchs_rules() -> None:
    query, key, value = (tensor.float().requires_grad_() for tensor in heads())
    arguments = (query, key, value, torch.tensor(OFFSETS), None, None, 0.3, None, None, 0.0)
    torch.library.opcheck(document_kernel.forward_operator, arguments)


def test_compiled_models_take_any_documents_in_one_graph() -> None:
    model = tiny_llama(VOCAB)
    model.set_attn_implementation(NAME)
    graphs = 0

    def count(graph: torch.fx.GraphModule, _inputs: list[Tensor]) -> Any:
        nonlocal graphs
        graphs += 1
        return graph.forward

    torch._dynamo.reset()
    compiled = torch.compile(model, backend=count, fullgraph=True)
    for lengths in ((5, 7, 8), (12, 8), (1, 1, 9, 9), (20,)):
        ids, positions, documents = row(lengths)
        inputs = {"position_ids": positions, **attention_inputs(model.config, documents), "use_cache": False}
        expected = model(input_ids=ids, **inputs).logits
        assert (compiled(input_ids=ids, **inputs).logits - expected).abs().max() < 1e-5
    assert graphs <= 2  # the second for any number of documents


# What is refused


@pytest.mark.parametrize(
    ("kind", "settings", "reason"),
    [
        ("mamba", {}, "recurrent layers"),
        ("qwen3_next", {}, "recurrent layers"),
        ("minimax", {}, "linear_attention"),
        ("lfm2", {"layer_types": ["conv", "full_attention"], "num_hidden_layers": 2}, "conv"),
        ("llama4_text", {}, "chunked_attention"),
        ("bloom", {}, "does not attend through transformers' attention interface"),
        ("gptj", {}, "does not attend through transformers' attention interface"),
        ("bart", {}, "has an encoder"),
        ("gemma3_text", {"use_bidirectional_attention": True}, "sees tokens that come later"),
    ],
)
def test_unsupported_models_are_refused_with_a_reason(kind: str, settings: dict[str, Any], reason: str) -> None:
    config = AutoConfig.for_model(kind, **settings)
    model_class = transformers.AutoModelForCausalLM._model_mapping[type(config)]
    found = obstacle_to_documents(config, model_class)
    assert reason in str(found)


def test_remote_code_is_not_supported() -> None:
    assert "comes with the model" in str(obstacle_to_documents(tiny_llama(VOCAB).config, None))


def test_offsets_that_do_not_reach_the_attention_are_noticed() -> None:
    with pytest.raises(DocumentsLost, match="NemotronAttention does not get the offsets of the documents"):
        packed_logits(build("nemotron"))


def test_a_window_that_is_not_passed_to_attention_is_refused() -> None:
    with pytest.raises(ValueError, match="has a sliding window and does not pass it to its attention"):
        packed_logits(build("phimoe", sliding_window=100, **EXPERTS))


def test_offsets_of_another_row_are_refused() -> None:
    model = build("llama")
    ids, positions, _ = row()
    with pytest.raises(ValueError, match="the document offsets are of a row of 7 tokens, the row has 195"):
        model(input_ids=ids, position_ids=positions, **attention_inputs(model.config, DocumentOffsets.of([3, 4])))


def test_documents_with_a_key_cache_or_several_rows_are_refused() -> None:
    model = build("llama")
    ids, positions, documents = row()
    past = model(input_ids=ids[:, :4], use_cache=True).past_key_values
    inputs = attention_inputs(model.config, documents)
    with pytest.raises(ValueError, match="one row without a key cache"):
        model(input_ids=ids, position_ids=positions, past_key_values=past, **inputs)
    with pytest.raises(ValueError, match="one row without a key cache"):
        model(input_ids=ids.repeat(2, 1), position_ids=positions.repeat(2, 1), **inputs)


# What the model is called with


def test_flash_attention_gets_the_offsets_by_its_own_names() -> None:
    config = tiny_llama(VOCAB).config
    config._attn_implementation_internal = "flash_attention_2"
    inputs = attention_inputs(config, DocumentOffsets.of([3, 4]))
    assert inputs.keys() == {"cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k"}
    assert inputs["cu_seq_lens_q"].tolist() == inputs["cu_seq_lens_k"].tolist() == [0, 3, 7]
    assert inputs["max_length_q"] == inputs["max_length_k"] == 4
    assert takes_documents(config)


def test_other_attentions_get_no_offsets() -> None:
    config = tiny_llama(VOCAB).config
    for attention in ("sdpa", "eager", "flex_attention"):
        config._attn_implementation_internal = attention
        assert attention_inputs(config, DocumentOffsets.of([3, 4])) == {}
        assert not takes_documents(config)


def test_the_attention_is_not_saved_with_the_model(tmp_path: Any) -> None:
    build("llama").save_pretrained(tmp_path)
    assert NAME not in (tmp_path / "config.json").read_text()


def test_registering_again_changes_nothing() -> None:
    register()
    mapping = transformers.AttentionInterface._global_mapping
    assert mapping[NAME] is document_attention.document_attention


# On a GPU


@pytest.mark.parametrize(
    ("changed", "fits"),
    [
        ({}, True),
        ({"dtype": torch.float16}, True),
        ({"dtype": torch.float32}, False),
        ({"width": 256, "value_width": 256}, True),
        ({"width": 512, "value_width": 512}, False),
        ({"width": 60, "value_width": 60}, False),
        ({"width": 192}, False),
        ({"softcap": 50.0}, False),
        ({"sinks": torch.zeros(4)}, False),
        ({"dropout": 0.1}, False),
    ],
)
def test_which_heads_torchs_flash_attention_supports(changed: dict[str, Any], fits: bool) -> None:
    usual: dict[str, Any] = {"dtype": torch.bfloat16, "width": 128, "value_width": 128}
    assert fits_varlen(**{**usual, "softcap": None, "sinks": None, "dropout": 0.0, **changed}) is fits


def by_documents(
    query: Tensor, key: Tensor, value: Tensor, cu_q: Tensor, cu_k: Tensor, max_q: int, max_k: int, **options: Any
) -> Tensor:
    """What torch documents of `varlen_attn`, for causal windows: (N, H, D)."""
    assert (cu_q.dtype, cu_k.dtype) == (torch.int32, torch.int32)
    assert max_q == max_k == int(cu_q.diff().max())
    left, right = options["window_size"]
    assert right == 0
    assert options["enable_gqa"] is (query.shape[1] != key.shape[1])
    query, key, value = (tensor.transpose(0, 1) for tensor in (query, key, value))
    return dense(query, key, value, cu_q.tolist(), options["scale"], None if left == -1 else left + 1)


@pytest.mark.parametrize("window", [None, 1, 7])
def test_torchs_flash_attention_gets_the_same_offsets_and_window(
    window: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(document_attention, "varlen_attn", by_documents)
    query, key, value = heads()
    documents = DocumentOffsets.of([b - a for a, b in pairwise(OFFSETS)])
    found = document_attention.flash_attention(query, key, value, documents, 0.3, window)
    assert (found - attend(query, key, value, documents.offsets, 0.3, window)).abs().max() < 1e-12


@pytest.fixture(autouse=True)
def _forget_compiled() -> Iterator[None]:
    yield
    torch._dynamo.reset()


def test_heads_that_are_slow_on_a_gpu_are_named_once(caplog: pytest.LogCaptureFixture) -> None:
    document_attention.warn_slow_heads.cache_clear()
    with caplog.at_level("WARNING", logger="sft"):
        for _ in range(3):
            document_attention.warn_slow_heads(False, "torch.float32", 64, 32, 50.0, True, 0.1)
            document_attention.warn_slow_heads(True, "torch.float16", 64, 64, None, False, 0.0)
    slow, old = caplog.messages
    assert (
        "heads in torch.float32, 64 wide with values of 32, with a soft cap of 50.0 and sinks and dropout 0.1" in slow
    )
    assert "needs an Ampere or a later GPU" in old
