"""Fine-tune a language model with supervision: one command for each thing to do, and the order of the stages in each.

    sft_main.py [train] --config_file c.yaml [overrides]     train, evaluate, save
    sft_main.py check    --config_file c.yaml [--json]       everything that can be wrong, before a GPU is touched
    sft_main.py preview  --config_file c.yaml [--num_samples N] [--json]
    sft_main.py estimate --config_file c.yaml [--json]       memory per rank, tokens, steps, a least time
    sft_main.py evaluate --config_file c.yaml [--model DIR] [--json]
    sft_main.py generate --model DIR (--prompts FILE [--output FILE] | --chat) [--system TEXT]
    sft_main.py merge    --model DIR --output_dir DIR        adapter into base, verified
    sft_main.py schema                                       JSON Schema of the config, for editors

Overrides are written --learning_rate 1e-5, --lora_config.r=32 or lora_config.r=32.
Exit codes: 0 done; 2 the config or the data is wrong; 3 training went wrong and was stopped; 130 stopped by Ctrl-C;
1 anything else.
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
    from sft.config.schema import Config

logger = logging.getLogger("sft")

_LET_FIRST_RANK_SPEAK = 5.0  # seconds


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command; returns the exit code."""
    from sft.distributed import onednn_cache
    from sft.report.console import console, show_error

    onednn_cache.limit_onednn_cache(os.environ)
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
    except KeyboardInterrupt as stop:
        if os.environ.get("RANK", "0") == "0":
            console.print("; ".join(["stopped", *getattr(stop, "__notes__", ())]), markup=False, soft_wrap=True)
        return 130


def train(argv: list[str]) -> int:
    """Trains, evaluates, and saves the model with its logs and its card."""
    import config_manager
    import distributed_utils as distributed
    from sft.config.schema import ModelKeys, TrainingKeys
    from sft.report.trackers import require_trackers

    started = time.perf_counter()
    config, _ = _config("train", argv)
    config_manager.require_trainable(config)
    require_trackers(config.section(TrainingKeys))
    _take_machine(config)
    import model_manager
    import stages
    import training_run
    from readiness import require_apart
    from sft.checkpoint.discovery import describe_resume, find_checkpoint
    from sft.checkpoint.output_dir import archive_previous_run
    from sft.distributed.collectives import barrier
    from sft.model.tokenizer import remember_system_prompt
    from sft.report import run_files
    from sft.training.optim.lr_schedule import require_schedule

    require_schedule(config.section(TrainingKeys))
    output_dir = Path(config.output_dir)
    require_apart(config)
    if distributed.is_main_process():
        run_files.lock_output_dir(output_dir)
    checkpoint = find_checkpoint(config.resume_from_checkpoint, output_dir)
    if checkpoint:
        logger.info("Going on from %s", checkpoint)
    model_manager.check_model(config.section(ModelKeys), config.lora_config)
    tokenizer = model_manager.load_tokenizer(config.section(ModelKeys))
    data = stages.prepare(config, tokenizer)
    stages.require_served(config, tokenizer)
    remember_system_prompt(tokenizer, config.system_prompt)
    stages.join(config)
    distributed.require_agreement({"checkpoint": str(checkpoint), **data.identity()})
    trainer = stages.build_trainer(config, tokenizer, data, checkpoint)
    if checkpoint:
        trainer.go_on_from(checkpoint)
    # From here on the run is on: what an earlier one left makes room.
    if distributed.is_main_process():
        archive_previous_run(output_dir, checkpoint)
        config_manager.write_config(config, output_dir / "config.yaml")
        run_files.write_ledger(output_dir, data.ledger)
    try:
        training_run.carry_out(config, trainer, tokenizer, data, checkpoint, started)
    except KeyboardInterrupt as stop:
        stop.add_note(describe_resume(output_dir))
        raise
    barrier()
    distributed.destroy_process_group()
    return 0


def check(argv: list[str]) -> int:
    """Tells everything that can be wrong: the config, the model's files, the tokenizer, every row of the data."""
    options, overrides = make_parser("check", _summary(check)).parse_known_args(argv)
    from sft.report.check_report import Report
    from sft.report.console import setup_logging, show_report

    setup_logging(is_main_process=True)
    with Report() as report:
        config = report.attempt(lambda: _load(options.config_file, overrides))
        if config is not None:
            from readiness import check_run

            check_run(config, report)
    if options.json:
        print(json.dumps(report.as_json(), ensure_ascii=False))
    else:
        show_report(report)
    return UserError.exit_code if report.errors else 0


def preview(argv: list[str]) -> int:
    """Shows the first rows as the model will see them, with the tokens that are trained."""
    config, options = _config("preview", argv)
    from sft.report.console import setup_logging, show_packed, show_sample

    setup_logging(is_main_process=True)
    import data_handler
    import model_manager
    from sft.config.schema import DataKeys, ModelKeys

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
    """Tells what a run will take: each rank's memory at its peak, its tokens and steps, and the least time."""
    import config_manager

    config, options = _config("estimate", argv)
    config_manager.require_trainable(config)
    _take_machine(config)
    import model_manager
    import stages
    from sft.config.schema import ModelKeys
    from sft.report.console import show_estimate

    model_manager.check_model(config.section(ModelKeys), config.lora_config)
    tokenizer = model_manager.load_tokenizer(config.section(ModelKeys))
    told = stages.estimate_run(config, tokenizer, stages.read_data(config, tokenizer))
    if options.json:
        print(json.dumps(told.as_json()))
    else:
        show_estimate(told)
    return 0


