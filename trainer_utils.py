"""The training stage: a `Trainer` whose loss and metrics are exact over tokens, steps, accumulation and ranks."""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from datasets import Dataset
from transformers import PreTrainedTokenizerBase, TrainerCallback, TrainerState, TrainingArguments, set_seed
from transformers.trainer_callback import PrinterCallback, ProgressCallback

from sft.checkpoint.discovery import require_best
from sft.checkpoint.stream_state import StreamProgress
from sft.config.best_metric import WATCHING
from sft.data.loading.collator import PACKED, Collator
from sft.data.streaming.stream import TrainingStream
from sft.distributed.oom import allocator_message, is_out_of_memory, out_of_memory
from sft.errors import RankStopped, TrainingStopped
from sft.loss.forward import TokenForward
from sft.loss.token_loss import TokenLoss
from sft.model.attention.document_attention import takes_documents
from sft.model.attention.isolation_check import require_isolation
from sft.model.compile import compile_layers
from sft.report.progress import ConsoleProgress
from sft.training.arguments import training_arguments
from sft.training.callbacks import FollowConfig
from sft.training.evaluation import TokenEvaluation
from sft.training.mfu import flops_per_token
from sft.training.nonfinite import require_finite
from sft.training.optim.resume import require_schedule_of
from sft.training.run_log import RunRecords
from sft.training.step import GuardedStep, StepSettings

logger = logging.getLogger("sft")

__all__ = ["SFTTrainer", "StepSettings", "set_seed", "training_arguments"]


class SFTTrainer(GuardedStep, RunRecords, TokenEvaluation):
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
        settings = settings or StepSettings()
        self._forward = TokenForward(model, settings.objective, settings.loss_chunk_size)
        if settings.compiling:
            compile_layers(model, settings.compiling, evaluates=bool(eval_datasets))
        self.train_rows: Any = train_dataset
        self.progress = progress
        self.eval_names = list(eval_datasets)
        noise_alpha, self.neftune_noise_alpha = args.neftune_noise_alpha or 0.0, None  # upstream's hook stays off
        noise_alpha = noise_alpha if train_dataset else 0.0
        self._guard_steps(model, settings, total_steps, noise_alpha, self._measure_evaluating)
        self._keep_records(end_token_ids, flops_per_token(self._forward.causal_lm))

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
        # What float16 gradients are multiplied by they must be before they are rounded, or the smallest are 0 by then.
        scaler = self.accelerator.scaler
        gradient_scale = scale if scaler is None else scaler.scale(scale)
        result = self._watch.measure_pass(
            inputs, self.state.global_step, lambda: self.measure(model, inputs, gradient_scale)
        )
        loss = self._watch.guard_loss(result.objective * scale, inputs)
        return (loss, {}) if return_outputs else loss

    def measure(
        self, model: torch.nn.Module, inputs: dict[str, Any], gradient_scale: torch.Tensor | None = None
    ) -> TokenLoss:
        """The sums of one batch on the device (see `sft.loss.forward`)."""
        return self._forward(model, inputs, gradient_scale)

    def go_on_from(self, checkpoint: Path) -> None:
        """Takes over what a checkpoint holds of ours, before `fit` takes over the rest.

        Raises:
            UserError: it is of another run, or its state of a stream is damaged.
        """
        require_schedule_of(checkpoint, by_steps=self.args.lr_scheduler_type not in WATCHING)
        self._restore_counts(checkpoint)
        if self.progress:
            self.progress.load(checkpoint)

    def fit(self, checkpoint: Path | None) -> None:
        """Trains, from `checkpoint` or from the start, and takes the progress bars down whatever happens."""
        if checkpoint:
            state = TrainerState.load_from_json(str(checkpoint / "trainer_state.json"))
            if state.global_step >= self._total_steps:
                logger.info("%s is at step %d: nothing is left to train", checkpoint, state.global_step)
                best = state.best_model_checkpoint if self.args.load_best_model_at_end else None
                self._load_from_checkpoint(str(require_best(Path(best)) if best else checkpoint))
                self.state = state
                return
        self._clock = time.perf_counter()
        try:
            self.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
            self._settle()
            self._count_tokens()  # of steps that no log and no checkpoint has counted
            require_finite(self.model.named_parameters(), "the final model")  # type: ignore[union-attr]
        except RankStopped:
            self._leave_curve()
            raise
        except TrainingStopped:
            self._leave_logs()
            raise
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            self._leave_curve()
            rows = 1 if self._shrinking else self.args.per_device_train_batch_size
            message = f"step {self.state.global_step + 1} ran out of memory: {allocator_message(error)}"
            raise out_of_memory(message, rows) from error
        finally:
            for callback in self.callback_handler.callbacks:
                if isinstance(callback, ConsoleProgress):
                    callback.close()
