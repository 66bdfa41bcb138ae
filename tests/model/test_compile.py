"""`torch_compile` makes at most three graphs for all lengths, and gives the numbers of a run without it."""

from __future__ import annotations

import os
import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch._dynamo.utils import counters
from transformers import AutoModelForCausalLM, Gemma2Config, Gemma3TextConfig, MixtralConfig, Qwen2Config, Qwen3Config

import sft_main
from sft.data.loading.document_offsets import DocumentOffsets
from sft.errors import UserError
from sft.model import compile as compilation
from sft.model.activation_checkpointing import checkpoint_activations
from sft.model.attention import document_attention
from sft.model.compile import CompileSettings, compile_layers, compile_settings
from sft.training.arguments import training_arguments
from tests.builders import tiny_llama
from tests.runs import arithmetic, log_history, losses, run, write_config, write_rows

TRACED = CompileSettings("aot_eager", {})  # graphs of dynamo and autograd without inductor's code: seconds
VOCABULARY = 100
TINY: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "pad_token_id": 0,
}
SLIDING, FULL = "sliding_attention", "full_attention"


@pytest.fixture(autouse=True)
def nothing_compiled_yet() -> Iterator[None]:
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()


def graphs() -> int:
    return counters["stats"]["unique_graphs"]


def llama(**overrides: Any) -> Any:
    document_attention.register()
    settings = {"attn_implementation": document_attention.NAME, "num_hidden_layers": 3, **overrides}
    return tiny_llama(VOCABULARY, **settings)


def model_of(config: Any) -> Any:
    document_attention.register()
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config, attn_implementation=document_attention.NAME)


def adapted(model: Any, dropout: float = 0.0) -> Any:
    torch.manual_seed(1)
    lora = LoraConfig(r=4, target_modules="all-linear", lora_dropout=dropout, init_lora_weights=False)
    return get_peft_model(model, lora)


def batches(count: int = 8) -> Iterator[list[int]]:
    """Lengths of documents. The first batch has as many tokens as a Llama's width, and its longest the head's: numbers
    that are equal by chance must not be taken for the same.
    """
    rng = random.Random(0)
    yield [16, 16, 24, 8]
    for _ in range(count - 1):
        yield [rng.randint(2, 40) for _ in range(rng.randint(1, 20))]


def hidden(model: Any, lengths: list[int]) -> torch.Tensor:
    ids = torch.randint(0, VOCABULARY, (1, sum(lengths)), generator=torch.Generator().manual_seed(sum(lengths)))
    positions = torch.cat([torch.arange(length) for length in lengths])[None]
    inputs = document_attention.attention_inputs(model.config, DocumentOffsets.of(lengths))
    return model(input_ids=ids, position_ids=positions, use_cache=False, **inputs).logits


def results(model: Any, evaluates: bool = True) -> list[torch.Tensor]:
    """Logits in training and in evaluation, and the gradients, over batches of many lengths."""
    torch.manual_seed(7)  # of dropout
    made = []
    for lengths in batches():
        logits = hidden(model.train(), lengths)
        logits.pow(2).mean().backward()
        made.append(logits.detach())
        if evaluates:
            with torch.no_grad():
                made.append(hidden(model.eval(), lengths))
    return made + [p.grad for p in model.parameters() if p.grad is not None]


def assert_same(make: Callable[[], Any], settings: CompileSettings, expected_graphs: int) -> None:
    plain = results(make())
    assert graphs() == 0
    model = make()
    compile_layers(model, settings, evaluates=True)
    compiled = results(model)
    assert graphs() == expected_graphs
    assert len(compiled) == len(plain) > 20
    for one, other in zip(compiled, plain, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6)


def checkpointed(model: Any, mode: Any) -> Any:
    checkpoint_activations(model, mode)
    return model


