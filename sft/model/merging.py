"""Folding an adapter into its base, and proving on the files written that nothing changed on the way.

    W_merged = W_base + scaling * B A        (LoRA; peft knows the formulas of its variants)

A 4-bit or 8-bit base is a special case with a usual mistake: the adapter was trained on top of the *rounded* weights
and has learned to make up for their rounding, so that folding it into the original 16-bit weights gives a function
that nobody trained. Here the base is quantized exactly as in training, each weight is written out as the number that
its bits stand for, and the adapter is added to that: the merged model is the function that was trained. What an 8-bit
layer does beyond its weights (it rounds its inputs too) has no place in a plain layer and is left out.

The arithmetic is done in float32, whatever the result is saved in, so that there is one rounding and not two. It takes
4 bytes of host memory for each weight of the base.
"""

from __future__ import annotations

import logging
import shutil
import time
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sft.errors import Problem, UserError
from sft.model.embeddings import untie_adapted_ends
from sft.model.lora import attach_saved_adapter
from sft.model.paths import is_adapter, require_trained
from sft.model.precision import DTYPES
from sft.model.quantization import dequantize
from sft.model.trained import find_base, load_base, load_saved_tokenizer

if TYPE_CHECKING:
    import torch
    from peft import PeftModel
    from transformers import PreTrainedModel, PreTrainedTokenizerFast

logger = logging.getLogger("sft")

# Largest accepted difference of the logits, as a share of their size (root mean square over root mean square).
TOLERANCE = {"float32": 1e-4, "float16": 1e-2, "bfloat16": 5e-2}
TOLERANCE_8BIT = 1e-1  # the rounding of the inputs is not part of the merged model
_PROBE_SHAPE = (2, 48)


@dataclass(frozen=True)
class MergeReport:
    """What was merged and how well the result does what the adapter did.

    Attributes:
        base, adapter, output_dir: what went in and where it went.
        dtype: of the weights written.
        parameters: how many weights were written.
        error: difference between the logits of the merged model, read back from disk, and those of base and adapter,
            relative to their size.
        tolerance: what `error` was allowed to be.
        quantized_error: the same for the model as it was trained, on its quantized base; None without quantization.
        effect: difference between adapter and base, relative in the same way: what training changed.
        seconds: the time it took.
    """

    base: str
    adapter: str
    output_dir: str
    dtype: str
    parameters: int
    error: float
    tolerance: float
    quantized_error: float | None
    effect: float
    seconds: float

    def __str__(self) -> str:
        text = (
            f"Merged {self.adapter} into {self.base}: {self.parameters:,} weights in {self.dtype} in "
            f"{self.seconds:.1f} s. Logits differ from the adapter's by {self.error:.1e} of their size (allowed "
            f"{self.tolerance:.0e}), and from the base's by {self.effect:.1e}."
        )
        if self.quantized_error is not None:
            text += f" Against the quantized model as it was trained: {self.quantized_error:.1e}."
        return text


def _check_request(folder: Path, output_dir: Path, dtype: str | None) -> None:
    require_trained(folder)
    if not is_adapter(folder):
        raise UserError(
            Problem(f"{str(folder)!r} holds a whole model: there is nothing to merge", "It can be used as it is.")
        )
    if output_dir.exists() and (not output_dir.is_dir() or any(output_dir.iterdir())):
        raise UserError(
            Problem(
                f"{str(output_dir)!r} is not empty", "Name a new folder; nothing is overwritten.", key="--output_dir"
            )
        )
    if dtype is not None and dtype not in DTYPES:
        raise UserError(Problem(f"no such dtype: {dtype!r}", f"One of {', '.join(DTYPES)}.", key="--dtype"))


def probe_tokens(vocabulary: int) -> torch.Tensor:
    """Token ids that the models are compared on, the same at each call; the last ids are among them.

    Returns:
        (B, T) = (2, 48), int64.
    """
    import torch

    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(0, vocabulary, _PROBE_SHAPE, generator=generator)
    newest = torch.arange(max(0, vocabulary - 8), vocabulary)
    ids[0, 4 : 4 + len(newest)] = newest
    return ids


def _logits(model: Any, ids: torch.Tensor) -> torch.Tensor:
    """(B, T, V) in float32 on the CPU."""
    import torch

    model.eval()
    with torch.no_grad():
        return model(input_ids=ids.to(model.device), use_cache=False).logits.float().cpu()  # type: ignore[no-any-return]


def relative_difference(ours: torch.Tensor, reference: torch.Tensor) -> float:
    """Root mean square of the difference over that of the reference; not a number if either is not finite."""
    columns = min(ours.shape[-1], reference.shape[-1])
    ours, reference = ours[..., :columns], reference[..., :columns]
    return float((ours - reference).pow(2).mean().sqrt() / reference.pow(2).mean().sqrt())


def _within(error: float, tolerance: float) -> bool:
    return error <= tolerance  # false for NaN


def _load_unquantized(folder: Path, reference: str, facts: dict[str, Any], trust_remote_code: bool) -> PeftModel:
    """Base and adapter in float32 on the CPU, computing exactly what was trained.

    The adapter is attached while the base still has its number format of training: an initialisation that changes the
    base (PiSSA) then rounds as it did.
    """
    import torch

    base = load_base(reference, facts, trust_remote_code=trust_remote_code)
    if facts.get("quantization_config"):
        base = dequantize(base, getattr(torch, str(base.config.dtype).removeprefix("torch.")))
    on_cpu: Any = base.to("cpu")  # type: ignore[arg-type]
    adapted: Any = attach_saved_adapter(on_cpu, str(folder))
    return adapted.to(torch.float32)  # type: ignore[no-any-return]


