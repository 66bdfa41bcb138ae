"""The checks of a run's first step: its loss, training and evaluation mode, gradients, labels, learning rate."""

from __future__ import annotations

import logging
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM, set_seed

import sft_main
from sft.data.loading.sampler import EpochSampler
from sft.errors import TrainingStopped
from sft.loss.metrics import TokenCounts
from sft.loss.token_loss import TokenLoss, token_loss
from sft.training.first_step_checks import FirstStep, FirstStepChecks, find_warnings, noise_sources
from sft.training.gradient_coverage import GradientCoverage, count_gradients
from tests.builders import tiny_llama
from tests.by_hand import model_in, rows_of, summed_nll
from tests.runs import arithmetic, write_config, write_rows

SOUND = FirstStep(
    step=0,
    loss=2.31,
    tokens=500,
    input_tokens=2000,
    vocab_size=32_000,
    from_scratch=False,
    in_training=2.31,
    in_evaluation=2.3101,
    noise=(),
    gradients=GradientCoverage(224, 224),
)


def step_of(model: Any) -> TokenLoss:
    """One pass over two rows, with its gradients."""
    ids = torch.arange(1, 21).view(2, 10)
    loss = token_loss(model(input_ids=ids, use_cache=False).logits, ids)
    loss.objective.backward()
    return loss


def adapted(**options: Any) -> Any:
    return get_peft_model(tiny_llama(100), LoraConfig(r=4, target_modules="all-linear", **options))


# Warnings about the numbers


def test_a_sound_run_is_one_line() -> None:
    assert find_warnings(SOUND) == []
    assert str(SOUND) == (
        "step 0: loss 2.31, ln(vocab) 10.37; evaluation mode 2.31; 500 of 2,000 tokens are trained; "
        "224 of 224 parameters have a gradient"
    )


@pytest.mark.parametrize(
    ("share", "from_scratch", "said"),
    [
        (0.9, False, None),
        (0.98, False, "no better than random weights"),
        (1.02, False, "no better than random weights"),
        (1.02, True, None),
        (1.3, False, "worse than a uniform guess; look at whether the tokenizer"),
        (1.3, True, "worse than a uniform guess; look at the scale of the initialization"),
    ],
)
def test_the_first_loss_is_compared_with_a_uniform_guess(share: float, from_scratch: bool, said: str | None) -> None:
    loss = share * math.log(32_000)
    found = find_warnings(replace(SOUND, loss=loss, in_training=loss, in_evaluation=loss, from_scratch=from_scratch))
    assert len(found) == (said is not None)
    if said:
        assert said in found[0]
        assert f"{loss:.4g}" in found[0]
        assert "10.37" in found[0]


@pytest.mark.parametrize(
    ("in_training", "noise", "is_warned"),
    [
        (2.32, (), False),
        (2.5, (), True),
        (1.9, (), True),
        (2.9, ("attention_dropout 0.1",), False),
        (4.0, ("attention_dropout 0.1",), True),
    ],
)
def test_training_mode_is_compared_with_evaluation_mode(
    in_training: float, noise: tuple[str, ...], is_warned: bool
) -> None:
    found = find_warnings(replace(SOUND, in_training=in_training, in_evaluation=2.3, noise=noise))
    assert len(found) == is_warned
    assert all(f"{in_training:.4g} in training mode and 2.3 in evaluation mode" in text for text in found)
    assert all(name in text for text in found for name in noise)


def test_a_micro_batch_without_a_supervised_token_has_no_modes_to_compare() -> None:
    first = replace(SOUND, in_training=None, in_evaluation=None)
    assert find_warnings(first) == []
    assert "evaluation mode" not in str(first)


# Gradients


def test_every_parameter_of_a_sound_model_is_reached() -> None:
    model = tiny_llama(100)
    step_of(model)
    assert count_gradients(model) == GradientCoverage(total=21, reached=21)


@pytest.mark.parametrize("options", [{}, {"use_dora": True}, {"use_rslora": True}])
def test_an_adapter_starts_with_one_matrix_waiting(options: dict[str, Any]) -> None:
    model = adapted(**options)
    step_of(model)
    found = count_gradients(model)
    assert found.waiting == 14  # lora_A of seven layers in two blocks
    assert found.reached == found.total - 14
    assert find_warnings(replace(SOUND, gradients=found)) == []
    assert str(found).endswith("14 start with none by design")


def test_every_parameter_of_a_trained_adapter_has_a_gradient() -> None:
    model = adapted(init_lora_weights=False)
    step_of(model)
    assert count_gradients(model) == GradientCoverage(total=28, reached=28)


def test_an_adapter_on_embeddings_starts_with_its_other_matrix_waiting() -> None:
    model = get_peft_model(tiny_llama(100), LoraConfig(r=4, target_modules=["embed_tokens"]))
    step_of(model)
    assert count_gradients(model) == GradientCoverage(total=2, reached=1, waiting=1)


