"""The training stage: a `Trainer` whose loss and metrics are exact over tokens, steps, accumulation and ranks.

`SFTTrainer` shows every overridden hook of upstream's Trainer, in the order in which upstream calls them. The work of a
hook is done by a collaborator from `sft/training/`.
"""

from __future__ import annotations

import functools
import logging
import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from torch import nn
from torch.utils.data import DataLoader, Sampler, SequentialSampler
from transformers import PreTrainedTokenizerBase, Trainer, TrainerCallback, TrainerState, TrainingArguments
from transformers.trainer_callback import PrinterCallback, ProgressCallback
from transformers.trainer_utils import EvalLoopOutput

from sft.checkpoint.discovery import require_best
from sft.checkpoint.stream_state import StreamProgress
from sft.config.best_metric import METRIC_SCHEDULES
from sft.data.loading.collator import Collator
from sft.data.loading.document_offsets import DocumentOffsets
from sft.data.streaming.stream import STEP, TrainingStream
from sft.distributed.collectives import barrier, group_size
from sft.loss.forward import TokenForward
from sft.loss.token_loss import TokenLoss
from sft.model.attention.document_attention import takes_documents
from sft.model.attention.isolation_check import require_isolation
from sft.model.compile import compile_layers
from sft.training.arguments import StepSettings
from sft.training.callbacks import FollowConfig, FollowEpoch
from sft.training.checkpoint_files import CheckpointFiles
from sft.training.evaluation import Evaluation, named_metrics
from sft.training.mfu import flops_per_token
from sft.training.nonfinite import require_finite
from sft.training.optim.resumed_settings import ConfiguredOptimizer, require_schedule_of
from sft.training.run_log import RunLog, write_curve
from sft.training.step import OptimizerStep
from sft.training.training_rows import TrainingRows, is_packed

logger = logging.getLogger("sft")
Inputs = dict[str, Any]


