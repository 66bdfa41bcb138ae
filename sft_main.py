"""Fine-tune a language model with supervision: one command for each thing to do, and the order of the stages in each.

    sft_main.py [train] --config_file c.yaml [overrides]     train, evaluate, save
    sft_main.py check    --config_file c.yaml [--json]       everything that can be wrong, before a GPU is touched
    sft_main.py preview  --config_file c.yaml [--num_samples N] [--json]
    sft_main.py estimate --config_file c.yaml [--json]       memory per rank, tokens and steps, before it is tried
    sft_main.py evaluate --config_file c.yaml [--model DIR] [--json]
    sft_main.py generate --model DIR (--prompts FILE [--output FILE] | --chat)
    sft_main.py merge    --model DIR --output_dir DIR        adapter into base, verified
    sft_main.py schema                                       JSON Schema of the config, for editors

Overrides are written --learning_rate 1e-5, --lora_config.r=32 or lora_config.r=32.
Exit codes: 0 done; 2 the config or the data is wrong; 3 training went wrong and was stopped; 1 anything else.
"""

from __future__ import annotations

import json
import logging
import os
import re
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sft.command_line import make_parser
from sft.errors import Problem, UserError

# Everything heavy (torch, transformers, the stages) is imported where it is used: --help, schema and a mistake in the
# config answer in a fraction of a second.
if TYPE_CHECKING:
    from data_handler import PreparedData
    from sft.auto_packing import AutoPacking
    from sft.checking import Report
    from sft.conversation import Conversation
    from sft.losses import Objective
    from sft.precision import Precision
    from sft.run_estimate import RunEstimate
    from sft.schema import Config, TrainingKeys
    from trainer_utils import SFTTrainer

logger = logging.getLogger("sft")

_LET_FIRST_RANK_SPEAK = 5.0  # seconds


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command; returns the exit code."""
    from sft.console import console, show_error

    arguments = list(sys.argv[1:] if argv is None else argv)
    verb = arguments.pop(0) if arguments and arguments[0] in VERBS else "train"
    try:
        if arguments and re.fullmatch(r"[a-z]+", arguments[0]):
            raise UserError(Problem(f"no command {arguments[0]!r}", f"the commands are {', '.join(VERBS)}"))
        return VERBS[verb](arguments)
    except UserError as error:
        if os.environ.get("RANK", "0") != "0":
            time.sleep(_LET_FIRST_RANK_SPEAK)  # it mostly has the same to say, and its end ends this process too
        show_error(error)
        return error.exit_code
    except KeyboardInterrupt:
        console.print("stopped; --resume_from_checkpoint auto goes on from the last checkpoint")
        return 130


def train(argv: list[str]) -> int:
    """Trains, evaluates, and saves the model with its logs and its card."""
    import config_manager
    import distributed_utils as distributed

    started = time.perf_counter()
    config, _ = _config("train", argv)
    config_manager.require_trainable(config)
    _take_machine(config)
    import model_manager
    from sft import artifacts
    from sft.resume import find_checkpoint, set_aside
    from sft.schema import ModelKeys

    output_dir = Path(config.output_dir)
    if distributed.is_main_process():
        artifacts.claim(output_dir)
    checkpoint = find_checkpoint(config.resume_from_checkpoint, output_dir)
    if checkpoint:
        logger.info("Going on from %s", checkpoint)
    model_manager.check_model(config.section(ModelKeys))
    tokenizer = model_manager.load_tokenizer(config.section(ModelKeys))
    data = _prepare(config, tokenizer)
    _require_served(config, tokenizer)
    _join(config)
    distributed.require_agreement({"checkpoint": str(checkpoint), **data.identity()})
    trainer = _build_trainer(config, tokenizer, data, checkpoint)
    # From here on the run is on: what an earlier one left makes room.
    if distributed.is_main_process():
        config_manager.write_config(config, output_dir / "config.yaml")
        if checkpoint is None:
            set_aside(output_dir)

    questions = _questions(config, data)
    results = _exact_match(config, trainer.model, tokenizer, data, questions, "_before")
    trainer.fit(checkpoint)
    if config.streaming:
        data = _account(config, trainer, data)
    results |= trainer.evaluate_all()
    results |= _exact_match(config, trainer.model, tokenizer, data, questions, "_after")
    if distributed.is_main_process():
        _save(config, trainer, tokenizer, data, results, time.perf_counter() - started)
    distributed.barrier()
    distributed.destroy_process_group()
    return 0


def check(argv: list[str]) -> int:
    """Tells everything that can be wrong: the config, the model's files, the tokenizer, every row of the data."""
    options, overrides = make_parser("check", _summary(check)).parse_known_args(argv)
    from sft.checking import Report
    from sft.console import show_report, speak

    speak(is_main_process=True)
    with Report() as report:
        config = report.attempt(lambda: _load(options.config_file, overrides))
        if config is not None:
            _check_stages(config, report)
    if options.json:
        print(json.dumps(report.as_json(), ensure_ascii=False))
    else:
        show_report(report)
    return UserError.exit_code if report.errors else 0


