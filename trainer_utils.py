"""The training stage: a `Trainer` whose loss and metrics are exact over tokens, steps, accumulation and ranks."""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from datasets import Dataset
from torch.utils.data import DataLoader, Sampler, SequentialSampler
from transformers import PreTrainedTokenizerBase, Trainer, TrainerCallback, TrainerState, TrainingArguments, set_seed
from transformers.trainer_callback import PrinterCallback, ProgressCallback
from transformers.trainer_utils import EvalLoopOutput

from sft import artifacts, run_shape, stream_state
from sft.batch_plan import BatchPlan
from sft.callbacks import ConsoleProgress, FollowConfig, FollowEpoch
from sft.collation import PACKED, Collator, EvenRows, row_lengths
from sft.isolation import require_isolation
from sft.losses import TokenLoss, token_loss
from sft.memory import peak_memory_gb
from sft.metrics import TokenCounts, TokenSums
from sft.run_shape import RunShape, describe_adapter, digest_lengths
from sft.sampling import EpochSampler
from sft.stream_loader import StreamLoader
from sft.stream_state import StreamProgress
from sft.streaming import STEP, TrainingStream
from sft.trained_models import save_companions

logger = logging.getLogger("sft")

_NOT_FOR_THE_MODEL = ("labels", "lengths", PACKED)

__all__ = ["SFTTrainer", "set_seed", "training_arguments"]


def training_arguments(
    given: Mapping[str, Any],
    *,
    bf16: bool,
    fp16: bool,
    plan: BatchPlan | None,
    logging_dir: str | None = None,
    wandb_project: str | None = None,
) -> TrainingArguments:
    """The Trainer's arguments: what the user gave, completed by what this pipeline knows better.

    Args:
        given: `Config.training_arguments()`.
        bf16, fp16: the autocast that was chosen for the machine.
        plan: the run's arithmetic; None where nothing is trained.
        logging_dir: of the TensorBoard files; None is `logs/tensorboard` in the output folder.
        wandb_project: None leaves it to the environment.
    """
    arguments = dict(given)
    arguments |= {"bf16": bf16, "fp16": fp16}
    if plan is not None:
        arguments["gradient_accumulation_steps"] = plan.gradient_accumulation_steps
        if plan.train_rows is None:  # a stream begins behind the rows that were trained
            arguments["ignore_data_skip"] = True
    # The loss reaches every trainable parameter, so DDP need not search the graph for those it missed on each step.
    arguments.setdefault("ddp_find_unused_parameters", False)
    if arguments.get("activation_checkpointing"):
        arguments.setdefault("activation_checkpointing_kwargs", {"use_reentrant": False})
    if not torch.cuda.is_available():
        # Without use_cpu accelerate does not look for a process group: each rank would train alone on the same rows.
        arguments["use_cpu"] = True
        arguments.setdefault("dataloader_pin_memory", False)  # there is no device to copy to
    if not dist.is_initialized():
        arguments.pop("ddp_backend", None)  # for one process upstream would look for a group that nobody made
    # Upstream takes these two from the environment alone.
    if wandb_project:
        os.environ["WANDB_PROJECT"] = wandb_project
    os.environ["TENSORBOARD_LOGGING_DIR"] = logging_dir or str(Path(arguments["output_dir"]) / "logs" / "tensorboard")
    return TrainingArguments(**arguments)


