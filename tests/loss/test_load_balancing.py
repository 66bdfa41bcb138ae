"""The load balancing loss of mixtures of experts: its formula, and its weight in the mean over tokens."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, set_seed
from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func

from sft.errors import UserError
from sft.loss import fused_linear
from sft.loss.forward import TokenForward
from sft.loss.load_balancing import load_balancing_loss, router_coefficient
from sft.loss.token_loss import LossSettings, Objective, TokenLoss

COEFFICIENT = 0.05


upstream_balance: Any = load_balancing_loss_func


def by_hand(router_logits: list[np.ndarray], top_k: int, kept: np.ndarray) -> float:
    """Expert by expert in float64: E · Σ (share of choices) · (mean probability)."""
    experts = router_logits[0].shape[1]
    choices, probability, rows = np.zeros(experts), np.zeros(experts), 0
    for logits in router_logits:
        for scores in logits[kept].astype(np.float64):
            p = np.exp(scores - scores.max())
            p /= p.sum()
            for expert in np.argsort(-p)[:top_k]:
                choices[expert] += 1
            probability += p
            rows += 1
    return float(experts * (choices / rows * probability / rows).sum())


@pytest.mark.parametrize("top_k", [1, 2, 3])
@pytest.mark.parametrize("masked", [False, True])
def test_the_balance_equals_a_float64_computation_and_upstream(top_k: int, masked: bool) -> None:
    generator = torch.Generator().manual_seed(top_k)
    logits = [torch.randn(24, 5, generator=generator) for _ in range(3)]
    mask = (torch.rand(2, 12, generator=generator) < 0.6).long() if masked else None
    kept = mask.flatten().bool().numpy() if mask is not None else np.ones(24, dtype=bool)
    balance = load_balancing_loss(logits, top_k, mask).item()
    assert balance == pytest.approx(by_hand([x.numpy() for x in logits], top_k, kept), rel=1e-6)
    assert balance == pytest.approx(float(upstream_balance(tuple(logits), 5, top_k, mask)), rel=1e-6)


def test_even_routing_has_the_least_balance_and_one_favourite_the_most() -> None:
    even = torch.eye(4).repeat(5, 1)
    favourite = torch.tensor([[50.0, 0, 0, 0]]).repeat(20, 1)
    assert load_balancing_loss([even], 1).item() == pytest.approx(1.0)
    assert load_balancing_loss([favourite], 1).item() == pytest.approx(4.0)


def tiny_moe(kind: str) -> Any:
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    experts = {"num_experts": 4} if kind == "qwen3_moe" else {"num_local_experts": 4}
    set_seed(1)
    config = AutoConfig.for_model(
        kind,
        vocab_size=61,
        **sizes,
        **experts,
        num_key_value_heads=2,
        head_dim=8,
        moe_intermediate_size=16,
        num_experts_per_tok=2,
        router_aux_loss_coef=COEFFICIENT,
        output_router_logits=True,
    )
    model = AutoModelForCausalLM.from_config(config)
    assert fused_linear.install(model) is None
    return model


def batch(tokens: int, seed: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(0, 61, (1, tokens), generator=generator)
    labels = ids.clone()
    labels[:, : tokens // 3] = -100
    return {"input_ids": ids, "labels": labels}


@pytest.mark.parametrize("kind", ["mixtral", "qwen3_moe"])
def test_one_micro_batch_has_the_models_own_loss(kind: str) -> None:
    """Mean nll + coefficient · balance, as the model itself computes it from labels; and its gradients."""
    model = tiny_moe(kind)
    assert router_coefficient(model.config) == COEFFICIENT
    inputs = batch(30, seed=0)
    upstream = model(**inputs)
    upstream.loss.backward()
    expected = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    ours = TokenLoss(**model(**inputs, objective=Objective(router_aux=COEFFICIENT)))
    (ours.objective / ours.tokens).backward()
    assert ours.objective.item() / ours.tokens.item() == pytest.approx(upstream.loss.item(), rel=1e-6)
    assert ours.router_aux is not None
    assert ours.router_aux.item() / ours.tokens.item() == pytest.approx(upstream.aux_loss.item(), rel=1e-6)
    assert {n for n, p in model.named_parameters() if p.grad is not None} == set(expected)
    for name, parameter in model.named_parameters():
        if name in expected:
            torch.testing.assert_close(parameter.grad, expected[name], rtol=1e-4, atol=1e-6)
    router = next(p for name, p in model.named_parameters() if name.endswith("gate.weight"))
    assert router.grad is not None
    assert router.grad.abs().max() > 0


def test_micro_batches_are_weighted_by_their_tokens() -> None:
    model = tiny_moe("mixtral")
    micro_batches = [batch(30, 0), batch(12, 1), batch(21, 2)]
    losses = [TokenLoss(**model(**inputs, objective=Objective(router_aux=COEFFICIENT))) for inputs in micro_batches]
    tokens = [loss.tokens.item() for loss in losses]
    assert len(set(tokens)) == 3
    balances = [model(input_ids=inputs["input_ids"]).aux_loss.item() for inputs in micro_batches]
    nll = sum(loss.nll.item() for loss in losses)
    step = sum(loss.objective.item() for loss in losses) / sum(tokens)
    expected = nll / sum(tokens) + COEFFICIENT * np.average(balances, weights=tokens)
    assert step == pytest.approx(expected, rel=1e-6)


def test_without_router_logits_in_the_config_nothing_is_balanced() -> None:
    model = tiny_moe("mixtral")
    model.config.output_router_logits = False
    assert router_coefficient(model.config) == 0.0
    loss = TokenLoss(**model(**batch(30, 0), objective=Objective()))
    assert loss.router_aux is None
    assert loss.objective.item() == pytest.approx(loss.nll.item(), rel=1e-6)


def test_checkpointed_layers_give_the_same_gradients() -> None:
    gradients = []
    for checkpointed in (False, True):
        model = tiny_moe("mixtral").train()
        if checkpointed:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        TokenLoss(**model(**batch(30, 0), objective=Objective(router_aux=1.0), use_cache=False)).objective.backward()
        gradients.append([p.grad for p in model.parameters()])
    for one, other in zip(*gradients, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)


def test_a_balance_that_cannot_be_computed_is_an_error() -> None:
    class Shifted(type(tiny_moe("mixtral"))):  # type: ignore[misc]
        def forward(self, input_ids: Any = None, **kwargs: Any) -> Any:
            outputs = super().forward(input_ids=input_ids, **kwargs)
            if input_ids is not None:
                outputs.logits = outputs.logits + input_ids[..., None]
            return outputs

    model = tiny_moe("mixtral")
    del model.forward  # of the fused head
    model.__class__ = Shifted
    TokenForward(model, LossSettings())  # the tokens' own loss needs no fused head
    with pytest.raises(UserError, match="experts of Shifted cannot be balanced: its logits") as caught:
        TokenForward(model, LossSettings(Objective(router_aux=COEFFICIENT)))
    assert caught.value.problems[0].key == "router_aux_loss_coef"
