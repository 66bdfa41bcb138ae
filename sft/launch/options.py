"""The command line of `launch_training.sh`, and the environment variables that become overrides of the config."""

from __future__ import annotations

import argparse
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import NoReturn

from sft.config.overrides import COMMAND_LINE, parse_overrides
from sft.config.schema import Config
from sft.errors import Problem, UserError

logger = logging.getLogger("sft.launch")

DEFAULT_PORT = 29_500  # torchrun's own

ENVIRONMENT = {
    "MODEL_NAME": "model_name_or_path",
    "TRAIN_FILE": "train_file",
    "VAL_FILE": "validation_file",
    "OUTPUT_DIR": "output_dir",
    "BATCH_SIZE": "per_device_train_batch_size",
    "LEARNING_RATE": "learning_rate",
    "EPOCHS": "num_train_epochs",
    "MAX_STEPS": "max_steps",
    "LORA_RANK": "lora_config.r",
    "LORA_ALPHA": "lora_config.lora_alpha",
}
"""Environment variables that become overrides. NPROC_PER_NODE is not among them: the launcher reads it itself."""

EPILOG = """\
Overrides change any key of the config: --learning_rate 1e-5, --lora_config.r=32 or lora_config.r=32.
The `--` before them is optional.
Environment variables do the same, and overrides win over them:
  {table}
  NPROC_PER_NODE -> processes on this node (without GPUs: processes on the CPU)
Without --gpus, num_gpus and NPROC_PER_NODE: one process for each visible GPU, or one on the CPU.
Exit codes: 0 done; 2 config or data is wrong; else 1, or what training ended with."""


@dataclass(frozen=True)
class Arguments:
    """The command line of `launch_training.sh`. `overrides` are the config's, as typed."""

    config: str
    gpus: int | None
    nodes: int | None
    node_rank: int | None
    master_addr: str | None
    master_port: int | None
    dry_run: bool
    overrides: tuple[str, ...]


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise UserError(Problem(message, "launch_training.sh --help shows every option", file=COMMAND_LINE))


def _count(minimum: int) -> Callable[[str], int]:
    def count(text: str) -> int:
        value = int(text)
        if value < minimum:
            raise ValueError
        return value

    count.__name__ = f"whole number, {minimum} or more,"  # argparse shows it: invalid ... value: '-1'
    return count


def parse_arguments(argv: Sequence[str]) -> Arguments:
    """Separates the launcher's options from the config's overrides, which it passes on unchanged.

    Raises:
        UserError: an option lacks its value or has a wrong one, or `--config` is missing.
    """
    table = "\n  ".join(f"{name} -> {key}" for name, key in ENVIRONMENT.items())
    parser = _Parser(
        prog="launch_training.sh",
        usage="%(prog)s --config FILE [options] [-- overrides]",
        description="Trains as the config says, with one process or several.",
        epilog=EPILOG.format(table=table),
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--config", "--config_file", required=True, metavar="FILE", help="the YAML config")
    parser.add_argument("--gpus", type=_count(0), metavar="N", help="GPUs of this node, one process each; 0: the CPU")
    parser.add_argument("--nodes", type=_count(1), metavar="N", help="nodes; start this command on each of them")
    parser.add_argument("--node_rank", "--node-rank", type=_count(0), metavar="R", help="number of this node, from 0")
    parser.add_argument("--master_addr", "--master-addr", metavar="A", help="host name or address of node 0")
    port_help = f"free port of node 0 ({DEFAULT_PORT})"
    parser.add_argument("--master_port", "--master-port", type=_count(1), metavar="P", help=port_help)
    parser.add_argument("--dry-run", action="store_true", help="check the config, print the command, start nothing")
    own, after = list(argv), []
    if "--" in own:
        cut = own.index("--")
        own, after = own[:cut], own[cut + 1 :]
    known, unknown = parser.parse_known_args(own)
    return Arguments(**vars(known), overrides=(*unknown, *after))


def override_keys(tokens: Sequence[str]) -> set[str]:
    """Returns the config keys that the overrides name; `load_config` reports what is wrong with them."""
    overrides, _ = parse_overrides(tokens, Config)
    return {override.key for override in overrides}


def environment_overrides(env: Mapping[str, str], explicit: set[str]) -> list[str]:
    """Returns the overrides from environment variables and logs each. A key in `explicit`, or its section, wins."""
    overrides = []
    for name, key in ENVIRONMENT.items():
        value = env.get(name, "")
        if not value:
            continue
        if key in explicit or key.partition(".")[0] in explicit:
            logger.info("%s=%s from the environment is not used: the command line sets %s", name, value, key)
            continue
        logger.info("%s=%s from the environment sets %s", name, value, key)
        overrides.append(f"{key}={value}")
    return overrides