def _quantized_logits(
    folder: Path, reference: str, facts: dict[str, Any], ids: torch.Tensor, trust_remote_code: bool
) -> torch.Tensor:
    base = load_base(reference, facts, trust_remote_code=trust_remote_code)
    return _logits(attach_saved_adapter(base, str(folder)), ids)


def _quantized_tolerance(facts: dict[str, Any]) -> float:
    quantization = facts["quantization_config"]
    if quantization.get("load_in_8bit"):
        return TOLERANCE_8BIT
    return TOLERANCE[str(quantization.get("bnb_4bit_compute_dtype", "float32"))]


def _fold(adapted: PeftModel, ids: torch.Tensor, expected: torch.Tensor) -> PreTrainedModel:
    """Merge in float32 and check the arithmetic.

    Raises:
        UserError: peft has no formula for merging this kind of adapter.
        RuntimeError: the merged weights compute something else.
    """
    untie_adapted_ends(adapted)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # peft warns of adapters on tied weights, which are seen to above
            merged: Any = adapted.merge_and_unload(safe_merge=True)
    except (RuntimeError, ValueError, NotImplementedError) as error:
        raise UserError(Problem(f"this adapter cannot be merged: {error}", "Serve it beside its base.")) from error
    difference = relative_difference(_logits(merged, ids), expected)
    if not _within(difference, TOLERANCE["float32"]):
        raise RuntimeError(
            f"the merged weights do not compute what the adapter does: {difference:.1e} of the logits' size"
        )
    return merged  # type: ignore[no-any-return]


def _write(model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, adapter: Path, folder: Path) -> None:
    from transformers import GenerationConfig

    if (adapter / "generation_config.json").is_file():
        model.generation_config = GenerationConfig.from_pretrained(str(adapter))
    model.config.use_cache = True
    model.save_pretrained(str(folder))
    tokenizer.save_pretrained(str(folder))


def _read_back(folder: Path, ids: torch.Tensor, trust_remote_code: bool) -> torch.Tensor:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(str(folder), dtype="auto", trust_remote_code=trust_remote_code)
    return _logits(model, ids)


def _warn_of_little_effect(effect: float, error: float, dtype: str) -> None:
    """Says so when the merged model is hardly another than the base."""
    if effect == 0.0:
        logger.warning("The adapter changes nothing (its B matrices are zero): the merged model is the base")
    elif error > effect / 2:
        logger.warning(
            "Rounding to %s changes the model by %.1e, and training had changed it by %.1e: float32 keeps all of it",
            *(dtype, error, effect),
        )


def merge(
    model_dir: str | Path, output_dir: str | Path, dtype: str | None = None, *, trust_remote_code: bool = False
) -> MergeReport:
    """Fold the adapter in `model_dir` into its base and write a whole model, verified, to `output_dir`.

    The files are written beside `output_dir`, read back, compared with base and adapter on probe tokens, and only then
    moved there: a folder of that name is always a model that was checked.

    Args:
        dtype: of the weights written; None is what the base was held in during training.

    Raises:
        UserError: no adapter, a base that is gone, an `output_dir` that is not empty, or a number format too coarse.
        RuntimeError: the merged model does not compute what the adapter computes.
    """
    import torch

    started = time.monotonic()
    folder, target = Path(model_dir).expanduser(), Path(output_dir).expanduser()
    _check_request(folder, target, dtype)
    reference, facts = find_base(folder)
    tokenizer = load_saved_tokenizer(folder, trust_remote_code)
    facts.setdefault("embedding_rows", len(tokenizer))
    ids = probe_tokens(len(tokenizer))

    adapted: Any = _load_unquantized(folder, reference, facts, trust_remote_code)
    dtype = dtype or str(facts.get("dtype") or adapted.config.dtype).removeprefix("torch.")
    expected = _logits(adapted, ids)
    with adapted.disable_adapter():
        effect = relative_difference(expected, _logits(adapted, ids))
    merged = _fold(adapted, ids, expected).to(getattr(torch, dtype))
    parameters = merged.num_parameters()

    unchecked = target.parent / f".{target.name}.unchecked"
    shutil.rmtree(unchecked, ignore_errors=True)
    try:
        _write(merged, tokenizer, folder, unchecked)
        del merged, adapted
        result = _read_back(unchecked, ids, trust_remote_code)
        error = relative_difference(result, expected)
        _require(error, TOLERANCE[dtype], f"adapter and base, in {dtype}")
        quantized_error = None
        if facts.get("quantization_config"):
            as_trained = _quantized_logits(folder, reference, facts, ids, trust_remote_code)
            quantized_error = relative_difference(result, as_trained)
            _require(quantized_error, max(_quantized_tolerance(facts), TOLERANCE[dtype]), "the quantized model")
        if target.exists():
            target.rmdir()
        unchecked.rename(target)
    finally:
        shutil.rmtree(unchecked, ignore_errors=True)
    _warn_of_little_effect(effect, error, dtype)
    report = MergeReport(
        base=reference,
        adapter=str(folder),
        output_dir=str(target),
        dtype=dtype,
        parameters=parameters,
        error=error,
        tolerance=TOLERANCE[dtype],
        quantized_error=quantized_error,
        effect=effect,
        seconds=time.monotonic() - started,
    )
    logger.info("%s", report)
    return report


def _require(error: float, tolerance: float, what: str) -> None:
    if not _within(error, tolerance):
        raise RuntimeError(
            f"the merged model as written differs from {what} by {error:.1e} of the logits' size, more than the "
            f"{tolerance:.0e} that rounding explains; nothing was kept"
        )