def evaluate(argv: list[str]) -> int:
    """Measures a model on the config's validation data."""
    from sft.config.schema import ModelKeys, TrainingKeys
    from sft.report.trackers import require_trackers

    config, options = _config("evaluate", argv)
    require_trackers(config.section(TrainingKeys))
    _take_machine(config)
    import distributed_utils as distributed
    import model_manager
    import stages
    import trainer_utils
    from sft.data.preparation.packing import AutoPacking
    from sft.model.attention.document_attention import takes_documents
    from sft.model.embeddings import resize_embeddings
    from sft.model.lora import without_adapter
    from sft.report.console import console
    from sft.report.progress import ConsoleProgress

    folder = Path(options.model or config.output_dir).expanduser()
    _say_what_is_measured(folder, config, is_named=options.model is not None)
    model, tokenizer = model_manager.load_trained(
        folder,
        dtype=config.dtype,
        trust_remote_code=config.trust_remote_code,
        attn_implementation=config.attn_implementation,
    )
    # A base that was never trained here is measured behind the prompts that training on it would make.
    model_manager.configure_tokenizer(tokenizer, config.section(ModelKeys))
    resize_embeddings(without_adapter(model), len(tokenizer))
    obstacle = None if takes_documents(model.config) else "the model takes padded rows"
    data = stages.prepare(config, tokenizer, training=False, auto=AutoPacking(obstacle))
    if not data.evals:
        hint = "give validation_file, validation_split or eval_datasets"
        raise UserError(Problem("there is no validation data", hint, "validation_file"))
    stages.join(config)
    arguments = trainer_utils.training_arguments(
        config.section(TrainingKeys).training_arguments(), bf16=False, fp16=False, plan=None
    )
    callbacks = [ConsoleProgress(console, bars=not config.disable_tqdm)]
    trainer = trainer_utils.SFTTrainer(model, arguments, tokenizer, None, data.evals, data.end_token_ids, callbacks)
    results = trainer.evaluate_all()
    rows = stages.questions(config, tokenizer, data)
    results |= stages.measure_exact_match(config, model, tokenizer, data, rows, "")
    if options.json and distributed.is_main_process():
        print(json.dumps(results))
    distributed.destroy_process_group()
    return 0


def _say_what_is_measured(folder: Path, config: Config, *, is_named: bool) -> None:
    from sft.model.paths import is_adapter

    logger.info("Measuring %s in %s", "the adapter" if is_adapter(folder) else "the model", folder)
    if not is_named and is_adapter(folder) != (config.lora_config is not None):
        trains = "an adapter" if config.lora_config is not None else "a whole model"
        logger.warning("The config trains %s, and output_dir holds something else: name it by --model", trains)


def generate(argv: list[str]) -> int:
    """Answers a file of prompts, or chats."""
    options = make_parser("generate", _summary(generate)).parse_args(argv)
    from sft.report.console import quiet_libraries, setup_logging

    setup_logging(is_main_process=True)
    quiet_libraries()
    from sft.inference import batch as generation
    from sft.inference.generate import Sampling

    sampling = Sampling(options.max_new_tokens, options.temperature, options.top_p, options.seed)
    asking: dict[str, Any] = {"system": options.system, "trust_remote_code": options.trust_remote_code}
    if options.chat:
        generation.chat(options.model, sampling, **asking)
    else:
        generation.run_batch(options.model, options.prompts, options.output, sampling, options.batch_size, **asking)
    return 0


def merge(argv: list[str]) -> int:
    """Merges an adapter into its base model and verifies the result."""
    options = make_parser("merge", _summary(merge)).parse_args(argv)
    from sft.report.console import quiet_libraries, setup_logging

    setup_logging(is_main_process=True)
    quiet_libraries()
    import model_manager

    trust = options.trust_remote_code
    model_manager.merge(options.model, options.output_dir, dtype=options.dtype, trust_remote_code=trust)
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

    if config_file is None:
        raise UserError(
            Problem("no config file", "give one: --config_file sample_config.yaml", "--config_file", "command line")
        )
    import config_manager

    config = config_manager.load_config(config_file, overrides)
    if config.hub_token:  # the libraries ask the environment each time they need one
        os.environ["HF_TOKEN"] = config.hub_token
    return config


def _take_machine(config: Config) -> None:
    """This process's device and voice, before anything asks CUDA for its devices."""
    import distributed_utils as distributed
    from sft.config.schema import TrainingKeys
    from sft.distributed.gpus import require_tf32
    from sft.report.console import quiet_libraries, setup_logging

    setup_logging(distributed.is_main_process())
    distributed.claim_devices(config.num_gpus, use_cpu=config.use_cpu)
    require_tf32(config.section(TrainingKeys))
    quiet_libraries()


if __name__ == "__main__":
    from distributed_utils import end_process

    end_process(main())