def test_an_adapter_whose_two_matrices_are_zero_is_named() -> None:
    model = adapted()
    dead = "base_model.model.model.layers.0.mlp.up_proj"
    with torch.no_grad():
        model.get_submodule(dead).lora_A.default.weight.zero_()
    step_of(model)
    found = count_gradients(model)
    assert found.zero == (f"{dead}.lora_A.default.weight", f"{dead}.lora_B.default.weight")
    (text,) = find_warnings(replace(SOUND, gradients=found))
    assert f"{dead}.lora_B.default.weight" in text


def test_new_tokens_that_did_not_occur_are_waiting() -> None:
    config = LoraConfig(r=4, target_modules=["q_proj"], init_lora_weights=False, trainable_token_indices=[98, 99])
    model = get_peft_model(tiny_llama(100, tie_word_embeddings=False), config)
    step_of(model)
    found = count_gradients(model)
    assert (found.waiting, found.zero, found.missing) == (1, (), ())


def test_parameters_that_the_forward_pass_does_not_use_are_named() -> None:
    model = tiny_llama(100)
    model.model.spare = nn.Linear(3, 3)
    step_of(model)
    found = count_gradients(model)
    assert found == GradientCoverage(total=23, reached=21, missing=("model.spare.weight", "model.spare.bias"))
    (text,) = find_warnings(replace(SOUND, gradients=found))
    assert "2 trained parameters are not used by the forward pass" in text
    assert "model.spare.weight, model.spare.bias" in text


def test_parameters_cut_off_by_zero_weights_are_named() -> None:
    model = tiny_llama(100)
    with torch.no_grad():
        model.model.layers[1].mlp.down_proj.weight.zero_()
    step_of(model)
    names = ("mlp.gate_proj.weight", "mlp.up_proj.weight", "post_attention_layernorm.weight")
    assert count_gradients(model).zero == tuple(f"model.layers.1.{name}" for name in names)


def test_frozen_parameters_are_not_counted() -> None:
    model = tiny_llama(100)
    model.get_input_embeddings().requires_grad_(False)
    step_of(model)
    assert count_gradients(model) == GradientCoverage(total=20, reached=20)


