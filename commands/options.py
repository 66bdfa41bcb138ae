"""The options of each verb. What else is typed after a verb that has a config is an override of that config."""

from __future__ import annotations

import argparse
import os
from collections.abc import Sequence
from pathlib import Path

import config_manager
import distributed_utils as distributed
from sft.config.schema import Config, TrainingKeys
from sft.distributed.gpus import require_tf32
from sft.errors import Problem, UserError
from sft.report.console import quiet_libraries, setup_logging
from sft.report.trackers import require_trackers

SUMMARIES = {
    "train": "Trains, evaluates, and saves the model with its logs and its card.",
    "check": "Tells everything that can be wrong: the config, the model's files, the tokenizer, every row of the data.",
    "preview": "Shows the first rows as the model will see them, with the tokens that are trained.",
    "estimate": "Tells what a run will take: each rank's memory at its peak, its tokens and steps, and the least time.",
    "evaluate": "Measures a model on the config's validation data.",
    "generate": "Answers a file of prompts, or chats.",
    "merge": "Merges an adapter into its base model and verifies the result.",
    "schema": "Prints the JSON Schema of the config, for editors.",
}
"""The verbs, in the order in which `--help` lists them; here because the files of the verbs import torch."""
_CONFIGURED = ("train", "check", "preview", "estimate", "evaluate")


class Options(argparse.Namespace):
    """What the user typed after the verb.

    Attributes:
        config: checked; only of verbs that have one, and not of `check`, which reports what is wrong with it.
    """

    config: Config
    config_file: str | None
    overrides: list[str]
    json: bool
    num_samples: int
    model: str
    chat: bool
    prompts: Path
    output: Path | None
    output_dir: str
    system: str | None
    max_new_tokens: int
    batch_size: int
    temperature: float
    top_p: float
    seed: int
    dtype: str | None
    trust_remote_code: bool

    def load_config(self) -> Config:
        """Loads and checks the config.

        Raises:
            UserError: there is none, or it has mistakes.
        """
        if self.config_file is None:
            hint = "give one: --config_file sample_config.yaml"
            raise UserError(Problem("no config file", hint, "--config_file", "command line"))
        config = config_manager.load_config(self.config_file, self.overrides)
        if config.hub_token:  # the libraries ask the environment each time they need one
            os.environ["HF_TOKEN"] = config.hub_token
        return config


def read_options(verb: str, argv: Sequence[str], description: str) -> Options:
    """Parses the options of a verb and readies this process for it: config, logging, devices.

    No torch is imported: a mistake is told in a fraction of a second, and CUDA has not yet looked for its devices.

    Raises:
        UserError: the config has mistakes, or lacks what the verb needs.
    """
    parser = _make_parser(verb, description)
    options = Options()
    if verb in _CONFIGURED:
        _, options.overrides = parser.parse_known_args(argv, options)
    else:
        parser.parse_args(argv, options)
    if verb in _CONFIGURED and verb != "check":
        options.config = options.load_config()
    if verb in ("train", "estimate"):
        config_manager.require_trainable(options.config)
    if verb in ("train", "evaluate"):
        require_trackers(options.config.section(TrainingKeys))
    setup_logging(distributed.is_main_process())
    if verb in ("train", "estimate", "evaluate"):  # before anything asks CUDA for its devices
        distributed.claim_devices(options.config.num_gpus, use_cpu=options.config.use_cpu)
        require_tf32(options.config.section(TrainingKeys))
    if verb not in ("check", "preview", "schema"):
        quiet_libraries()
    return options


def _make_parser(verb: str, description: str) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog=f"sft_main.py {verb}",
        description=description,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add = parser.add_argument
    if verb in _CONFIGURED:
        add("--config_file", "--config", metavar="FILE", help="the run's YAML file")
    if verb in ("check", "preview", "estimate", "evaluate"):
        add("--json", action="store_true", help="print one JSON document on stdout")
    if verb == "preview":
        add("--num_samples", type=_positive, default=3, help="rows to show (3)")
    if verb == "evaluate":
        add("--model", help="a folder with a model or an adapter; default: the model in output_dir")
    if verb == "generate":
        add("--model", required=True, help="a folder with a model or an adapter")
        source = parser.add_mutually_exclusive_group(required=True)
        source.add_argument("--prompts", type=Path, help="a .txt (one prompt a line), .json or .jsonl file")
        source.add_argument("--chat", action="store_true", help="chat in the terminal")
        add("--output", type=Path, help="where to write the answers as JSONL (stdout)")
        add("--system", metavar="TEXT", help="system prompt ('' for none); default: that of the training")
        add("--max_new_tokens", type=_positive, default=256, help="length limit of an answer (256)")
        add("--batch_size", type=_positive, default=8, help="prompts answered at a time (8)")
        add("--temperature", type=_not_negative, default=0.0, help="0 always takes the likeliest token (0)")
        add("--top_p", type=float, default=1.0, help="sample from the likeliest tokens of this mass (1)")
        add("--seed", type=int, default=0, help="of the sampling (0)")
    if verb == "merge":
        add("--model", required=True, help="the adapter's folder")
        add("--output_dir", required=True, help="a folder that is empty or does not exist")
        add("--dtype", choices=("float32", "bfloat16", "float16"), help="of the merged weights")
    if verb in ("generate", "merge"):
        add("--trust_remote_code", action="store_true", help="run the code that the model brings along")
    return parser


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"expected a whole number from 1, got {text}")
    return value


def _not_negative(text: str) -> float:
    value = float(text)
    if value < 0:
        raise argparse.ArgumentTypeError(f"expected a number from 0, got {text}")
    return value
