"""The training stage: a `Trainer` whose loss and metrics are exact over tokens, steps, accumulation and ranks."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
import torch.distributed as dist
from datasets import Dataset
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader
from transformers import PreTrainedTokenizerBase, TrainerCallback, TrainerState, TrainingArguments, set_seed
from transformers.trainer_callback import PrinterCallback, ProgressCallback

from sft import artifacts, run_shape, stream_state
from sft.callbacks import ConsoleProgress, FollowConfig
from sft.collation import PACKED, Collator, row_lengths
from sft.compilation import CompileSettings, compile_layers
from sft.document_attention import takes_documents
from sft.errors import TrainingStopped
from sft.flops import operations_a_token, peak_of
from sft.gradient_reduction import GradientReducer
from sft.gradients import clip_factor, clip_gradients, gradient_norms, total_norm
from sft.isolation import require_isolation
from sft.losses import Objective, TokenLoss
from sft.master_weights import MasterWeights
from sft.memory import peak_memory_gb
from sft.metrics import TokenCounts, TokenSums
from sft.nonfinite import require_finite
from sft.optimizers import skipping, with_master_weights
from sft.out_of_memory import ShrinkingPasses, first_line, is_out_of_memory, out_of_memory
from sft.pass_halves import halves
from sft.row_order import RowOrder
from sft.run_shape import RunShape, describe_adapter, digest_lengths
from sft.split_masters import summed_in_a_pass
from sft.step_watch import StepWatch
from sft.stream_state import StreamProgress
from sft.streaming import STEP, TrainingStream
from sft.token_evaluation import TokenEvaluation
from sft.token_forward import TokenForward
from sft.trained_models import save_companions
from sft.trainer_arguments import training_arguments

logger = logging.getLogger("sft")

__all__ = ["SFTTrainer", "set_seed", "training_arguments"]


@dataclass(frozen=True, slots=True)
class StepSettings:
    """How an optimizer step is made.

    Attributes:
        objective: what is minimised; evaluation measures the plain cross entropy.
        loss_chunk_size: trained tokens whose logits are held at a time; None is chosen for the machine.
        master_weights: whether the optimizer keeps float32 values of bfloat16 weights.
        on_nonfinite, nonfinite_limit: see `sft.nonfinite.NonfiniteGuard`.
        from_scratch: whether the model's weights are random on purpose.
        compiling: how the decoder layers are compiled; None is not at all.
        shrinks: whether a step that runs out of memory is made again in smaller passes, by the rank that ran out of
            it; the ranks then add up their gradients behind the last pass of a step and not during it.
    """

    objective: Objective = field(default_factory=Objective)
    loss_chunk_size: int | None = None
    master_weights: bool = False
    on_nonfinite: Literal["stop", "skip"] = "stop"
    nonfinite_limit: int = 10
    from_scratch: bool = False
    compiling: CompileSettings | None = None
    shrinks: bool = False


class SFTTrainer(RowOrder, TokenEvaluation):
    """`transformers.Trainer` with this pipeline's loss, metrics, sampling and evaluation.

    Args:
        model: a causal LM, wrapped with an adapter or not.
        args: the training arguments.
        tokenizer: saved with each checkpoint.
        train_dataset: rows of `input_ids` and `labels` (see `data_handler.PreparedData`), or a `TrainingStream`.
        eval_datasets: evaluation sets by name; a single one is reported without its name.
        end_token_ids: the tokens that end an answer, for each checkpoint's generation config.
        callbacks: besides the Trainer's own; its two printers are left out.
        total_steps: optimizer steps of the whole run.
        progress: of the stream, where `train_dataset` is one.
        settings: how a step is made.
    """

    def __init__(
        self,
        model: torch.nn.Module,
        args: TrainingArguments,
        tokenizer: PreTrainedTokenizerBase,
        train_dataset: Dataset | TrainingStream | None,
        eval_datasets: Mapping[str, Dataset],
        end_token_ids: Sequence[int],
        callbacks: Sequence[TrainerCallback] = (),
        total_steps: int = 0,
        progress: StreamProgress | None = None,
        settings: StepSettings | None = None,
    ) -> None:
        collator = Collator(int(tokenizer.pad_token_id), flatten=takes_documents(model.config))
        super().__init__(
            model=model,
            args=args,
            data_collator=collator,
            processing_class=tokenizer,
            train_dataset=train_dataset,
            eval_dataset=self._as_eval_dataset(eval_datasets),
            callbacks=[FollowConfig(), *([progress] if progress else []), *callbacks],
        )
        self.remove_callback(PrinterCallback)
        self.remove_callback(ProgressCallback)
        # The loss below is already divided by the tokens of the whole optimizer step; the Trainer only counts them.
        self.model_accepts_loss_kwargs = True
        self.loss_is_scaled_for_ga = True
        self._loss_shifts_labels = True
        world_size = dist.get_world_size() if dist.is_initialized() else 1
        if self.accelerator.num_processes != world_size:
            raise RuntimeError(f"{world_size} processes were joined, the Trainer sees {self.accelerator.num_processes}")
        datasets = [d for d in (train_dataset, *eval_datasets.values()) if d is not None]
        is_packed = any(d.is_packed if isinstance(d, TrainingStream) else PACKED in d.column_names for d in datasets)
        if collator.flatten or is_packed:
            require_isolation(model, collator)
        self._settings = settings or StepSettings()
        self._masters: MasterWeights | None = None
        self._forward = TokenForward(model, self._settings.objective, self._settings.loss_chunk_size)
        if self._settings.compiling:
            compile_layers(model, self._settings.compiling, evaluates=bool(eval_datasets))
        self.train_rows: Any = train_dataset
        self.progress = progress
        self._total_steps = total_steps
        self._end_token_ids = end_token_ids
        self.eval_names = list(eval_datasets)
        self._operations_a_token = operations_a_token(self._forward.causal_lm)
        self._shrinking: ShrinkingPasses | None = None
        self._reducer: GradientReducer | None = None
        self._peak_operations = peak_of(args.device)
        self._sums = TokenSums(args.device)
        self._counts = TokenCounts.zero()
        self._clock = time.perf_counter()
        self._settled_at: tuple[int, float] = (0, 0.0)  # steps and epochs before the step asked for last
        noise_alpha, self.neftune_noise_alpha = args.neftune_noise_alpha or 0.0, None  # upstream's hook stays off
        self._watch = StepWatch(
            model,
            args.device,
            tokenizer.decode,
            self._measure_evaluating,
            on_nonfinite=self._settings.on_nonfinite,
            nonfinite_limit=self._settings.nonfinite_limit,
            from_scratch=self._settings.from_scratch,
            noise_alpha=noise_alpha if train_dataset else 0.0,
            seed=args.seed,
            rank=args.process_index,
        )
        if self._settings.shrinks:
            self._shrinking = ShrinkingPasses(halves, model.zero_grad, self._watch.counts, self._watch.put_back)
            if args.world_size > 1:
                self._reducer = GradientReducer([p for p in model.parameters() if p.requires_grad])

    @staticmethod
    def _as_eval_dataset(eval_datasets: Mapping[str, Dataset]) -> Dataset | dict[str, Dataset] | None:
        if len(eval_datasets) == 1:
            return next(iter(eval_datasets.values()))
        return dict(eval_datasets) or None

    # The step

    def compute_loss(
        self,
        model: torch.nn.Module,
        inputs: dict[str, torch.Tensor],
        return_outputs: bool = False,
        num_items_in_batch: torch.Tensor | int | None = None,
    ) -> Any:
        """Sum over the batch's trained tokens, divided by those of the whole optimizer step on all ranks.

        DDP averages gradients over the ranks, so the sum is multiplied by their number first:
        mean over ranks of (world_size · sum_r / N) = (sum of all sum_r) / N.
        """
        count = torch.as_tensor(num_items_in_batch, device=self.args.device).clamp(min=1)
        ranks = self.accelerator.num_processes if self.args.average_tokens_across_devices else 1
        scale = ranks / count
        result = self._watch.measure_pass(
            inputs, self.state.global_step, lambda: self.measure(model, inputs, gradient_scale=scale)
        )
        loss = self._watch.guard_loss(result.objective * scale, inputs)
        return (loss, {}) if return_outputs else loss

    def measure(
        self, model: torch.nn.Module, inputs: dict[str, Any], gradient_scale: torch.Tensor | None = None
    ) -> TokenLoss:
        """The sums of one batch on the device (see `sft.token_forward`)."""
        return self._forward(model, inputs, gradient_scale)

    def training_step(
        self,
        model: torch.nn.Module,
        inputs: dict[str, Any],
        num_items_in_batch: torch.Tensor | int | None = None,
    ) -> torch.Tensor:
        """Notes where a stream stands behind the batch, then trains on it."""
        if self.progress:
            self.progress.consume(inputs.pop(STEP))
        masters, is_last = self._masters, self.accelerator.sync_gradients
        make = super().training_step
        if self._shrinking is None:
            with masters.reducing(model, is_last) if masters else nullcontext():
                loss = make(model, inputs, num_items_in_batch)
        else:
            # Not through DDP: a pass that talks to other ranks could not be made again by one of them.
            alone = model.module if isinstance(model, DistributedDataParallel) else model
            loss = self._shrinking.run(inputs, lambda piece: make(alone, piece, num_items_in_batch))
            if self._reducer and is_last:
                self._reducer.begin(None)
                self._reducer.finish()
        # The Trainer adds these up for a summary of its own; of those that are not finite the guard knows already.
        return loss.nan_to_num(nan=0.0, posinf=0.0, neginf=0.0)

    def create_optimizer(self, model: torch.nn.Module | None = None) -> torch.optim.Optimizer:
        """The Trainer's optimizer, over float32 values of bfloat16 weights where the run keeps them."""
        if self.optimizer is None:
            super().create_optimizer(model)
            if self._settings.master_weights:
                assert self.optimizer is not None
                self.optimizer = self._masters = with_master_weights(self.optimizer, self._summed())
        return self.optimizer  # type: ignore[return-value]

    def _summed(self) -> list[torch.nn.Parameter] | None:
        """Of a step that is one pass, the weights whose gradients are sums all the same; None for other steps."""
        if self.args.gradient_accumulation_steps > 1 or self.args.world_size > 1 or self._shrinking:
            return None
        return summed_in_a_pass(self.model)

    @torch.no_grad()
    def _measure_evaluating(self, inputs: dict[str, Any]) -> TokenLoss:
        """The sums of one batch in evaluation mode, on this rank alone."""
        model: Any = self.model
        was_training = model.training
        model.eval()
        try:
            with self.accelerator.autocast():
                return self.measure(model, inputs)
        finally:
            model.train(was_training)

    def _clip_grad_norm(self, model: torch.nn.Module) -> None:
        """Waits for `_get_grad_norm`, which comes next: gradients are judged before they are scaled."""

    def _get_grad_norm(self, model: torch.nn.Module, grad_norm: Any = None) -> torch.Tensor:
        """Judges the step, then clips its gradients; their norm is the step's before clipping.

        What the passes of a step add up to counts only once the step is made. Where the optimizer can leave a step
        out itself nothing is read from the device here but how the step before this one went, which is known by now.
        """
        if self._shrinking:
            self._shrinking.begin()  # the passes of this step are made, the next one is another step's
        self._settle()
        self._settled_at = self.state.global_step, self.state.epoch
        is_scaled = self.accelerator.scaler is not None
        self.accelerator.unscale_gradients()
        assert isinstance(self.model, torch.nn.Module)
        assert self.optimizer is not None
        norms = gradient_norms(self.model.named_parameters())
        norm = total_norm(norms.values())
        if self._watch.may_step(
            norm,
            norms,
            made=self.state.global_step,
            left=self._total_steps - self.state.global_step,
            rates=[group["lr"] for group in self.optimizer.param_groups],
            skipping=None if is_scaled else skipping(self.optimizer),
            scaled=is_scaled,
        ):
            self._sums.absorb(self._watch.sums)
            if self.args.max_grad_norm > 0:
                if self._masters:
                    self._masters.scale_gradients(clip_factor(self.args.max_grad_norm, norm))
                else:
                    clip_gradients(model.parameters(), self.args.max_grad_norm, norm)
        else:
            model.zero_grad()  # so that the optimizer moves nothing
        return norm

    def _settle(self) -> None:
        """Hears how the step made last went, before anything is built on it; every rank must call it.

        Raises:
            TrainingStopped: it was not made, and the run ends at the step before it.
        """
        try:
            self._watch.settle()
        except TrainingStopped:
            self.state.global_step, self.state.epoch = self._settled_at
            raise

    def _maybe_log_save_evaluate(self, *args: Any, **kwargs: Any) -> None:
        control = self.control
        if control.should_log or control.should_evaluate or control.should_save or control.should_training_stop:
            self._settle()
        super()._maybe_log_save_evaluate(*args, **kwargs)

    def fit(self, checkpoint: Path | None) -> None:
        """Trains, from `checkpoint` or from the start, and takes the progress bars down whatever happens."""
        if checkpoint:
            self._counts = run_shape.load(checkpoint, self._shape())
            if self.progress:
                self.progress.load(checkpoint)
            state = TrainerState.load_from_json(str(checkpoint / "trainer_state.json"))
            self._watch.skipped = next((e["skipped_steps"] for e in state.log_history[::-1] if "skipped_steps" in e), 0)
            if state.global_step >= self._total_steps:
                logger.info("%s is at step %d: nothing is left to train", checkpoint, state.global_step)
                self._load_from_checkpoint(str(checkpoint))
                self.state = state
                return
        self._clock = time.perf_counter()
        try:
            self.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
            self._settle()
            require_finite(self.model.named_parameters(), "the final model")  # type: ignore[union-attr]
        except TrainingStopped:
            self._leave_logs()
            raise
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            raise out_of_memory(f"step {self.state.global_step + 1} ran out of memory: {first_line(error)}") from error
        finally:
            for callback in self.callback_handler.callbacks:
                if isinstance(callback, ConsoleProgress):
                    callback.close()

    def _leave_logs(self) -> None:
        """Logs the steps since the last log, and leaves the curve up to here; every rank must call it."""
        if self.state.global_step > self._globalstep_last_logged:
            self.log({"loss": math.nan})
        if self.is_world_process_zero():
            self.state.save_to_json(str(Path(str(self.args.output_dir)) / "trainer_state.json"))
        self.callback_handler.on_train_end(self.args, self.state, self.control)  # trackers write what they hold

    def _shape(self) -> RunShape:
        data: dict[str, Any] = {"train_rows": 0, "row_lengths": ""}
        if self.progress:
            data |= self.progress.stream.identity()
        else:
            data = {"train_rows": len(self.train_rows), "row_lengths": digest_lengths(row_lengths(self.train_rows))}
        return RunShape(
            world_size=self.args.world_size,
            per_device_train_batch_size=self.args.per_device_train_batch_size,
            gradient_accumulation_steps=self.args.gradient_accumulation_steps,
            seed=self.order_seed,
            adapter=describe_adapter(self.model),
            train_sampling_strategy=self.args.train_sampling_strategy,
            master_weights=self._settings.master_weights,
            **data,
        )

    def get_train_dataloader(self) -> DataLoader:
        """The rows in their order, and nothing counted yet."""
        # Called again for a smaller batch (auto_find_batch_size), after an attempt whose sums count for nothing.
        self._sums.clear()
        self._watch.forget()
        if self._shrinking:
            self._shrinking.begin()
        return super().get_train_dataloader()

    # Logging

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Replaces the Trainer's mean of step means by the metrics over all tokens since the last log."""
        if "loss" in logs:
            self._count_tokens()
            counts, self._counts = self._counts, TokenCounts.zero()
            seconds = time.perf_counter() - self._clock - self.seconds_evaluating
            self._clock, self.seconds_evaluating = time.perf_counter(), 0.0
            logs |= counts.metrics() or {"loss": math.nan}  # each step was left out
            if self._watch.skipped:
                logs["skipped_steps"] = self._watch.skipped
            for spike in self._watch.spikes():
                logger.warning("%s", spike)
            logs["num_tokens"] = self.state.num_input_tokens_seen
            logs["tokens_per_second"] = counts.input_tokens / seconds
            if self._peak_operations:
                operations = logs["tokens_per_second"] * self._operations_a_token / self.args.world_size
                logs["mfu"] = operations / self._peak_operations
            logs["memory_gb"] = peak_memory_gb(self.args.device)
        super().log(logs, start_time)

    def _count_tokens(self) -> None:
        """Reads the sums from the device into the counts since the last log and into the state that is saved."""
        counts = self._sums.take()
        self._counts += counts
        if self.args.include_num_input_tokens_seen == "no":  # else the Trainer counts them itself
            self.state.num_input_tokens_seen += counts.input_tokens

    def floating_point_ops(self, inputs: dict[str, Any]) -> int:
        """6 a weight and token; 2 less a frozen weight, whose gradient is not made. Attention is not counted."""
        return self._operations_a_token * inputs["input_ids"].numel()

    def _save_checkpoint(self, model: torch.nn.Module, trial: Any) -> None:
        started = time.perf_counter()
        named = self.model.named_parameters()  # type: ignore[union-attr]
        require_finite(named, f"checkpoint-{self.state.global_step}")
        self._count_tokens()  # so that num_tokens goes on from the right number after a resume
        streamed = self.progress.gather() if self.progress else None
        if streamed:
            self._end_token_ids = streamed["end_token_ids"]
        super()._save_checkpoint(model, trial)
        if self.is_world_process_zero():
            folder = Path(self._get_output_dir(trial)) / f"checkpoint-{self.state.global_step}"
            run_shape.save(folder, self._shape(), self._counts)
            if self.progress and streamed:
                stream_state.save(folder, streamed)
                artifacts.write_ledger(Path(str(self.args.output_dir)), self.progress.document(streamed))
        if self.progress and streamed:
            self.progress.judge(stream_state.account_in(streamed))
        self._clock += time.perf_counter() - started

    def stream_account(self) -> tuple[dict[str, Any], tuple[int, ...]]:
        """SPEC's LEDGER of the rows that were streamed to all ranks, which all must call it; and their end tokens."""
        assert self.progress is not None
        streamed = self.progress.gather()
        return self.progress.document(streamed), tuple(streamed["end_token_ids"])

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        super()._save(output_dir, state_dict)
        model: Any = self.model
        tokenizer: Any = self.processing_class
        save_companions(model, tokenizer, output_dir or str(self.args.output_dir), self._end_token_ids)