class SFTTrainer(Trainer):
    """`transformers.Trainer` with this pipeline's loss, metrics, sampling and evaluation.

    Args:
        model, tokenizer: a causal LM, with an adapter or without, and what is saved with each checkpoint.
        train_dataset: rows of `input_ids` and `labels` (see `data_handler.PreparedData`), or a stream with `progress`.
        eval_datasets: evaluation sets by name; a single one is reported without its name.
        end_token_ids: the tokens that end an answer, for each checkpoint's generation config.
        callbacks: besides the Trainer's own, without its two printers.
        total_steps: optimizer steps of the whole run.
    """

    def __init__(
        self,
        model: nn.Module,
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
            eval_dataset=next(iter(eval_datasets.values())) if len(eval_datasets) == 1 else dict(eval_datasets) or None,
            callbacks=[FollowConfig(), *([progress] if progress else []), *callbacks],
        )
        self.remove_callback(PrinterCallback)
        self.remove_callback(ProgressCallback)
        # The loss is already divided by the tokens of the whole optimizer step; upstream only counts them.
        self.model_accepts_loss_kwargs = self.loss_is_scaled_for_ga = self._loss_shifts_labels = True
        self.neftune_noise_alpha = None  # upstream's hook stays off: OptimizerStep adds the noise
        if self.accelerator.num_processes != group_size():
            raise RuntimeError(f"{group_size()} ranks joined, but the Trainer sees {self.accelerator.num_processes}")
        if collator.flatten or any(map(is_packed, [train_dataset, *eval_datasets.values()])):
            require_isolation(model, collator)
        settings = settings or StepSettings()
        self._forward = TokenForward(model, settings.loss)
        if settings.compiling:
            compile_layers(model, settings.compiling, evaluates=bool(eval_datasets))
        self._total_steps, self._flops_per_token = total_steps, flops_per_token(self._forward.causal_lm)
        self.progress, self._rows = progress, TrainingRows(train_dataset, args, progress)
        self._step = OptimizerStep(model, args, settings, total_steps, tokenizer.decode, self._measure_unwrapped)
        self._run_log = RunLog(args, self._flops_per_token)
        self._evaluation = Evaluation(list(eval_datasets), args)
        self._checkpoint = CheckpointFiles(model, tokenizer, args, self._rows, settings, end_token_ids)

    # Before the first step

    def resume(self, checkpoint: Path) -> None:
        """Loads our part of a checkpoint; `train` loads upstream's. Raises `UserError` if it is of another run."""
        require_schedule_of(checkpoint, by_steps=self.args.lr_scheduler_type not in METRIC_SCHEDULES)
        counts, skipped = self._checkpoint.load(checkpoint)
        self._run_log.resume(counts)
        self._step.monitor.resume(skipped)

    def load_finished(self, checkpoint: Path) -> bool:
        """Whether a checkpoint is of the last step already; then its model is loaded, or the best one's."""
        state = TrainerState.load_from_json(str(checkpoint / "trainer_state.json"))
        if state.global_step < self._total_steps:
            return False
        logger.info("%s is at step %d: nothing is left to train", checkpoint, state.global_step)
        best = state.best_model_checkpoint if self.args.load_best_model_at_end else None
        self._load_from_checkpoint(str(require_best(Path(best)) if best else checkpoint))
        self.state = state
        return True

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """Trains; then checks the last step and the final weights, and counts the steps since the last log."""
        self._run_log.start()
        output = super().train(*args, **kwargs)
        self._step.check_previous(self.state)
        self._count_tokens()
        require_finite(self.model, "the final model")
        return output

    def _issue_warnings_after_load(self, load_result: Any) -> None:
        """Does not warn of tied weights, which are in the file once, under one of their names."""
        tied = getattr(self.model, "all_tied_weights_keys", {})
        load_result.missing_keys[:] = [name for name in load_result.missing_keys if name not in tied]
        super()._issue_warnings_after_load(load_result)

    def get_train_dataloader(self) -> DataLoader:
        """Loads batches of this rank; each real row is seen once an epoch, on one rank."""
        if self.progress:
            return self._rows.stream_loader(self.data_collator, self._train_batch_size)
        self.train_dataset: Any = self._rows.padded_with_fillers(self._train_batch_size)
        return super().get_train_dataloader()

    def _get_train_sampler(self, train_dataset: Any = None) -> Sampler | None:
        sampler = self._rows.sampler(train_dataset or self.train_dataset, self._train_batch_size)
        if sampler is None:
            return super()._get_train_sampler(train_dataset)
        self.remove_callback(FollowEpoch)
        self.add_callback(FollowEpoch(sampler))
        return sampler

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """Makes upstream's optimizer, over float32 values of bfloat16 weights where the run keeps them."""
        if self.optimizer is None:
            self.optimizer = self._step.wrap_optimizer(super().create_optimizer(model))
        return self.optimizer

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        """Loads their states; their settings are the config's (`sft.training.optim.resumed_settings`)."""
        if checkpoint is not None:
            configured = ConfiguredOptimizer(self.optimizer)  # type: ignore[arg-type]
            super()._load_optimizer_and_scheduler(checkpoint)
            configured.restore(self.optimizer, self.lr_scheduler, Path(checkpoint).name)  # type: ignore[arg-type]

    # An optimizer step

    def get_batch_samples(self, epoch_iterator: Iterator, num_batches: int, device: torch.device) -> tuple[list, Any]:
        """Moves the batches of a stream to the device as they are taken, as accelerate does with others.

        Their supervised tokens are then counted there; to copy a count from main memory waits for queued work.
        """
        return super().get_batch_samples(map(self._prepare_inputs, epoch_iterator), num_batches, device)

    def _prepare_input(self, data: Any) -> Any:
        """Moves `data` to the device; upstream has no `DocumentOffsets`, and its copies wait for queued work."""
        if isinstance(data, DocumentOffsets) or (isinstance(data, torch.Tensor) and data.is_pinned()):
            return data.to(self.args.device, non_blocking=True)
        return super()._prepare_input(data)

    def training_step(self, model: nn.Module, inputs: Inputs, num_items_in_batch: Any = None) -> torch.Tensor:
        """Runs forward and backward of one micro-batch; notes how far a stream is then read."""
        if self.progress:
            self.progress.consume(inputs.pop(STEP))
        run = functools.partial(super().training_step, num_items_in_batch=num_items_in_batch)
        loss = self._step.run_micro_batch(model, inputs, self.accelerator.sync_gradients, run)
        # Upstream adds these up for a summary of its own; the monitor already knows which are not finite.
        return loss.nan_to_num(nan=0.0, posinf=0.0, neginf=0.0)

    def compute_loss(
        self, model: nn.Module, inputs: Inputs, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """Sums over the micro-batch's supervised tokens and divides by those of the whole optimizer step on all ranks.

        DDP averages gradients over the ranks, so the sum is multiplied by their number first:
        mean over ranks of (world_size · sum_r / N) = (sum of all sum_r) / N.
        """
        ranks = self.accelerator.num_processes if self.args.average_tokens_across_devices else 1
        scale = ranks / torch.as_tensor(num_items_in_batch, device=self.args.device).clamp(min=1)
        # float16 gradients must be scaled before they are rounded, or the smallest are 0 by then.
        scaler = self.accelerator.scaler
        gradient_scale = scale if scaler is None else scaler.scale(scale)
        monitor, step = self._step.monitor, self.state.global_step
        result = monitor.measure_micro_batch(inputs, step, lambda: self.measure(model, inputs, gradient_scale))
        loss = monitor.guard_loss(result.objective * scale, inputs)
        return (loss, {}) if return_outputs else loss

    def measure(self, model: nn.Module, inputs: Inputs, gradient_scale: torch.Tensor | None = None) -> TokenLoss:
        """Returns the sums of one batch on the device (see `sft.loss.forward`)."""
        return self._forward(model, inputs, gradient_scale)

    def floating_point_ops(self, inputs: dict[str, Any]) -> int:
        """Counts 6 FLOPs per weight and token, 4 for frozen weights, which get no gradient; attention not at all."""
        return self._flops_per_token * inputs["input_ids"].numel()

    def _clip_grad_norm(self, model: nn.Module) -> None:
        """Leaves clipping to `_get_grad_norm`, which comes next: gradients are checked before they are scaled."""

    def _get_grad_norm(self, model: nn.Module, grad_norm: Any = None) -> torch.Tensor:
        """Decides whether the step is made, and clips its gradients; returns their norm before clipping."""
        assert self.optimizer is not None
        self.accelerator.unscale_gradients()
        return self._step.check_and_clip(self.optimizer, self.state, scaled=self.accelerator.scaler is not None)

    # Logs, evaluations and checkpoints between two steps

    def _maybe_log_save_evaluate(self, *args: Any, **kwargs: Any) -> None:
        control = self.control
        if control.should_log or control.should_evaluate or control.should_save or control.should_training_stop:
            self._step.check_previous(self.state)
        super()._maybe_log_save_evaluate(*args, **kwargs)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Replaces upstream's mean of step means by the metrics over all tokens since the last log."""
        if "loss" in logs:
            self._count_tokens()
            logs |= self._run_log.metrics(self._step.monitor.skipped, self.state.num_input_tokens_seen)
            self._step.monitor.log_spikes()
        super().log(logs, start_time)

    def _count_tokens(self) -> None:
        """Reads the sums of the steps from the device into the next log and into the state that is saved."""
        counts = self._step.sums.reduce_and_reset()
        self._run_log.add(counts)
        if self.args.include_num_input_tokens_seen == "no":  # else upstream counts them itself
            self.state.num_input_tokens_seen += counts.input_tokens

    def evaluate(
        self, eval_dataset: Any = None, ignore_keys: list[str] | None = None, metric_key_prefix: str = "eval"
    ) -> dict[str, float]:
        """Returns metrics weighted by tokens: of each set by its name and, where there are several, of all together."""
        eval_dataset = self.eval_dataset if eval_dataset is None else eval_dataset
        self._evaluation.begin()
        with self._run_log.paused():
            if isinstance(eval_dataset, dict):
                metrics: dict[str, float] = {}
                for name, dataset in eval_dataset.items():
                    metrics |= super().evaluate(dataset, ignore_keys, f"{metric_key_prefix}_{name}")
                together = self._evaluation.together(metric_key_prefix)
                self.log(dict(together))
                metrics |= together
            else:
                metrics = super().evaluate(eval_dataset, ignore_keys, metric_key_prefix)
        self._evaluation.end(self.state.global_step, metrics)
        return metrics

    def get_eval_dataloader(self, eval_dataset: Any = None) -> DataLoader:
        """Loads batches of this rank, every row on exactly one rank."""
        # Upstream keeps one loader with persistent workers for all sets under a single name.
        getattr(self, "_eval_dataloaders", {}).clear()
        rows = self.eval_dataset if eval_dataset is None else eval_dataset
        return super().get_eval_dataloader(self._evaluation.even_rows(rows))

    def _get_eval_sampler(self, eval_dataset: Any) -> Sampler:
        return SequentialSampler(eval_dataset)

    def evaluation_loop(  # type: ignore[override]
        self, dataloader: DataLoader, *args: Any, metric_key_prefix: str = "eval", **kwargs: Any
    ) -> EvalLoopOutput:
        """Adds up the sums of all batches and ranks."""
        self.callback_handler.eval_dataloader = dataloader

        def measure(batch: Any) -> tuple[TokenLoss, torch.Tensor]:
            inputs = self._prepare_inputs(batch)
            loss = self._measure_unwrapped(inputs)
            self.control = self.callback_handler.on_prediction_step(self.args, self.state, self.control)
            return loss, inputs["lengths"].sum()

        when = f" after step {self.state.global_step}" if self.is_in_train else ""
        counts = self._evaluation.sum_batches(self.model, dataloader, measure, f"the evaluation{when}")
        rows: Any = dataloader.dataset
        return EvalLoopOutput(None, None, named_metrics(counts, metric_key_prefix), len(rows.rows))  # type: ignore[arg-type]

    def _measure_unwrapped(self, inputs: Inputs) -> TokenLoss:
        """Returns the sums of one batch in the mode that the model is in, on this rank alone."""
        with self.accelerator.autocast():
            return self.measure(self.model, inputs)  # type: ignore[arg-type]

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        with self._run_log.paused():
            require_finite(self.model, f"checkpoint-{self.state.global_step}")
            self._count_tokens()  # a resumed run then continues num_tokens from the right number
            self._checkpoint.gather_stream()
            super()._save_checkpoint(model, trial)
            self._checkpoint.report_stream(writes=self.is_world_process_zero())

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        """Adds this pipeline's files to the checkpoint."""
        super()._save(output_dir, state_dict)
        if self.args.should_save:
            folder = Path(output_dir or str(self.args.output_dir))
            self._checkpoint.save(folder, self._run_log.counts, self._step.monitor.skipped)

    def _save_rng_state(self, output_dir: str) -> None:
        """Waits until every rank has written its part of the checkpoint: only then may an older one be deleted."""
        super()._save_rng_state(output_dir)
        barrier()

    # After the last step, or a failed one

    def evaluate_all(self) -> dict[str, Any]:
        """Returns SPEC's result of `evaluate`; evaluates unless the last step was evaluated already."""
        if self.eval_dataset is not None and not self._evaluation.is_current(self.state.global_step):
            self.evaluate()
        return self._evaluation.results()

    def log_remaining(self) -> None:
        """Logs the steps since the last log and writes the curve. All ranks must call it."""
        if self.state.global_step > self._globalstep_last_logged:
            self.log({"loss": math.nan})
        self.write_curve()

    def write_curve(self) -> None:
        """Writes the curve up to the last log; a rank that stops alone may call it."""
        write_curve(self.state, self.args)
        self.callback_handler.on_train_end(self.args, self.state, self.control)  # trackers write what they hold