def _check_stages(config: Config, report: Report) -> None:
    import config_manager
    import data_handler
    import model_manager
    from sft import artifacts
    from sft.batch_plan import plan_batches
    from sft.hardware import require_gpus
    from sft.resume import find_checkpoint
    from sft.schema import DataKeys, ModelKeys, TrainingKeys

    report.attempt(lambda: config_manager.require_trainable(config))
    report.attempt(lambda: require_gpus(config.num_gpus or 0))
    report.attempt(lambda: artifacts.require_writable(Path(config.output_dir)))
    report.attempt(lambda: find_checkpoint(config.resume_from_checkpoint, Path(config.output_dir)))
    if config.torch_compile:
        from sft.compilation import compile_settings

        settings = config.torch_compile, config.torch_compile_backend, config.torch_compile_mode
        report.attempt(lambda: compile_settings(*settings))
    report.attempt(lambda: model_manager.check_model(config.section(ModelKeys)))
    tokenizer = report.attempt(lambda: model_manager.load_tokenizer(config.section(ModelKeys)))
    if tokenizer is None:
        return
    keys = config.section(DataKeys)
    data = report.attempt(lambda: _data(config, tokenizer, whole_window=True))
    if data is None:
        return
    report.data = data.ledger
    report.serving = report.attempt(lambda: data_handler.serving_contract(keys, tokenizer))
    if report.serving:
        report.errors += report.serving.problems
    report.attempt(lambda: data_handler.require_enough_rows(keys, data.ledger))
    plan = report.attempt(
        lambda: plan_batches(config.section(TrainingKeys), data.train_rows, data.train_tokens, _processes(config))
    )
    report.estimate = plan.as_json() if plan else None


def preview(argv: list[str]) -> int:
    """Shows the first rows as the model will see them, with the tokens that are trained."""
    config, options = _config("preview", argv)
    from sft.console import show_packed, show_sample, speak

    speak(is_main_process=True)
    import data_handler
    import model_manager
    from sft.schema import DataKeys, ModelKeys

    tokenizer = model_manager.load_tokenizer(config.section(ModelKeys))
    keys = config.section(DataKeys)
    samples = data_handler.preview(keys, tokenizer, options.num_samples, seed=config.seed)
    if options.json:
        print(json.dumps({"samples": list(samples)}, ensure_ascii=False))
        return 0
    shown = []
    for sample in samples:
        show_sample(sample, tokenizer)
        shown.append(sample)
    if keys.packing in ("bfd", "wrapped"):
        show_packed(shown, str(keys.packing), keys.max_seq_length)
    return 0


def estimate(argv: list[str]) -> int:
    """Tells what a run will take: the memory of each rank at its peak, and its tokens and steps."""
    import config_manager

    config, options = _config("estimate", argv)
    config_manager.require_trainable(config)
    _take_machine(config)
    import model_manager
    from sft.console import show_estimate
    from sft.schema import ModelKeys

    model_manager.check_model(config.section(ModelKeys))
    tokenizer = model_manager.load_tokenizer(config.section(ModelKeys))
    told = _estimate(config, tokenizer, _data(config, tokenizer))
    if options.json:
        print(json.dumps(told.as_json()))
    else:
        show_estimate(told)
    return 0


