"""Whether a run may resume from a checkpoint."""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from peft import LoraConfig, get_peft_model
from transformers import BitsAndBytesConfig

from sft.checkpoint import compatibility
from sft.checkpoint.compatibility import ResumeFingerprint, adapter_facts, describe_adapter, digest_lengths
from sft.errors import UserError
from sft.loss.metrics import TokenCounts
from tests.builders import tiny_llama


@pytest.mark.parametrize(
    ("modules", "shown"),
    [({"v_proj", "q_proj"}, "['q_proj', 'v_proj']"), (r".*\.q_proj", r".*\.q_proj"), (None, "None")],
)
def test_an_adapter_is_described_however_its_modules_are_named(modules: Any, shown: str) -> None:
    config = SimpleNamespace(r=8, lora_alpha=16, target_modules=modules)
    assert describe_adapter(SimpleNamespace(peft_config={"default": config})) == (
        f"r=8, lora_alpha=16, target_modules={shown}"
    )


def test_a_whole_model_has_no_adapter() -> None:
    assert describe_adapter(object()) is None
    assert adapter_facts(object()) is None


def test_counts_are_restored(tmp_path: Path) -> None:
    shape = ResumeFingerprint(1, 2, 3, 40, "3f", 0, None, "random")
    counts = TokenCounts(1.5, 1.25, 7, 3, 2, 1, 30)
    compatibility.save(tmp_path, shape, counts, 4, [0], None)
    assert compatibility.load(tmp_path, shape) == (counts, 4)
    with pytest.raises(UserError, match="seed: was 0"):
        compatibility.load(tmp_path, replace(shape, seed=1))
    (tmp_path / "run_shape.json").unlink()
    assert compatibility.load(tmp_path, shape) == (TokenCounts.zero(), 0)


def test_the_dtype_of_the_weights_is_restored(tmp_path: Path) -> None:
    shape = ResumeFingerprint(1, 2, 3, 40, "3f", 0, "r=4", "random")
    compatibility.save(tmp_path, shape, TokenCounts.zero(), 0, [0], "bfloat16")
    assert compatibility.dtype_of_checkpoint(tmp_path) == "bfloat16"


@pytest.mark.parametrize(
    ("shape", "dtype"),
    [
        ({"adapter": None, "master_weights": True}, "bfloat16"),
        ({"adapter": None, "master_weights": False}, "float32"),
        ({"adapter": None}, "float32"),
        ({"adapter": "r=4", "master_weights": False}, None),
    ],
)
def test_the_optimizer_of_an_older_checkpoint_shows_the_dtype(tmp_path: Path, shape: Any, dtype: str | None) -> None:
    assert compatibility.dtype_of_checkpoint(tmp_path) is None, "another trainer's"
    (tmp_path / "run_shape.json").write_text(json.dumps({"shape": shape, "counts": {}}))
    assert compatibility.dtype_of_checkpoint(tmp_path) == dtype


@pytest.mark.parametrize(("was", "dtype"), [(True, "bfloat16"), (False, "float32")])
def test_an_optimizer_that_does_not_fit_names_the_key_to_set(tmp_path: Path, was: bool, dtype: str) -> None:
    shape = ResumeFingerprint(1, 2, 3, 40, "3f", 0, None, "random", master_weights=was)
    compatibility.save(tmp_path, shape, TokenCounts.zero(), 0, [0], None)
    with pytest.raises(UserError) as caught:
        compatibility.load(tmp_path, replace(shape, master_weights=not was))
    assert [(problem.key, problem.hint) for problem in caught.value.problems[1:]] == [
        ("dtype", f"set `dtype: {dtype}`")
    ]


def test_the_digest_depends_on_the_order_of_the_lengths() -> None:
    assert digest_lengths(np.array([3, 5])) == digest_lengths(np.array([3, 5], dtype=np.int32))
    assert digest_lengths(np.array([3, 5])) != digest_lengths(np.array([5, 3]))


SHAPE = ResumeFingerprint(1, 2, 3, 40, "3f", 0, "r=4", "random")


def adapted(base: str = "/models/base", quantization: Any = None, commit: str | None = None, **settings: Any) -> Any:
    """A model with an adapter, on a base that calls itself `base`."""
    model = tiny_llama(64)
    model.name_or_path = base
    model.config._commit_hash = commit
    if quantization is not None:
        model.config.quantization_config = quantization
    return get_peft_model(model, LoraConfig(r=4, target_modules=["q_proj"], **settings))


