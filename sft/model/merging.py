"""Merges an adapter into its base, and verifies on the files written that the function is the same.

    W_merged = W_base + scaling * B A        (LoRA; peft knows the formulas of its variants)

With a 4-bit or 8-bit base there is a common mistake: the adapter was trained on top of the *rounded* weights and has
learned to correct their rounding, so that merging it into the original 16-bit weights gives a function that nobody
trained. Here the base is quantized exactly as in training, its weights are dequantized, and the adapter is added to
those: the merged model is the function that was trained. An 8-bit layer also rounds its inputs, which a plain layer
does not; that is not reproduced.

All is computed in float32, whatever dtype the result is saved in: there is one rounding and not two. It takes 4 bytes
of main memory per weight of the base.
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
from sft.model.embeddings import untie_adapted_embeddings
from sft.model.lora import attach_saved_adapter
from sft.model.paths import is_adapter, require_trained
from sft.model.precision import DTYPES
from sft.model.trained_models import find_base, load_base, load_saved_tokenizer, restore_generation_config

if TYPE_CHECKING:
    import torch
    from peft import PeftModel
    from transformers import PreTrainedModel, PreTrainedTokenizerFast

logger = logging.getLogger("sft")

# Largest accepted difference of the logits, relative to their size (root mean square over root mean square).
TOLERANCE = {"float32": 1e-4, "float16": 1e-2, "bfloat16": 5e-2}
TOLERANCE_8BIT = 1e-1  # the rounding of the inputs is not part of the merged model


@dataclass(frozen=True)
class MergeReport:
    """What was merged, and how exactly the result reproduces the adapter.

    Attributes:
        base, adapter: what was merged.
        dtype: of the weights written.
        parameters: how many weights were written.
        error: difference between the logits of the merged model, read back from disk, and those of base and adapter,
            relative to their size.
        quantized_error: `error` against the adapter on its quantized base, as trained; None without quantization.
        effect: difference between adapter and base, relative in the same way: what training changed.
        seconds: the time it took.
    """

    base: str
    adapter: str
    dtype: str
    parameters: int
    error: float
    quantized_error: float | None
    effect: float
    seconds: float

    def __str__(self) -> str:
        text = (
            f"Merged {self.adapter} into {self.base}: {self.parameters:,} weights in {self.dtype} in "
            f"{self.seconds:.1f} s. Logits differ from the adapter's by {self.error:.1e} of their size (allowed "
            f"{TOLERANCE[self.dtype]:.0e}), and from the base's by {self.effect:.1e}."
        )
        if self.quantized_error is not None:
            text += f" Against the quantized model as it was trained: {self.quantized_error:.1e}."
        return text


def _check_request(folder: Path, output_dir: Path, dtype: str | None) -> None:
    require_trained(folder)
    if not is_adapter(folder):
        message = f"{str(folder)!r} holds a whole model: there is nothing to merge"
        raise UserError(Problem(message, "It can be used as it is."))
    if output_dir.exists() and (not output_dir.is_dir() or any(output_dir.iterdir())):
        hint = "Name a new folder; nothing is overwritten."
        raise UserError(Problem(f"{str(output_dir)!r} is not empty", hint, key="--output_dir"))
    if dtype is not None and dtype not in DTYPES:
        raise UserError(Problem(f"no such dtype: {dtype!r}", f"One of {', '.join(DTYPES)}.", key="--dtype"))


def _probe_tokens(vocabulary: int) -> torch.Tensor:
    """Returns the (2, 48) token ids that models are compared on: the same at each call, the newest ids among them."""
    import torch

    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(0, vocabulary, (2, 48), generator=generator)
    newest = torch.arange(max(0, vocabulary - 8), vocabulary)
    ids[0, 4 : 4 + len(newest)] = newest
    return ids


def _logits(model: Any, ids: torch.Tensor) -> torch.Tensor:
    """Returns (B, T, V) logits in float32 on the CPU."""
    import torch

    model.eval()
    with torch.no_grad():
        return model(input_ids=ids.to(model.device), use_cache=False).logits.float().cpu()  # type: ignore[no-any-return]


def relative_difference(ours: torch.Tensor, reference: torch.Tensor) -> float:
    """Returns the root mean square of the difference over that of the reference; NaN if either is not finite."""
    columns = min(ours.shape[-1], reference.shape[-1])
    ours, reference = ours[..., :columns], reference[..., :columns]
    return float((ours - reference).pow(2).mean().sqrt() / reference.pow(2).mean().sqrt())


@dataclass(frozen=True)
class _Adapter:
    """An adapter that is saved in `folder`, and its base as `find_base` describes it."""

    folder: Path
    base: str
    facts: dict[str, Any]
    trust_remote_code: bool

    def load_unquantized(self) -> PeftModel:
        """Loads base and adapter in float32 on the CPU, computing exactly what was trained.

        The adapter is attached while the base still has its dtype of training: an initialization that changes the base
        (PiSSA) then rounds as it did.
        """
        import torch

        base: Any = load_base(self.base, self.facts, trust_remote_code=self.trust_remote_code)
        if self.facts.get("quantization_config"):
            dtype = getattr(torch, str(base.config.dtype).removeprefix("torch."))
            base = base.dequantize(dtype=dtype).to(dtype=dtype)
        return attach_saved_adapter(base.to("cpu"), str(self.folder)).to(torch.float32)

    def quantized_logits(self, ids: torch.Tensor) -> torch.Tensor:
        """Returns the logits on the quantized base, as it was trained."""
        base = load_base(self.base, self.facts, trust_remote_code=self.trust_remote_code)
        return _logits(attach_saved_adapter(base, str(self.folder)), ids)

    def quantized_tolerance(self) -> float:
        """Returns the largest difference that the quantized base's own rounding explains."""
        quantization = self.facts["quantization_config"]
        if quantization.get("load_in_8bit"):
            return TOLERANCE_8BIT
        return TOLERANCE[str(quantization.get("bnb_4bit_compute_dtype", "float32"))]