def evaluate(argv: list[str]) -> int:
    """Measures a model on the config's validation data."""
    config, options = _config("evaluate", argv)
    _take_machine(config)
    import distributed_utils as distributed
    import model_manager
    import trainer_utils
    from sft.auto_packing import AutoPacking
    from sft.callbacks import ConsoleProgress
    from sft.console import console
    from sft.document_attention import takes_documents
    from sft.schema import TrainingKeys

    folder = options.model or config.output_dir
    model, tokenizer = model_manager.load_trained(
        folder,
        dtype=config.dtype,
        trust_remote_code=config.trust_remote_code,
        attn_implementation=config.attn_implementation,
    )
    obstacle = None if takes_documents(model.config) else "the model takes padded rows"
    data = _prepare(config, tokenizer, training=False, auto=AutoPacking(obstacle))
    if not data.evals:
        hint = "give validation_file, validation_split or eval_datasets"
        raise UserError(Problem("there is no validation data", hint, "validation_file"))
    _join(config)
    arguments = trainer_utils.training_arguments(
        config.section(TrainingKeys).training_arguments(), bf16=False, fp16=False, plan=None
    )
    callbacks = [ConsoleProgress(console, bars=not config.disable_tqdm)]
    trainer = trainer_utils.SFTTrainer(model, arguments, tokenizer, None, data.evals, data.end_token_ids, callbacks)
    results = trainer.evaluate_all()
    results |= _exact_match(config, model, tokenizer, data, _questions(config, data), "")
    if options.json and distributed.is_main_process():
        print(json.dumps(results))
    distributed.destroy_process_group()
    return 0


def generate(argv: list[str]) -> int:
    """Answers a file of prompts, or chats."""
    options = make_parser("generate", _summary(generate)).parse_args(argv)
    from sft.console import quiet_libraries, speak

    speak(is_main_process=True)
    quiet_libraries()
    from sft import generation
    from sft.replies import Sampling

    sampling = Sampling(options.max_new_tokens, options.temperature, options.top_p, options.seed)
    if options.chat:
        generation.chat(options.model, sampling)
    else:
        generation.run_batch(options.model, options.prompts, options.output, sampling, options.batch_size)
    return 0


def merge(argv: list[str]) -> int:
    """Merges an adapter into its base model and verifies the result."""
    options = make_parser("merge", _summary(merge)).parse_args(argv)
    from sft.console import quiet_libraries, speak

    speak(is_main_process=True)
    quiet_libraries()
    import model_manager

    model_manager.merge(options.model, options.output_dir, dtype=options.dtype)
    return 0


def schema(argv: list[str]) -> int:
    """Prints the JSON Schema of the config, for editors."""
    make_parser("schema", _summary(schema)).parse_args(argv)
    import config_manager

    print(json.dumps(config_manager.json_schema(), indent=2))
    return 0


VERBS: dict[str, Callable[[list[str]], int]] = {
    "train": train,
    "check": check,
    "preview": preview,
    "estimate": estimate,
    "evaluate": evaluate,
    "generate": generate,
    "merge": merge,
    "schema": schema,
}


def _summary(verb: Callable[[list[str]], int]) -> str:
    return verb.__doc__ or ""


def _config(verb: str, argv: list[str]) -> tuple[Config, Any]:
    """The parsed options and the checked config; what is no option is an override."""
    description = __doc__ if verb == "train" else _summary(VERBS[verb])
    options, overrides = make_parser(verb, description or "").parse_known_args(argv)
    return _load(options.config_file, overrides), options


def _load(config_file: str | None, overrides: list[str]) -> Config:
    import config_manager

    if config_file is None:
        raise UserError(
            Problem("no config file", "give one: --config_file sample_config.yaml", "--config_file", "command line")
        )
    return config_manager.load_config(config_file, overrides)


def _take_machine(config: Config) -> None:
    """This process's device and voice, before anything asks CUDA for its devices."""
    import distributed_utils as distributed
    from sft.console import quiet_libraries, speak

    speak(distributed.is_main_process())
    distributed.claim_devices(config.num_gpus, use_cpu=config.use_cpu)
    quiet_libraries()


