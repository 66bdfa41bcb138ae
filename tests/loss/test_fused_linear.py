"""The fused head gives the sums and gradients of the plain path, for every kind of head."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from transformers import AutoConfig, AutoModelForCausalLM, set_seed

from sft.loss import chunked as chunked_loss
from sft.loss import fused_linear
from sft.loss.chunked import choose_chunk_size, linear_chunks
from sft.loss.fused_linear import PrecomputedGradients
from sft.loss.output_head import LogitTransform, OutputHead, find_output_head
from sft.loss.token_loss import LossSettings, Objective, TokenLoss, token_loss, trained_positions
from tests.builders import tiny_llama
from tests.loss.test_token_loss import OBJECTIVES, assert_sums, by_hand
from tests.ranks import spawn_ranks

VOCAB = 101
SIZES: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "bos_token_id": None,
    "eos_token_id": 1,
    "pad_token_id": None,
}
MLA = {"qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 8, "num_key_value_heads": 4}


def family(kind: str, **settings: Any) -> Any:
    set_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **{**SIZES, **settings}))
    for parameter in model.parameters():  # the usual 0.02 leaves logits so small that nothing after them would show
        if parameter.ndim == 2:
            parameter.data.mul_(10)
    return model.eval()


def with_lora(model: Any, **settings: Any) -> Any:
    """An adapter that does something from the start."""
    settings.setdefault("target_modules", ["q_proj", "lm_head"])
    adapted = get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", r=4, **settings))
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.3)
    return adapted.eval()


def frozen_head(model: Any) -> Any:
    model.lm_head.requires_grad_(False)
    return model


def llama(**settings: Any) -> Any:
    return family("llama", **settings)


HEADS: dict[str, Callable[[], Any]] = {
    "untied": llama,
    "tied": lambda: llama(tie_word_embeddings=True),
    "frozen": lambda: frozen_head(llama()),
    "bias": lambda: family("phi"),
    "softcap": lambda: family("gemma2", head_dim=8, final_logit_softcapping=3.0),
    "multiplied": lambda: family("cohere", logit_scale=0.5),
    "divided": lambda: family("granite", logits_scaling=8.0),
    "scaled in front of the head": lambda: family("minicpm3", dim_model_base=8, **MLA),
    "cast by the model": lambda: family("mamba", state_size=4),
    "decoder within": lambda: family("opt", word_embed_proj_dim=32, ffn_dim=48),
    "lora elsewhere": lambda: with_lora(llama(), target_modules=["q_proj"]),
    "lora on the head": lambda: with_lora(llama()),
    "lora on a softcapped head": lambda: with_lora(family("gemma2", head_dim=8, final_logit_softcapping=3.0)),
    "dora on the head": lambda: with_lora(llama(), use_dora=True),
    "head trained whole": lambda: with_lora(llama(), target_modules=["q_proj"], modules_to_save=["lm_head"]),
    "some tokens trained": lambda: with_lora(
        llama(), target_modules=["q_proj"], trainable_token_indices={"lm_head": [3, 5], "embed_tokens": [3, 5]}
    ),
    "some tokens trained, tied": lambda: with_lora(
        llama(tie_word_embeddings=True), target_modules=["q_proj"], trainable_token_indices=[3, 5]
    ),
}
BY_AUTOGRAD = {
    *("cast by the model", "lora on the head", "lora on a softcapped head", "dora on the head", "head trained whole"),
    *("some tokens trained", "some tokens trained, tied"),
}


def base_of(model: Any) -> Any:
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def batch(seed: int = 0, tokens: int = 24) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(0, VOCAB, (2, tokens), generator=generator)
    labels = ids.clone()
    labels[torch.rand(2, tokens, generator=generator) < 0.4] = -100
    return {"input_ids": ids, "labels": labels}


def gradients(model: Any) -> dict[str, torch.Tensor]:
    found = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return found


def plain(model: Any, inputs: dict[str, torch.Tensor], objective: Objective) -> TokenLoss:
    return token_loss(model(input_ids=inputs["input_ids"], use_cache=False).logits, inputs["labels"], objective)


def fused(model: Any, inputs: dict[str, torch.Tensor], objective: Objective, **more: Any) -> TokenLoss:
    return TokenLoss(**model(**inputs, objective=objective, use_cache=False, **more))


def assert_same_loss(one: TokenLoss, other: TokenLoss) -> None:
    assert one.as_dict().keys() == other.as_dict().keys()
    for name, value in one.as_dict().items():
        assert value.item() == pytest.approx(other.as_dict()[name].item(), rel=1e-6, abs=1e-6), name


def assert_same_gradients(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor], tolerance: float) -> None:
    """Relative to each parameter's largest; where the exact gradient is 0, as of OPT's key bias, a tenth of all's."""
    assert one.keys() == other.keys()
    largest = max(float(gradient.abs().max()) for gradient in other.values())
    for name in one:
        size = max(float(other[name].abs().max()), largest / 10)
        assert float((one[name].double() - other[name].double()).abs().max()) < tolerance * size, name