def _merge_weights(adapted: PeftModel, ids: torch.Tensor, expected: torch.Tensor) -> PreTrainedModel:
    """Merges in float32 and checks that the logits are `expected`."""
    untie_adapted_embeddings(adapted)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # peft warns of adapters on tied weights, which were untied above
            merged: Any = adapted.merge_and_unload(safe_merge=True)
    except (RuntimeError, ValueError, NotImplementedError) as error:
        raise UserError(Problem(f"this adapter cannot be merged: {error}", "Serve it beside its base.")) from error
    difference = relative_difference(_logits(merged, ids), expected)
    if not difference <= TOLERANCE["float32"]:  # true for NaN
        raise RuntimeError(
            f"the merged weights do not compute what the adapter does: {difference:.1e} of the logits' size"
        )
    return merged  # type: ignore[no-any-return]


def write_model(model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, adapter: Path, folder: Path) -> None:
    """Writes a merged model with its tokenizer and the generation config of its adapter."""
    restore_generation_config(model, adapter)
    model.config.use_cache = True
    model.save_pretrained(str(folder))
    tokenizer.save_pretrained(str(folder))


def _verify(
    folder: Path, adapter: _Adapter, ids: torch.Tensor, expected: torch.Tensor, dtype: str
) -> tuple[float, float | None]:
    """Reads the model written to `folder`; checks and returns its `error` and `quantized_error` (`MergeReport`)."""
    from transformers import AutoModelForCausalLM

    trust = adapter.trust_remote_code
    result = _logits(AutoModelForCausalLM.from_pretrained(str(folder), dtype="auto", trust_remote_code=trust), ids)
    error = relative_difference(result, expected)
    _require_within(error, TOLERANCE[dtype], f"adapter and base, in {dtype}")
    if not adapter.facts.get("quantization_config"):
        return error, None
    quantized_error = relative_difference(result, adapter.quantized_logits(ids))
    _require_within(quantized_error, max(adapter.quantized_tolerance(), TOLERANCE[dtype]), "the quantized model")
    return error, quantized_error


def _require_within(error: float, tolerance: float, what: str) -> None:
    if not error <= tolerance:  # true for NaN
        raise RuntimeError(
            f"the merged model as written differs from {what} by {error:.1e} of the logits' size, more than the "
            f"{tolerance:.0e} that rounding explains; nothing was kept"
        )


def _warn_of_little_effect(effect: float, error: float, dtype: str) -> None:
    """Warns if rounding changes the model about as much as training did, or training changed nothing."""
    if effect == 0.0:
        logger.warning("The adapter changes nothing (its B matrices are zero): the merged model is the base")
    elif error > effect / 2:
        logger.warning(
            "Rounding to %s changes the model by %.1e, and training changed it by %.1e: float32 keeps all of it",
            *(dtype, error, effect),
        )


def merge(
    model_dir: str | Path, output_dir: str | Path, dtype: str | None = None, *, trust_remote_code: bool = False
) -> MergeReport:
    """Merges the adapter in `model_dir` into its base and writes a whole, verified model to `output_dir`.

    The files are written beside `output_dir`, read back, compared with base and adapter on probe tokens, and only then
    moved there: a folder of that name always holds a model that was verified.

    Args:
        dtype: of the weights written; None is the dtype of the base in training.

    Raises:
        UserError: no adapter, a base that is gone, an `output_dir` that is not empty, or no such dtype.
        RuntimeError: the merged model does not compute what the adapter computes.
    """
    import torch

    started = time.monotonic()
    folder, target = Path(model_dir).expanduser(), Path(output_dir).expanduser()
    _check_request(folder, target, dtype)
    reference, facts = find_base(folder)
    tokenizer = load_saved_tokenizer(folder, trust_remote_code)
    facts.setdefault("embedding_rows", len(tokenizer))
    ids = _probe_tokens(len(tokenizer))
    adapter = _Adapter(folder, reference, facts, trust_remote_code)
    adapted: Any = adapter.load_unquantized()
    dtype = dtype or str(facts.get("dtype") or adapted.config.dtype).removeprefix("torch.")
    expected = _logits(adapted, ids)
    with adapted.disable_adapter():
        effect = relative_difference(expected, _logits(adapted, ids))
    merged = _merge_weights(adapted, ids, expected).to(getattr(torch, dtype))
    parameters = merged.num_parameters()

    unchecked = target.parent / f".{target.name}.unchecked"
    shutil.rmtree(unchecked, ignore_errors=True)
    try:
        write_model(merged, tokenizer, folder, unchecked)
        del merged, adapted
        error, quantized_error = _verify(unchecked, adapter, ids, expected, dtype)
        if target.exists():
            target.rmdir()
        unchecked.rename(target)
    finally:
        shutil.rmtree(unchecked, ignore_errors=True)
    _warn_of_little_effect(effect, error, dtype)
    report = MergeReport(
        base=reference,
        adapter=str(folder),
        dtype=dtype,
        parameters=parameters,
        error=error,
        quantized_error=quantized_error,
        effect=effect,
        seconds=time.monotonic() - started,
    )
    logger.info("%s", report)
    return report