def refused(folder: Path, before: Any, now: Any) -> list[tuple[str | None, str]]:
    """The keys and messages with which a run with the model `now` is refused a checkpoint of one with `before`."""
    compatibility.save(folder, replace(SHAPE, adapter_facts=adapter_facts(before)), TokenCounts.zero(), 0, [0], None)
    try:
        compatibility.load(folder, replace(SHAPE, adapter_facts=adapter_facts(now)))
    except UserError as error:
        return [(p.key, p.message) for p in error.problems[1:]]
    return []


@pytest.mark.parametrize(
    ("setting", "before", "now"),
    [
        ("use_rslora", False, True),
        ("use_dora", False, True),
        ("bias", "none", "all"),
        ("alpha_pattern", {}, {"q_proj": 64}),
        ("rank_pattern", {}, {"q_proj": 2}),
        ("init_lora_weights", True, "olora"),
        ("modules_to_save", None, ["lm_head"]),
        ("layers_to_transform", None, [0]),
        ("trainable_token_indices", None, [1, 2]),
    ],
)
def test_each_setting_of_an_adapter_that_differs_is_named(tmp_path: Path, setting: str, before: Any, now: Any) -> None:
    told = refused(tmp_path, adapted(), adapted(**{setting: now}))
    assert told == [(f"lora_config.{setting}", f"was {before} in {tmp_path}, is {now} now")]
    assert refused(tmp_path, adapted(**{setting: now}), adapted(**{setting: now})) == []


def test_dropout_is_a_setting_of_training(tmp_path: Path) -> None:
    assert refused(tmp_path, adapted(), adapted(lora_dropout=0.1)) == []


def test_another_base_is_an_error_but_not_a_moved_one(tmp_path: Path) -> None:
    here, there = tmp_path / "here", tmp_path / "there"
    for folder in (here, there):
        folder.mkdir()
    differs = [("model_name_or_path", f"was {here} in {tmp_path}, is {there} now")]
    assert refused(tmp_path, adapted(str(here)), adapted(str(there))) == differs
    here.rmdir()
    assert refused(tmp_path, adapted(str(here)), adapted(str(there))) == []
    assert [key for key, _ in refused(tmp_path, adapted("org/a"), adapted("org/b"))] == ["model_name_or_path"]


def test_a_hub_base_is_compared_by_its_commit_if_known(tmp_path: Path) -> None:
    assert [key for key, _ in refused(tmp_path, adapted(commit="a1"), adapted(commit="b2"))] == ["model_revision"]
    assert refused(tmp_path, adapted(commit="a1"), adapted(commit=None)) == []


def test_the_quantization_of_the_base_is_compared_but_not_its_compute_dtype(tmp_path: Path) -> None:
    def bits(**settings: Any) -> Any:
        return adapted(quantization=BitsAndBytesConfig(load_in_4bit=True, **settings))

    assert refused(tmp_path, bits(), bits(bnb_4bit_compute_dtype="bfloat16")) == []
    assert refused(tmp_path, bits(), bits(bnb_4bit_quant_type="nf4")) == [
        ("quantization_config.bnb_4bit_quant_type", f"was fp4 in {tmp_path}, is nf4 now")
    ]
    told = [("quantization_config.load_in_4bit", f"was False in {tmp_path}, is True now")]
    assert refused(tmp_path, adapted(), bits()) == told


def test_what_an_older_checkpoint_lacks_is_not_compared(tmp_path: Path) -> None:
    content = {"world_size": 1, "seed": 0, "adapter": "r=4", "adapter_facts": {"lora_config.use_rslora": False}}
    now = replace(SHAPE, adapter_facts=adapter_facts(adapted(use_dora=True)))
    for facts in (content, {k: v for k, v in content.items() if k != "adapter_facts"}):
        (tmp_path / "run_shape.json").write_text(json.dumps({"shape": facts, "counts": asdict(TokenCounts.zero())}))
        assert compatibility.load(tmp_path, now) == (TokenCounts.zero(), 0)
        with pytest.raises(UserError, match="adapter: was r=4"):
            compatibility.load(tmp_path, replace(now, adapter="r=8"))
    whole = replace(SHAPE, adapter=None)
    with pytest.raises(UserError) as caught:
        compatibility.load(tmp_path, whole)
    assert [problem.key for problem in caught.value.problems[1:]] == ["adapter"]