@pytest.mark.parametrize("chunk_size", [1, 7, None])
@pytest.mark.parametrize("kind", HEADS)
def test_every_head_gives_the_plain_paths_sums_and_gradients(kind: str, chunk_size: int | None) -> None:
    objective = Objective(label_smoothing=0.1, z_loss=1e-2, entropy=True)
    model, inputs = HEADS[kind](), batch()
    expected = plain(model, inputs, objective)
    expected.objective.backward()
    of_plain = gradients(model)
    assert fused_linear.install(base_of(model), chunk_size) is None
    loss = fused(model, inputs, objective)
    loss.objective.backward()
    assert_same_loss(loss, expected)
    assert_same_gradients(gradients(model), of_plain, 1e-5)


@pytest.mark.parametrize("kind", HEADS)
def test_heads_that_are_a_matrix_multiplication_are_recognized(kind: str) -> None:
    model = base_of(HEADS[kind]())
    head = find_output_head(model)
    assert isinstance(head, OutputHead), head
    assert (head.plain_linear(model) is None) == (kind in BY_AUTOGRAD)


@pytest.mark.parametrize("block", [40, 2**20])  # a row at a time; all of a chunk
@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize("transform", [LogitTransform(), LogitTransform(0.5), LogitTransform(cap=4.0)])
def test_sums_and_gradients_equal_a_float64_computation(
    objective: Objective, transform: LogitTransform, block: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(chunked_loss, "CPU_BLOCK", block)
    generator = torch.Generator().manual_seed(1)
    hidden = torch.randn(1, 30, 16, generator=generator)
    weight, bias = torch.randn(40, 16, generator=generator), torch.randn(40, generator=generator)
    labels = torch.randint(0, 40, (1, 30), generator=generator)
    positions = trained_positions(labels)
    targets = labels[0, positions]

    exact = [t.double().requires_grad_() for t in (hidden[0, positions - 1], weight, bias)]
    raw = exact[0] @ exact[1].t() + exact[2]
    logits = raw * transform.scale if transform.cap is None else torch.tanh(raw / transform.cap) * transform.cap
    log_probs = logits.log_softmax(-1)
    nll = -log_probs.gather(1, targets[:, None]).squeeze(1)
    smoothed = (1 - objective.label_smoothing) * nll - objective.label_smoothing * log_probs.mean(-1)
    kept = torch.exp(-nll).detach() if objective.loss_type == "dft" else 1.0
    (smoothed * kept + objective.z_loss * logits.logsumexp(-1).square()).sum().backward()

    tensors = [hidden[0, positions - 1], weight, bias]
    scores, found = linear_chunks(tensors, transform, targets, LossSettings(objective, 7), [torch.float32] * 3)
    shifted = torch.cat([logits.detach(), logits.detach()[:1]])[None]  # position t predicts t + 1
    sums = by_hand(shifted, torch.cat([torch.tensor([-100]), targets])[None], objective)
    assert scores.loss.double().sum().item() == pytest.approx(sums["objective"], rel=1e-6)
    assert scores.nll.double().sum().item() == pytest.approx(sums["nll"], rel=1e-6)
    assert scores.correct.sum().item() == sums["correct"]
    if objective.entropy:
        assert scores.entropy is not None
        assert scores.entropy.double().sum().item() == pytest.approx(sums["entropy"], rel=1e-6)
    for ours, theirs in zip(found, exact, strict=True):
        assert ours is not None
        assert theirs.grad is not None
        assert float((ours.double() - theirs.grad).abs().max() / theirs.grad.abs().max()) < 1e-5


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("chunk_size", [5, 30])
def test_uninitialized_memory_is_in_no_gradient(dtype: torch.dtype, chunk_size: int) -> None:
    """The first chunk writes the gradients instead of adding to zeros; torch fills new memory with NaN here."""
    tensors = [torch.randn(*shape).to(dtype) for shape in ((30, 16), (40, 16), (40,))]
    torch.use_deterministic_algorithms(True)
    try:
        assert torch.empty(1).isnan().all()
        targets = torch.arange(30)
        _, found = linear_chunks(tensors, LogitTransform(), targets, LossSettings(chunk_size=chunk_size), [dtype] * 3)
    finally:
        torch.use_deterministic_algorithms(False)
    for gradient in found:
        assert gradient is not None
        assert gradient.isfinite().all()


@pytest.mark.parametrize("vocab_size", [5, 256, 600, 1000])
def test_the_models_choice_is_the_first_of_its_largest_logits(vocab_size: int) -> None:
    """With a vocabulary shorter than, as long as, and no multiple of the runs in which it is searched."""
    generator = torch.Generator().manual_seed(0)
    logits = torch.randint(0, 4, (500, vocab_size), generator=generator).float()  # many are the largest
    logits[:100] = 0.0
    logits[:100, -3:] = 1.0
    expected = torch.tensor([row.index(max(row)) for row in logits.tolist()])
    targets = torch.where(torch.arange(500) % 2 == 0, expected, expected.roll(1))
    scores = chunked_loss.score_in_blocks(logits, targets, Objective(), LogitTransform(), with_gradient=False)
    assert torch.cat([part.correct for part in scores]).equal(targets == expected)


def test_a_model_gives_the_sums_of_a_float64_computation_over_its_logits() -> None:
    model, inputs, objective = llama(), batch(), Objective(entropy=True)
    logits = model(input_ids=inputs["input_ids"]).logits
    assert fused_linear.install(model, 5) is None
    assert_sums(fused(model, inputs, objective), by_hand(logits, inputs["labels"], objective), objective)


def test_the_gradient_of_a_tied_head_adds_up_with_that_of_the_embeddings() -> None:
    model, inputs = HEADS["tied"](), batch()
    assert fused_linear.install(model) is None
    fused(model, inputs, Objective()).objective.backward()
    both = gradients(model)["model.embed_tokens.weight"]
    unused = torch.ones(VOCAB, dtype=torch.bool)
    unused[inputs["input_ids"].flatten()] = False
    assert both[unused].abs().max() > 0, "rows that were not read are reached through the head"
    model.lm_head = nn.Linear(32, VOCAB, bias=False)
    model.lm_head.weight = nn.Parameter(model.model.embed_tokens.weight.detach().clone())
    fused(model, inputs, Objective()).objective.backward()
    apart = gradients(model)
    torch.testing.assert_close(both, apart["model.embed_tokens.weight"] + apart["lm_head.weight"], rtol=1e-5, atol=1e-5)


def test_a_frozen_head_gets_no_gradient_but_the_hidden_states_do() -> None:
    model = HEADS["frozen"]()
    assert fused_linear.install(model) is None
    fused(model, batch(), Objective()).objective.backward()
    assert model.lm_head.weight.grad is None
    assert model.model.embed_tokens.weight.grad is not None


def test_evaluation_makes_no_gradient_and_no_graph(monkeypatch: pytest.MonkeyPatch) -> None:
    model, inputs = llama(), batch()
    expected = plain(model, inputs, Objective())
    assert fused_linear.install(model, 7) is None
    needed: list[Any] = []

    def watched(*arguments: Any) -> Any:
        needed.append(arguments[4])
        return linear_chunks(*arguments)

    monkeypatch.setattr(fused_linear, "linear_chunks", watched)
    with torch.no_grad():
        loss = fused(model, inputs, Objective())
    assert needed == [[None, None]]
    assert not loss.objective.requires_grad
    assert_same_loss(loss, expected)


@pytest.mark.parametrize("kind", ["untied", "lora on the head"])
def test_a_batch_without_supervised_tokens_gives_zeros(kind: str) -> None:
    """Gradients of zero, not none: DDP waits for each trainable parameter."""
    model, inputs = HEADS[kind](), batch()
    assert fused_linear.install(base_of(model)) is None
    inputs["labels"] = torch.full_like(inputs["labels"], -100)
    loss = fused(model, inputs, Objective(entropy=True))
    assert {value.item() for value in loss.as_dict().values()} == {0}
    loss.objective.backward()
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            assert parameter.grad is not None, name
            assert parameter.grad.abs().max() == 0, name


def test_given_positions_give_the_same_sums() -> None:
    model, inputs = llama(), batch()
    assert fused_linear.install(model) is None
    known = fused(model, inputs, Objective(), trained_positions=trained_positions(inputs["labels"]))
    assert known.as_dict() == fused(model, inputs, Objective()).as_dict()


# Precision


def float64_gradients(hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor) -> list[torch.Tensor]:
    tensors = [t.double().requires_grad_() for t in (hidden, weight)]
    torch.nn.functional.cross_entropy(tensors[0] @ tensors[1].t(), targets, reduction="sum").backward()
    return [t.grad for t in tensors]  # type: ignore[misc]


def errors(found: list[Any], exact: list[torch.Tensor]) -> list[float]:
    return [float((f.double() - e).norm() / e.norm()) for f, e in zip(found, exact, strict=True)]


@pytest.mark.parametrize(
    ("chunk_size", "wanted", "worse"),
    [(512, torch.bfloat16, 1.02), (512, torch.float32, 1.02), (64, torch.float32, 1.02), (64, torch.bfloat16, 1.3)],
)
def test_bfloat16_gradients_are_as_close_to_float64_as_plain_autograds(
    chunk_size: int, wanted: torch.dtype, worse: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The chunks are summed in float32, but each chunk's product is rounded: one rounding more in bfloat16."""
    monkeypatch.setattr(chunked_loss, "CPU_SLICE", 300 * 64)  # of the weight's 1,000 rows
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(512, 64, generator=generator).bfloat16()
    weight = (torch.randn(1000, 64, generator=generator) / 8).bfloat16()
    targets = torch.randint(0, 1000, (512,), generator=generator)
    exact = float64_gradients(hidden, weight, targets)
    plain, ours = ([t.clone().requires_grad_() for t in (hidden, weight)] for _ in range(2))
    plain[1].grad_dtype = ours[1].grad_dtype = wanted  # float32: as where the optimizer keeps master values
    logits = (plain[0] @ plain[1].t()).float()
    (torch.nn.functional.cross_entropy(logits, targets, reduction="sum") / 300).backward()
    scale, dtypes = torch.tensor(1 / 300), [torch.bfloat16, wanted]
    with torch.no_grad():
        scores, made = linear_chunks(
            ours, LogitTransform(), targets, LossSettings(chunk_size=chunk_size), dtypes, scale
        )
    (PrecomputedGradients.apply(scores.loss.sum(), made, scale, *ours) / 300).backward()
    assert ours[1].grad is not None
    assert ours[1].grad.dtype == wanted
    of_ours, of_plain = ([300 * t.grad.double() for t in tensors if t.grad is not None] for tensors in (ours, plain))
    for our_error, plain_error in zip(errors(of_ours, exact), errors(of_plain, exact), strict=True):
        assert our_error <= worse * plain_error


def test_a_gradient_scale_changes_no_number() -> None:
    found = []
    for scale in (None, torch.tensor(0.25)):
        model = HEADS["lora on the head"]()
        assert fused_linear.install(base_of(model), 7) is None
        loss = fused(model, batch(), Objective(), gradient_scale=scale)
        (loss.objective * 0.25).backward()
        found.append((loss.objective.item(), gradients(model)))
    assert found[0][0] == found[1][0]
    assert_same_gradients(found[1][1], found[0][1], 1e-6)


def test_autocast_multiplies_in_its_dtype_and_returns_gradients_in_the_weights_dtype() -> None:
    model, inputs = llama(), batch()
    with torch.autocast("cpu", torch.bfloat16):
        expected = plain(model, inputs, Objective())
    expected.objective.backward()
    of_plain = gradients(model)
    assert fused_linear.install(model, 7) is None
    with torch.autocast("cpu", torch.bfloat16):
        loss = fused(model, inputs, Objective())
    loss.objective.backward()
    assert loss.nll.item() == pytest.approx(expected.nll.item(), rel=1e-6)
    found = gradients(model)
    assert {g.dtype for g in found.values()} == {torch.float32}
    assert_same_gradients(found, of_plain, 0.05)


def test_a_model_in_bfloat16_gets_gradients_in_bfloat16() -> None:
    model, inputs = llama().bfloat16(), batch()
    expected = plain(model, inputs, Objective())
    expected.objective.backward()
    of_plain = gradients(model)
    assert fused_linear.install(model, 7) is None
    loss = fused(model, inputs, Objective())
    loss.objective.backward()
    assert loss.nll.item() == pytest.approx(expected.nll.item(), rel=1e-6)
    found = gradients(model)
    assert {g.dtype for g in found.values()} == {torch.bfloat16}
    assert_same_gradients(found, of_plain, 0.05)


# The model stays what it was


def test_without_an_objective_the_model_is_untouched(tmp_path: Path) -> None:
    model: Any = tiny_llama(64)
    ids = torch.arange(1, 8)[None]
    names, logits = list(model.state_dict()), model(input_ids=ids).logits
    signature = inspect.signature(model.forward)
    generated = model.generate(ids, max_new_tokens=5, do_sample=False)
    assert fused_linear.install(model) is None
    assert list(model.state_dict()) == names
    assert inspect.signature(model.forward) == signature
    assert model(input_ids=ids).logits.equal(logits)
    assert model(input_ids=ids, labels=ids).loss.item() > 0
    assert model.generate(ids, max_new_tokens=5, do_sample=False).equal(generated)
    model.save_pretrained(tmp_path)
    assert AutoModelForCausalLM.from_pretrained(tmp_path)(input_ids=ids).logits.equal(logits)


def test_a_copy_of_the_model_uses_its_own_weights() -> None:
    model, inputs = llama(), batch()
    assert fused_linear.install(model) is None
    other = copy.deepcopy(model)
    other.lm_head.weight.data.zero_()
    tokens = fused(other, inputs, Objective())
    assert tokens.nll.item() / tokens.tokens.item() == pytest.approx(torch.tensor(VOCAB).log().item(), rel=1e-6)
    assert fused(model, inputs, Objective()).nll.item() != pytest.approx(tokens.nll.item(), rel=1e-3)


def test_installing_twice_replaces_the_first() -> None:
    model, inputs = llama(), batch()
    expected = plain(model, inputs, Objective())
    assert fused_linear.install(model, 3) is None
    assert fused_linear.install(model, 5) is None
    assert_same_loss(fused(model, inputs, Objective()), expected)
    assert model(input_ids=inputs["input_ids"]).logits.shape == (2, 24, VOCAB)


def test_a_model_whose_logits_need_more_than_the_decoders_output_keeps_the_plain_path() -> None:
    class Shifted(type(llama())):  # type: ignore[misc]
        def forward(self, input_ids: Any = None, **kwargs: Any) -> Any:
            outputs = super().forward(input_ids=input_ids, **kwargs)
            if input_ids is not None:
                outputs.logits = outputs.logits + input_ids[..., None]
            return outputs

    model = llama()
    model.__class__ = Shifted
    reason = fused_linear.install(model)
    assert reason == "its logits are not a function of what model returns"
    assert "forward" not in model.__dict__


def test_dropout_in_an_adapter_on_the_head_is_drawn_in_training() -> None:
    model, inputs = with_lora(llama(), lora_dropout=0.5), batch()
    assert fused_linear.install(base_of(model), 7) is None
    still = [fused(model, inputs, Objective()).nll.item() for _ in range(2)]
    model.train()
    drawn = [fused(model, inputs, Objective()).nll.item() for _ in range(2)]
    assert still[0] == still[1]
    assert drawn[0] != drawn[1]


@pytest.mark.parametrize("kind", ["tied", "lora on the head"])
def test_checkpointed_layers_give_the_same_gradients(kind: str) -> None:
    found = []
    for checkpointed in (False, True):
        model = HEADS[kind]().train()
        assert fused_linear.install(base_of(model), 7) is None
        if checkpointed:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        fused(model, batch(), Objective()).objective.backward()
        found.append(gradients(model))
    assert_same_gradients(found[1], found[0], 1e-6)


def test_gradients_are_used_up_by_one_backward() -> None:
    model = llama()
    assert fused_linear.install(model) is None
    loss = fused(model, batch(), Objective())
    loss.objective.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="used up"):
        loss.objective.backward()


# Chunks


@pytest.mark.parametrize("tokens", [0, 1, 5, 4096, 100_000])
@pytest.mark.parametrize("vocab_size", [100, 32_000, 151_936, 10**9])
def test_chunks_are_of_equal_size_and_hold_no_more_than_the_machine_should(tokens: int, vocab_size: int) -> None:
    size = choose_chunk_size(torch.device("cpu"), vocab_size, tokens)
    assert 1 <= size <= max(tokens, 1)
    assert size == 1 or size * vocab_size <= 2**26
    chunks = -(-tokens // size)
    assert chunks * size - tokens < max(chunks, 1)


@pytest.mark.parametrize(("gib", "logits"), [(80, 2**27), (24, 24 * 2**21)])
def test_a_gpus_chunks_follow_its_size_and_not_what_is_free(
    gib: int, logits: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A resumed run has its optimizer from the first step on, and must round as an uninterrupted one."""
    device = torch.device("cuda", 0)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: SimpleNamespace(total_memory=gib * 2**30))
    most = logits // 32_000
    assert [choose_chunk_size(device, 32_000, tokens) for tokens in (most, most + 1)] == [most, -(-(most + 1) // 2)]


@pytest.mark.parametrize("kind", ["untied", "lora on the head"])
def test_no_more_than_a_chunk_of_logits_is_ever_held(kind: str) -> None:
    """The largest tensor that is made is the head's own gradient, or a chunk of logits."""
    model, inputs = HEADS[kind](), batch(tokens=200)
    assert fused_linear.install(base_of(model), 4) is None
    largest = 0

    class Watch(torch.overrides.TorchFunctionMode):
        def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            nonlocal largest
            result = function(*args, **(kwargs or {}))
            if isinstance(result, torch.Tensor) and not result._is_view() and VOCAB in result.shape[-1:]:
                largest = max(largest, result.numel())
            return result

    with Watch():
        fused(model, inputs, Objective()).objective.backward()
    assert 0 < largest <= 4 * VOCAB


# Ranks


RANK_HEADS = ("tied", "lora on the head")


def _rank(rank: int, folder: Path) -> None:
    found = []
    for kind in RANK_HEADS:
        model = HEADS[kind]()
        assert fused_linear.install(base_of(model), 7) is None
        wrapped = DistributedDataParallel(model)
        for seed in (0, 2):  # twice: DDP reports in the second backward pass what it missed in the first
            loss = TokenLoss(**wrapped(**batch(seed + rank), objective=Objective(), use_cache=False))
            loss.objective.backward()
        found.append(gradients(model))
    if rank == 0:
        torch.save(found, folder / "gradients.pt")


@pytest.mark.slow
def test_two_ranks_average_the_gradients_of_their_sums(tmp_path: Path) -> None:
    spawn_ranks(_rank, tmp_path, 2)
    for kind, found in zip(RANK_HEADS, torch.load(tmp_path / "gradients.pt", weights_only=True), strict=True):
        model = HEADS[kind]()
        for seed in range(4):
            (plain(model, batch(seed), Objective()).objective / 2).backward()
        assert_same_gradients(found, gradients(model), 1e-5)