def _build_trainer(config: Config, tokenizer: Any, data: PreparedData, checkpoint: Path | None) -> SFTTrainer:
    """The model as the config describes it, and the Trainer that holds it."""
    import distributed_utils as distributed
    import trainer_utils
    from sft.batch_plan import plan_batches
    from sft.callbacks import ConsoleProgress, MetricsFile
    from sft.compilation import compile_settings
    from sft.console import console
    from sft.document_attention import takes_documents
    from sft.optimizers import require_optimizer
    from sft.schema import TrainingKeys
    from sft.stream_state import StreamProgress

    keys = config.section(TrainingKeys)
    plan = plan_batches(keys, data.train_rows, data.train_tokens, distributed.world_size())
    compiling = compile_settings(config.torch_compile, config.torch_compile_backend, config.torch_compile_mode)
    precision = _precision(config)
    trainer_utils.set_seed(config.seed)
    model = _model(config, tokenizer, precision)
    searches = keys.per_device_train_batch_size == "auto"
    if searches:
        keys = _choose_batch_size(config, model, tokenizer, data, precision, checkpoint)
        plan = plan_batches(keys, data.train_rows, data.train_tokens, distributed.world_size())
    logger.info("Batches: %s", plan)
    arguments = trainer_utils.training_arguments(
        keys.training_arguments(),
        bf16=precision.bf16,
        fp16=precision.fp16,
        plan=plan,
        pads=not (takes_documents(model.config) or data.is_packed),
        logging_dir=config.logging_dir,
        wandb_project=config.wandb_project,
    )
    require_optimizer(arguments)
    callbacks = [
        MetricsFile(Path(config.output_dir) / "logs"),
        ConsoleProgress(console, bars=not config.disable_tqdm),
    ]
    settings = trainer_utils.StepSettings(
        objective=_objective(config, model),
        loss_chunk_size=config.loss_chunk_size,
        master_weights=precision.master_weights,
        on_nonfinite=config.on_nonfinite,
        nonfinite_limit=config.nonfinite_limit,
        from_scratch=config.from_scratch is not None,
        compiling=compiling,
        shrinks=searches,
    )
    return trainer_utils.SFTTrainer(
        model,
        arguments,
        tokenizer,
        data.train,
        data.evals,
        data.end_token_ids,
        callbacks,
        total_steps=plan.total_steps,
        progress=StreamProgress(data.train, data.end_token_ids, data.eval_ledgers) if config.streaming else None,
        settings=settings,
    )


def _choose_batch_size(
    config: Config, model: Any, tokenizer: Any, data: PreparedData, precision: Precision, checkpoint: Path | None
) -> TrainingKeys:
    """The keys with the rows of a pass that `auto` stands for: those of the checkpoint, or what real passes say."""
    import distributed_utils as distributed
    from sft.batch_probe import probe_batch_size, rows_of_checkpoint, with_rows
    from sft.collation import Collator
    from sft.document_attention import takes_documents
    from sft.schema import TrainingKeys
    from sft.token_forward import TokenForward

    keys = config.section(TrainingKeys)
    kept = rows_of_checkpoint(checkpoint) if checkpoint else None
    if kept is not None:
        logger.info("per_device_train_batch_size: auto is %d, as in %s", kept, checkpoint)
        return with_rows(keys, kept)
    rows = probe_batch_size(
        model,
        data.train,
        keys,
        Collator(int(tokenizer.pad_token_id), flatten=takes_documents(model.config)),
        TokenForward(model, _objective(config, model), config.loss_chunk_size),
        precision,
        world_size=distributed.world_size(),
        local_world_size=distributed.local_world_size(),
    )
    return with_rows(keys, rows)


def _precision(config: Config) -> Precision:
    import model_manager
    from sft.schema import ModelKeys

    return model_manager.plan_precision(
        config.section(ModelKeys),
        config.lora_config,
        config.quantization_config,
        bf16=config.bf16 if config.is_set("bf16") else None,
        fp16=config.fp16 if config.is_set("fp16") else None,
    )


def _model(config: Config, tokenizer: Any, precision: Precision, *, outline: bool = False) -> Any:
    """The model as the config describes it; as an outline it has no numbers and takes no memory."""
    import model_manager
    from sft.schema import ModelKeys

    return model_manager.load_model(
        config.section(ModelKeys),
        tokenizer,
        precision=precision,
        lora=config.lora_config,
        quantization=config.quantization_config,
        gradient_checkpointing=bool(config.gradient_checkpointing or config.activation_checkpointing),
        activation_checkpoint=config.activation_checkpoint,
        outline=outline,
    )