MODELS: dict[str, tuple[Callable[[], Any], int]] = {
    "all weights": (llama, 2),  # training, evaluation
    "frozen embeddings": (lambda: adapted(llama(), dropout=0.2), 3),  # and the first layer
    "an adapter, checkpointed": (lambda: adapted(checkpointed(llama(), "full"), dropout=0.2), 2),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", MODELS)
def test_many_lengths_share_the_graphs(name: str) -> None:
    make, expected = MODELS[name]
    assert_same(make, TRACED, expected)


FAMILIES: dict[str, tuple[Any, int]] = {
    "qwen3": (Qwen3Config(**TINY, num_hidden_layers=3), 2),
    "sliding everywhere": (
        Qwen2Config(**TINY, num_hidden_layers=2, use_sliding_window=True, sliding_window=5, layer_types=[SLIDING] * 2),
        2,
    ),
    "soft-capped, in turns": (
        Gemma2Config(**TINY, num_hidden_layers=4, sliding_window=5, layer_types=[SLIDING, FULL] * 2),
        3,
    ),
    "two rotations": (
        Gemma3TextConfig(**TINY, num_hidden_layers=4, sliding_window=5, layer_types=[SLIDING, SLIDING, SLIDING, FULL]),
        3,
    ),
    "experts": (MixtralConfig(**TINY, num_hidden_layers=2, num_local_experts=4, num_experts_per_tok=2), 2),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", FAMILIES)
def test_model_families_compile(name: str) -> None:
    config, expected = FAMILIES[name]
    assert_same(lambda: model_of(config), TRACED, expected)


def test_a_run_without_evaluation_compiles_no_graph_for_it() -> None:
    model = llama()
    compile_layers(model, CompileSettings("eager", {}), evaluates=False)
    with torch.no_grad():
        hidden(model, [5, 4])
    assert graphs() == 0
    hidden(model, [5, 4])
    assert graphs() == 1


def test_a_call_without_documents_is_not_compiled() -> None:
    model = llama()
    expected = model(torch.arange(9)[None]).logits
    compile_layers(model, CompileSettings("eager", {}), evaluates=True)
    assert model(torch.arange(9)[None]).logits.equal(expected)
    assert graphs() == 0


def test_what_needs_a_fourth_graph_runs_uncompiled(caplog: pytest.LogCaptureFixture) -> None:
    """Hooks that differ between the layers need a graph each; the run goes on with the same numbers."""
    model, plain = llama(num_hidden_layers=5), llama(num_hidden_layers=5)
    for each in (model, plain):
        for number, layer in enumerate(each.model.layers):
            layer.mlp.register_forward_pre_hook(lambda _, args, n=number: (args[0] * (1 + n),))
    expected = hidden(plain, [5, 4])
    compile_layers(model, CompileSettings("eager", {}), evaluates=True)
    with caplog.at_level("WARNING", "sft"):
        assert torch.allclose(hidden(model, [5, 4]), expected, atol=1e-6)
    assert graphs() == compilation.MAX_GRAPHS
    assert sum("runs uncompiled" in record.message for record in caplog.records) == 1


def test_each_of_three_keys_turns_compiling_on() -> None:
    assert compile_settings(False, None, None) is None
    for asked in ((True, None, None), (False, "inductor", None), (False, None, "default")):
        settings = compile_settings(*asked)
        assert settings is not None
        assert settings.backend == "inductor"
        assert settings.options == {"fallback_random": True}
    assert compile_settings(True, "aot_eager", None) == TRACED


def test_a_mode_keeps_its_settings_except_cuda_graphs() -> None:
    settings = compile_settings(True, None, "max-autotune")
    assert settings is not None
    assert settings.options["max_autotune"] is True
    assert "triton.cudagraphs" not in settings.options


@pytest.mark.parametrize(
    ("backend", "mode", "words"),
    [
        ("inducter", None, "no backend 'inducter'"),
        (None, "fast", "no mode 'fast'"),
        (None, "reduce-overhead", "record a graph for each"),
        ("aot_eager", "default", "a mode of inductor"),
    ],
)
def test_wrong_backends_and_modes_are_refused(backend: str | None, mode: str | None, words: str) -> None:
    with pytest.raises(UserError, match=words):
        compile_settings(True, backend, mode)


def test_a_missing_compiler_is_reported_before_training() -> None:
    compiler_search = torch._inductor.cpp_builder.cpp_compiler_search
    compiler_search.cache_clear()
    with (
        torch._inductor.config.patch({"cpp.cxx": ("no-such-compiler",)}),
        pytest.raises(UserError, match="needs a C\\+\\+ compiler"),
    ):
        compile_settings(True, None, None)


def test_a_gpus_capability_is_a_constant_of_the_graph(monkeypatch: pytest.MonkeyPatch) -> None:
    """Dynamo cannot trace the call, nor what a cache wraps; without a GPU the answer is made up."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (8 + len(os.urandom(1)), 0))
    compile_layers(llama(), CompileSettings("eager", {}), evaluates=False)
    ask = document_attention.capability

    def add(x: torch.Tensor) -> torch.Tensor:
        return x + int(ask(99) >= (8, 0))

    assert torch.compile(add, fullgraph=True, backend="eager")(torch.zeros(1)).item() == 1


def test_padded_rows_are_refused() -> None:
    with pytest.raises(UserError, match=r"only sft_documents attention is compiled .*, and this run has sdpa"):
        compile_layers(tiny_llama(VOCABULARY, attn_implementation="sdpa"), TRACED, evaluates=True)


def test_a_layer_that_cannot_be_compiled_is_named() -> None:
    model = llama()
    compile_layers(model, CompileSettings("eager", {}), evaluates=True)
    model.model.layers[1].mlp.register_forward_hook(lambda *_: torch._dynamo.graph_break())
    with pytest.raises(UserError, match="LlamaDecoderLayer cannot be compiled"):
        hidden(model, [5, 4])


def test_upstreams_trainer_does_not_compile(tmp_path: Path) -> None:
    """It would compile the whole model, through accelerate."""
    given = {"output_dir": str(tmp_path), "torch_compile": True, "torch_compile_mode": "default"}
    arguments = training_arguments(given, bf16=False, fp16=False, plan=None)
    assert not arguments.torch_compile
    assert arguments.torch_compile_backend is None


# Whole runs, with inductor's code

STEPS = 20
RUNS = {
    "full": (["learning_rate=3e-3"], 2),
    "full_without_evaluation": (["learning_rate=3e-3", "eval_strategy=no", "validation_file=null"], 1),
    "full_2x4_selective": (
        [
            "learning_rate=3e-3",
            "activation_checkpoint.mode=selective",
            "per_device_train_batch_size=2",
            "gradient_accumulation_steps=4",
        ],
        2,
    ),
    "full_checkpointed": (["learning_rate=3e-3", "gradient_checkpointing=true"], 2),
    "lora": (["learning_rate=1e-2", "lora_config.r=8", "lora_config.lora_dropout=0.1"], 3),
    "lora_checkpointed": (
        ["learning_rate=1e-2", "lora_config.r=8", "lora_config.lora_dropout=0.1", "activation_checkpoint.mode=full"],
        2,
    ),
}


@pytest.fixture(scope="module")
def config_file(tmp_path_factory: pytest.TempPathFactory, model_dir: Path) -> Path:
    folder = tmp_path_factory.mktemp("compilation")
    return write_config(
        folder / "run.yaml",
        model_name_or_path=str(model_dir),
        dtype="float32",
        train_file=str(write_rows(folder / "train.jsonl", arithmetic(76))),
        validation_file=str(write_rows(folder / "validation.jsonl", arithmetic(13, start=1000))),
        cache_dir=str(folder / "cache"),
        max_seq_length=128,
        packing=False,
        per_device_train_batch_size=8,
        per_device_eval_batch_size=4,
        max_steps=STEPS,
        logging_steps=1,
        eval_strategy="steps",
        eval_steps=10,
        save_strategy="no",
    )


def trained(config_file: Path, name: str, *overrides: str) -> Path:
    output_dir = config_file.parent / name
    assert sft_main.main(["--config_file", str(config_file), f"output_dir={output_dir}", *overrides]) == 0
    return output_dir


def curve(out: Path, name: str) -> list[float]:
    return [entry[name] for entry in log_history(out)]


@pytest.mark.slow
@pytest.mark.parametrize("name", RUNS)
def test_the_curve_is_that_of_a_run_without_it(config_file: Path, name: str) -> None:
    overrides, expected = RUNS[name]
    plain = trained(config_file, f"{name}_plain", *overrides)
    assert graphs() == 0
    compiled = trained(config_file, name, *overrides, "torch_compile=true")
    assert graphs() == expected
    assert losses(plain)[-1] < 0.9 * losses(plain)[0], "little was learned, so that little was compared"
    assert losses(compiled) == pytest.approx(losses(plain), abs=1e-5)
    assert curve(compiled, "grad_norm") == pytest.approx(curve(plain, "grad_norm"), rel=1e-3)
    assert curve(compiled, "num_tokens") == curve(plain, "num_tokens")


@pytest.mark.slow
def test_two_processes(config_file: Path) -> None:
    settings = [*RUNS["lora"][0][:2], "gradient_checkpointing=true"]
    plain = trained(config_file, "one_process", *settings)
    out = config_file.parent / "two_processes"
    arguments = ["--config_file", str(config_file), f"output_dir={out}", *settings]
    # Of each graph after its function's first one there is a line.
    compiling = ["torch_compile=true", "per_device_train_batch_size=4"]
    done = run(*arguments, *compiling, processes=2, env={**os.environ, "TORCH_LOGS": "recompiles"})
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stderr.count("Recompiling function call_layer") <= 2 * (compilation.MAX_GRAPHS - 1)
    assert losses(out) == pytest.approx(losses(plain), abs=1e-5)