def test_experts_without_a_token_are_no_warning() -> None:
    class Experts(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.experts = nn.ModuleList(nn.Linear(4, 4, bias=False) for _ in range(4))

    model = Experts()
    model.experts[1](torch.ones(4)).sum().backward()
    found = count_gradients(model)
    assert found == GradientCoverage(total=4, reached=1, idle_experts=3)
    assert find_warnings(replace(SOUND, gradients=found)) == []


def test_a_mixture_of_experts_of_transformers_is_sound() -> None:
    set_seed(0)
    sizes: dict[str, Any] = {"hidden_size": 32, "intermediate_size": 32, "moe_intermediate_size": 16, "head_dim": 8}
    heads: dict[str, Any] = {"num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
    model = Qwen3MoeForCausalLM(
        Qwen3MoeConfig(vocab_size=100, num_experts=16, num_experts_per_tok=1, norm_topk_prob=False, **sizes, **heads)
    )
    step_of(model)
    assert find_warnings(replace(SOUND, gradients=count_gradients(model))) == []


# Sources of randomness


def test_noise_is_found_in_layers_and_in_the_config() -> None:
    assert noise_sources(tiny_llama(100)) == ()
    assert noise_sources(tiny_llama(100, attention_dropout=0.25)) == ("attention_dropout 0.25",)
    assert noise_sources(adapted(lora_dropout=0.1)) == ("lora_dropout 0.1",)


# The course of a run


def counts(loss: TokenLoss) -> TokenCounts:
    return TokenCounts(float(loss.nll), float(loss.nll), int(loss.tokens), 0, 2, 0, 20)


@pytest.fixture(autouse=True)
def captured_log(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    """A run in an earlier test turns propagation off."""
    monkeypatch.setattr(logging.getLogger("sft"), "propagate", True)
    caplog.set_level(logging.INFO, "sft")


NOTHING = TokenCounts(0.0, 0.0, 0, 0, 0, 0, 20)


def test_the_first_step_is_logged_once(caplog: pytest.LogCaptureFixture) -> None:
    model = tiny_llama(100)
    checks = FirstStepChecks(model, 100, from_scratch=True)
    evaluations = []

    def evaluate() -> TokenLoss:
        evaluations.append(model.training)
        with torch.no_grad():
            ids = torch.arange(1, 21).view(2, 10)
            return token_loss(model(input_ids=ids).logits, ids)

    assert checks.is_open
    for _ in range(3):
        checks.before_pass(evaluate)
        loss = step_of(model)
        checks.after_pass(loss)
    checks.look(0, counts(loss))
    assert not checks.is_open
    assert len(evaluations) == 1, "one forward pass, whatever the accumulation"
    (line,) = caplog.messages
    mean = float(loss.nll) / int(loss.tokens)
    assert line == (
        f"step 0: loss {mean:.4g}, ln(vocab) 4.605; evaluation mode {mean:.4g}; 18 of 20 tokens are trained; "
        "21 of 21 parameters have a gradient"
    )


@pytest.mark.parametrize(("scale", "is_warned"), [(1.0, False), (30.0, True)])
def test_a_run_whose_modes_differ_is_warned_of(caplog: pytest.LogCaptureFixture, scale: float, is_warned: bool) -> None:
    model, ids = tiny_llama(100), torch.arange(1, 21).view(2, 10)
    checks = FirstStepChecks(model, 100, from_scratch=True)
    with torch.no_grad():
        evaluated = token_loss(scale * model(input_ids=ids).logits, ids)
    checks.before_pass(lambda: evaluated)
    loss = step_of(model)
    checks.after_pass(loss)
    checks.look(0, counts(loss))
    assert ("in training mode and" in caplog.text) == is_warned


def test_labels_that_are_all_masked_give_warnings_and_then_stop_the_run(caplog: pytest.LogCaptureFixture) -> None:
    model = tiny_llama(100)
    checks = FirstStepChecks(model, 100, from_scratch=True)
    for step in range(2):
        checks.look(step, NOTHING)
        assert f"step {step}: none of its 20 tokens is trained: all labels are masked" in caplog.text
        assert checks.is_open
    with pytest.raises(TrainingStopped, match="step 2: none of its 20 tokens is trained"):
        checks.look(2, NOTHING)


def test_a_run_in_which_nothing_has_a_gradient_is_stopped() -> None:
    model = tiny_llama(100)
    checks = FirstStepChecks(model, 100, from_scratch=True)
    loss = step_of(model)
    model.zero_grad()
    with pytest.raises(TrainingStopped, match="step 5: none of 21 trained parameters has a gradient") as caught:
        checks.look(5, counts(loss))
    assert caught.value.exit_code == 3


@pytest.mark.parametrize(
    ("rates", "left", "said"),
    [
        ([[0.0], [1e-5]], 10, ""),  # a warm-up
        ([[1e-5], [9e-6]], 10, ""),
        ([[0.0], [0.0]], 10, "0 after 1 step:"),
        ([[0.0, 0.0], [0.0, 1e-5]], 10, ""),  # one group of two is trained
        ([[0.0]], 1, "0 in the only step:"),
    ],
)
def test_a_learning_rate_that_stays_zero(
    caplog: pytest.LogCaptureFixture, rates: list[list[float]], left: int, said: str
) -> None:
    checks = FirstStepChecks(tiny_llama(100), 100, from_scratch=True)
    for made, each in enumerate([*rates, rates[-1], rates[-1]]):
        checks.look_at_rates(made, left - made, each)
    assert len(caplog.messages) == bool(said)
    assert said in caplog.text


# As a user sees it


def test_a_real_run_logs_its_first_step(tmp_path: Path, model_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Two micro-batches of four rows; the model is random, which gives a warning."""
    file = write_config(
        tmp_path / "run.yaml",
        model_name_or_path=str(model_dir),
        train_file=str(write_rows(tmp_path / "train.jsonl", arithmetic(16))),
        cache_dir=str(tmp_path / "cache"),
        output_dir=str(tmp_path / "out"),
        max_seq_length=128,
        per_device_train_batch_size=4,
        gradient_accumulation_steps=2,
        max_steps=2,
        dtype="float32",
        save_strategy="no",
    )
    assert sft_main.main(["--config_file", str(file)]) == 0
    model, rows = model_in(model_dir), rows_of(tmp_path / "out").train
    order = EpochSampler(16, 0, seed=42).order().tolist()

    def loss_of(numbers: list[int]) -> float:
        tokens = sum(int((rows[i]["labels"] != -100).sum()) for i in numbers)
        return sum(float(summed_nll(model, rows[i])) for i in numbers) / tokens

    said = capsys.readouterr().err.splitlines()
    first, one_pass = (f"{loss_of(order[:count]):.4g}" for count in (8, 4))
    (line,) = [each for each in said if each.startswith("step 0:")]
    assert line.startswith(f"step 0: loss {first}, ln(vocab) {math.log(model.config.vocab_size):.4g}; ")
    assert f"evaluation mode {one_pass}" in line
    assert line.endswith("21 of 21 parameters have a gradient")
    (warning,) = [each for each in said if each.startswith("warning: the first loss")]
    assert "random weights" in warning
    assert not [each for each in said if "learning rate is 0" in each or "evaluation mode:" in each]