def _objective(config: Config, model: Any) -> Objective:
    import model_manager
    from sft.losses import Objective

    return Objective(
        loss_type=config.loss_type,
        label_smoothing=config.label_smoothing_factor,
        z_loss=config.z_loss_coef,
        router_aux=model_manager.router_aux_loss_coef(model, config.router_aux_loss_coef),
        entropy=config.log_entropy,
    )


def _estimate(config: Config, tokenizer: Any, data: PreparedData) -> RunEstimate:
    """What the run takes, from an outline of its model and its longest real pass."""
    import trainer_utils
    from sft.batch_plan import plan_batches
    from sft.collation import Collator
    from sft.document_attention import takes_documents
    from sft.run_estimate import estimate_run
    from sft.schema import TrainingKeys

    keys = config.section(TrainingKeys)
    plan = plan_batches(keys, data.train_rows, data.train_tokens, _processes(config))
    precision = _precision(config)
    model = _model(config, tokenizer, precision, outline=True)
    arguments = trainer_utils.training_arguments(
        keys.training_arguments(),
        bf16=precision.bf16,
        fp16=precision.fp16,
        plan=plan,
        pads=not (takes_documents(model.config) or data.is_packed),
    )
    return estimate_run(
        model,
        data.train,
        arguments,
        plan,
        Collator(int(tokenizer.pad_token_id), flatten=takes_documents(model.config)),
        _objective(config, model),
        loss_chunk_size=config.loss_chunk_size,
        master_weights=precision.master_weights,
        max_seq_length=config.max_seq_length,
    )


def _save(
    config: Config, trainer: SFTTrainer, tokenizer: Any, data: PreparedData, results: dict[str, Any], seconds: float
) -> None:
    """The final model at the top of the output folder, with its results and its card."""
    import model_manager
    from sft import artifacts
    from sft.console import show_conclusion
    from sft.serving_contract import check_end_tokens

    output_dir = Path(config.output_dir)
    model: Any = trainer.model
    model_manager.save_final_model(model, tokenizer, output_dir, data.end_token_ids)
    stops = json.loads((output_dir / "generation_config.json").read_text()).get("eos_token_id")
    for problem in check_end_tokens(tokenizer, data.end_token_ids, stops):
        logger.warning("%s", problem)
    trainer.state.save_to_json(str(output_dir / "trainer_state.json"))
    artifacts.write_results(output_dir, results)
    stop_tokens = [str(tokenizer.decode([token])) for token in data.end_token_ids]
    artifacts.write_card(output_dir, config, data.ledger, results, stop_tokens)
    last = {"train_loss": next((e["loss"] for e in reversed(trainer.state.log_history) if "loss" in e), None)}
    show_conclusion(output_dir, last | results, seconds)


def _require_served(config: Config, tokenizer: Any) -> None:
    """Stops the run where the model would be asked behind other tokens than it was trained behind."""
    import data_handler
    from sft.schema import DataKeys

    contract = data_handler.serving_contract(config.section(DataKeys), tokenizer)
    if not contract.ok:
        raise UserError(*contract.problems)
    logger.info("Serving: %s", contract.message)


def _join(config: Config) -> None:
    """Joins the process group, once everything is done that takes each process a different time."""
    import distributed_utils as distributed

    backend = distributed.choose_backend(config.ddp_backend, use_cpu=config.use_cpu)
    distributed.init_process_group(backend, config.ddp_timeout)


def _prepare(config: Config, tokenizer: Any, training: bool = True, **options: Any) -> PreparedData:
    """The prepared data; the first rank shows its ledger and its first sample, and saves the ledger."""
    import data_handler
    import distributed_utils as distributed
    from sft import artifacts
    from sft.console import counting, show_ledger, show_sample
    from sft.schema import DataKeys

    keys = config.section(DataKeys)
    with counting("rows prepared:") as on_rows:
        data = _data(config, tokenizer, training=training, on_rows=on_rows, **options)
    if distributed.is_main_process():
        show_ledger(data.ledger)
        if training:
            artifacts.write_ledger(Path(config.output_dir), data.ledger)
        if data.sample:
            show_sample(data.sample, tokenizer)
    if data.packing:
        logger.info("Packing: %s", data.packing)
    if training:
        data_handler.require_enough_rows(keys, data.ledger)
        if str(config.eval_strategy) != "no" and not data.evals:
            hint = "give validation_file, validation_split or eval_datasets, or remove eval_strategy"
            raise UserError(config.problem("eval_strategy", "there is no validation data", hint))
    return data