class SFTTrainer(Trainer):
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
    ) -> None:
        collator = Collator(
            int(tokenizer.pad_token_id),
            pad_to_multiple_of=8 if args.device.type == "cuda" else 1,
            # Flash attention takes documents for packed only in a batch of one row.
            flatten="flash" in str(getattr(model.config, "_attn_implementation", "")),
        )
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
        if any(d.is_packed if isinstance(d, TrainingStream) else PACKED in d.column_names for d in datasets):
            require_isolation(model, collator)
        self._train_rows: Any = train_dataset
        self._progress = progress
        self._total_steps = total_steps
        self._end_token_ids = end_token_ids
        self._last_evaluation: tuple[int, dict[str, float]] = (-1, {})
        self._eval_names = list(eval_datasets)
        self._sums = TokenSums(args.device)
        self._counts = TokenCounts.zero()
        self._clock = time.perf_counter()

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
        outputs, result = self._forward(model, inputs)
        self._sums.add(result, inputs["lengths"].sum())
        denominator = torch.as_tensor(num_items_in_batch, device=result.objective.device).clamp(min=1)
        loss = result.objective / denominator
        if self.args.average_tokens_across_devices:
            loss = loss * self.accelerator.num_processes
        return (loss, outputs) if return_outputs else loss

    def training_step(
        self,
        model: torch.nn.Module,
        inputs: dict[str, Any],
        num_items_in_batch: torch.Tensor | int | None = None,
    ) -> torch.Tensor:
        """Notes where a stream stands behind the batch, then trains on it."""
        if self._progress:
            self._progress.consume(inputs.pop(STEP))
        return super().training_step(model, inputs, num_items_in_batch)

    def _forward(self, model: torch.nn.Module, inputs: dict[str, torch.Tensor]) -> tuple[Any, TokenLoss]:
        kept = {name: value for name, value in inputs.items() if name not in _NOT_FOR_THE_MODEL}
        # With a cache, attention would no longer be restricted by position_ids to one document of a packed row.
        outputs = model(**kept, use_cache=False)
        smoothing = self.args.label_smoothing_factor if model.training else 0.0
        return outputs, token_loss(outputs.logits, inputs["labels"], smoothing)

    def fit(self, checkpoint: Path | None) -> None:
        """Trains, from `checkpoint` or from the start, and takes the progress bars down whatever happens."""
        if checkpoint:
            self._counts = run_shape.load(checkpoint, self._shape())
            if self._progress:
                self._progress.load(checkpoint)
            state = TrainerState.load_from_json(str(checkpoint / "trainer_state.json"))
            if state.global_step >= self._total_steps:
                logger.info("%s is at step %d: nothing is left to train", checkpoint, state.global_step)
                self._load_from_checkpoint(str(checkpoint))
                self.state = state
                return
        self._clock = time.perf_counter()
        try:
            self.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
        finally:
            for callback in self.callback_handler.callbacks:
                if isinstance(callback, ConsoleProgress):
                    callback.close()

    def _shape(self) -> RunShape:
        data: dict[str, Any] = {"train_rows": 0, "row_lengths": ""}
        if self._progress:
            data |= self._progress.stream.identity()
        else:
            data = {"train_rows": len(self._train_rows), "row_lengths": digest_lengths(row_lengths(self._train_rows))}
        return RunShape(
            world_size=self.args.world_size,
            per_device_train_batch_size=self.args.per_device_train_batch_size,
            gradient_accumulation_steps=self.args.gradient_accumulation_steps,
            seed=self._order_seed(),
            adapter=describe_adapter(self.model),
            train_sampling_strategy=self.args.train_sampling_strategy,
            **data,
        )

    # The order of rows

    def get_train_dataloader(self) -> DataLoader:
        """Batches of this rank; each real row is seen once an epoch on one rank, whatever their number."""
        # Called again for a smaller batch (auto_find_batch_size), after an attempt whose sums count for nothing.
        self._sums = TokenSums(self.args.device)
        if self._progress:
            return self._stream_loader(self._progress)
        multiple = 1 if self.args.dataloader_drop_last else self._even(self._train_batch_size)
        self.train_dataset: Any = EvenRows(self._train_rows, multiple)
        return super().get_train_dataloader()

    def _stream_loader(self, progress: StreamProgress) -> DataLoader:
        """Not through accelerate, which would share the stream's rows out among the ranks once more."""
        progress.rewind()
        args = self.args
        return StreamLoader(
            progress.stream,
            self.data_collator,
            self._train_batch_size,
            num_workers=args.dataloader_num_workers,
            pin_memory=args.dataloader_pin_memory,
            multiprocessing_context=args.dataloader_multiprocessing_context,
            prefetch_factor=args.dataloader_prefetch_factor,
        )

    def _even(self, batch_size: int) -> int:
        """What the number of rows must be a multiple of; one process can end with a smaller batch."""
        return batch_size * self.args.world_size if self.args.world_size > 1 else 1

    def _order_seed(self) -> int:
        return self.args.data_seed if self.args.data_seed is not None else self.args.seed

    def _get_train_sampler(self, train_dataset: Any = None) -> Sampler | None:
        rows: EvenRows = train_dataset if train_dataset is not None else self.train_dataset
        strategy = self.args.train_sampling_strategy
        if strategy not in ("random", "sequential", "group_by_length"):
            return super()._get_train_sampler(train_dataset)
        per_step = self._train_batch_size * self.args.gradient_accumulation_steps * self.args.world_size
        lengths = row_lengths(rows.rows) if strategy == "group_by_length" else None
        sampler = EpochSampler(len(rows.rows), rows.fillers, self._order_seed(), strategy, lengths, per_step)
        self.remove_callback(FollowEpoch)
        self.add_callback(FollowEpoch(sampler))
        return sampler

    # Evaluation

    def evaluate(
        self,
        eval_dataset: Any = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> dict[str, float]:
        """Metrics weighted by tokens: of each set under its name and, where there are several, of all together."""
        started = time.perf_counter()
        eval_dataset = self.eval_dataset if eval_dataset is None else eval_dataset
        self._evaluated: list[TokenCounts] = []
        metrics: dict[str, float] = {}
        if isinstance(eval_dataset, dict):
            for name, dataset in eval_dataset.items():
                metrics |= super().evaluate(dataset, ignore_keys, f"{metric_key_prefix}_{name}")
            together = sum(self._evaluated[1:], start=self._evaluated[0])
            total = self._named(together, metric_key_prefix)
            self.log(dict(total))
            metrics |= total
        else:
            metrics = super().evaluate(eval_dataset, ignore_keys, metric_key_prefix)
        self._last_evaluation = (self.state.global_step, metrics)
        self._clock += time.perf_counter() - started  # evaluation does not count into training's tokens a second
        return metrics

    def get_eval_dataloader(self, eval_dataset: Any = None) -> DataLoader:
        """Batches of this rank, every row on exactly one rank."""
        rows = self.eval_dataset if eval_dataset is None else eval_dataset
        # Upstream keeps the loader with persistent workers for all sets under one name.
        getattr(self, "_eval_dataloaders", {}).clear()
        return super().get_eval_dataloader(EvenRows(rows, self._even(self.args.eval_batch_size)))

    def _get_eval_sampler(self, eval_dataset: Any) -> Sampler:
        return SequentialSampler(eval_dataset)

    def evaluation_loop(
        self,
        dataloader: DataLoader,
        description: str,
        prediction_loss_only: bool | None = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> EvalLoopOutput:
        """Adds up the sums of all batches and ranks; logits never leave their batch."""
        model: Any = self.model
        was_training = model.training
        self.callback_handler.eval_dataloader = dataloader
        model.eval()
        sums = TokenSums(self.args.device)
        try:
            with torch.no_grad():
                for batch in dataloader:
                    inputs = self._prepare_inputs(batch)
                    with self.accelerator.autocast():
                        _, result = self._forward(model, inputs)
                    sums.add(result, inputs["lengths"].sum())
                    self.control = self.callback_handler.on_prediction_step(self.args, self.state, self.control)
        finally:
            model.train(was_training)
        counts = sums.take()
        self._evaluated.append(counts)
        rows = len(dataloader.dataset.rows)  # type: ignore[attr-defined]
        return EvalLoopOutput(
            predictions=None,  # type: ignore[arg-type]
            label_ids=None,
            metrics=self._named(counts, metric_key_prefix),
            num_samples=rows,
        )

    @staticmethod
    def _named(counts: TokenCounts, prefix: str) -> dict[str, float]:
        return {**counts.metrics(f"{prefix}_"), f"{prefix}_tokens": counts.tokens}

    def evaluate_all(self) -> dict[str, Any]:
        """SPEC's result of `evaluate`: the metrics of all sets together, and of each set under `datasets`."""
        if self.eval_dataset is None:
            return {}
        # The evaluation of the last step stands, unless the best checkpoint has been loaded since.
        step, metrics = self._last_evaluation
        if step != self.state.global_step or self.args.load_best_model_at_end:
            metrics = self.evaluate()
        kept = ("loss", "perplexity", "token_accuracy", "sequence_accuracy", "tokens")

        def named(prefix: str) -> dict[str, float]:
            return {f"eval_{name}": metrics[f"{prefix}_{name}"] for name in kept if f"{prefix}_{name}" in metrics}

        sets = self._eval_names
        each = {name: named(f"eval_{name}" if len(sets) > 1 else "eval") for name in sets}
        return {**named("eval"), "datasets": each}

    # Logging

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Replaces the Trainer's mean of step means by the metrics over all tokens since the last log."""
        if "loss" in logs:
            self._count_tokens()
            counts, self._counts = self._counts, TokenCounts.zero()
            seconds = time.perf_counter() - self._clock
            self._clock = time.perf_counter()
            logs |= counts.metrics()
            logs["num_tokens"] = self.state.num_input_tokens_seen
            logs["tokens_per_second"] = counts.input_tokens / seconds
            logs["memory_gb"] = peak_memory_gb(self.args.device)
        super().log(logs, start_time)

    def _count_tokens(self) -> None:
        """Reads the sums from the device into the counts since the last log and into the state that is saved."""
        counts = self._sums.take()
        self._counts += counts
        if self.args.include_num_input_tokens_seen == "no":  # else the Trainer counts them itself
            self.state.num_input_tokens_seen += counts.input_tokens

    def _save_checkpoint(self, model: torch.nn.Module, trial: Any) -> None:
        started = time.perf_counter()
        self._count_tokens()  # so that num_tokens goes on from the right number after a resume
        streamed = self._progress.gather() if self._progress else None
        if streamed:
            self._end_token_ids = streamed["end_token_ids"]
        super()._save_checkpoint(model, trial)
        if self.is_world_process_zero():
            folder = Path(self._get_output_dir(trial)) / f"checkpoint-{self.state.global_step}"
            run_shape.save(folder, self._shape(), self._counts)
            if self._progress and streamed:
                stream_state.save(folder, streamed)
                artifacts.write_ledger(Path(str(self.args.output_dir)), self._progress.document(streamed))
        if self._progress and streamed:
            self._progress.judge(stream_state.account_in(streamed))
        self._clock += time.perf_counter() - started

    def stream_account(self) -> tuple[dict[str, Any], tuple[int, ...]]:
        """SPEC's LEDGER of the rows that were streamed to all ranks, which all must call it; and their end tokens."""
        assert self._progress is not None
        streamed = self._progress.gather()
        return self._progress.document(streamed), tuple(streamed["end_token_ids"])

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        super()._save(output_dir, state_dict)
        model: Any = self.model
        tokenizer: Any = self.processing_class
        save_companions(model, tokenizer, output_dir or str(self.args.output_dir), self._end_token_ids)