def _data(config: Config, tokenizer: Any, training: bool = True, **options: Any) -> PreparedData:
    """The data of all sets; where training rows are streamed, what is known of their beginning."""
    import data_handler
    import distributed_utils as distributed
    from sft.schema import DataKeys

    keys = config.section(DataKeys)
    if "auto" in (keys.packing, keys.eval_packing):
        options.setdefault("auto", _auto_packing(config, tokenizer))
    if not (training and keys.streaming):
        options.pop("whole_window", None)
        return data_handler.prepare_data(keys, tokenizer, seed=config.seed, training=training, **options)
    return data_handler.stream_data(
        keys,
        tokenizer,
        seed=config.seed,
        rank=distributed.rank(),
        world_size=distributed.world_size(),
        workers=max(1, config.dataloader_num_workers),
        shuffle=config.train_sampling_strategy == "random",
        **options,
    )


def _auto_packing(config: Config, tokenizer: Any) -> AutoPacking:
    """What `packing: auto` goes by: the model that the config names, and the rows of a step."""
    import model_manager
    from sft.auto_packing import AutoPacking
    from sft.batch_plan import rows_a_step
    from sft.schema import ModelKeys, TrainingKeys

    obstacle = model_manager.obstacle_to_packing(config.section(ModelKeys), tokenizer)
    return AutoPacking(obstacle, rows_a_step(config.section(TrainingKeys), _processes(config)))


def _processes(config: Config) -> int:
    """How many train together, or will."""
    from sft.hardware import visible_gpus

    return int(os.environ.get("WORLD_SIZE", "0")) or config.num_gpus or max(1, visible_gpus())


def _account(config: Config, trainer: SFTTrainer, data: PreparedData) -> PreparedData:
    """The data with the account of all rows that were streamed, which the first rank shows and saves."""
    import dataclasses

    import distributed_utils as distributed
    from sft import artifacts
    from sft.console import show_ledger

    ledger, end_token_ids = trainer.stream_account()
    if distributed.is_main_process():
        show_ledger(ledger)
        artifacts.write_ledger(Path(config.output_dir), ledger)
    return dataclasses.replace(data, ledger=ledger, end_token_ids=end_token_ids)


def _questions(config: Config, data: PreparedData) -> list[Conversation]:
    """The validation rows that `exact_match_samples` asks for; each ends with its right answer."""
    import data_handler
    from sft.schema import DataKeys

    if not config.exact_match_samples or not data.evals:
        return []
    rows = data_handler.validation_conversations(
        config.section(DataKeys), seed=config.seed, limit=config.exact_match_samples
    )
    if not rows:
        logger.warning("exact_match_samples: no validation row is a conversation that ends with an answer")
    return rows


def _exact_match(
    config: Config, model: Any, tokenizer: Any, data: PreparedData, rows: list[Conversation], when: str
) -> dict[str, float]:
    """The share of `rows` that the model answers exactly, said aloud; nothing when there is none to ask."""
    import torch

    import distributed_utils as distributed
    from sft.console import counting
    from sft.exact_match import count_right

    if not rows:
        return {}
    mine = rows[distributed.rank() :: distributed.world_size()]
    with counting("questions answered:") as on_progress:
        right = count_right(model, tokenizer, mine, data.end_token_ids, config.per_device_eval_batch_size, on_progress)
    total = int(distributed.all_reduce_sum(torch.tensor(right)))
    words = f"Exact match{when.replace('_', ' ')}"
    logger.info("%s: %d of %d (%.1f %%)", words, total, len(rows), 100 * total / len(rows))
    return {f"exact_match{when}": total / len(rows)}


if __name__ == "__main__":
    sys.exit(main())
