"""The options of each command; whatever else is typed where there is a config is an override of it."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path


def make_parser(verb: str, description: str) -> argparse.ArgumentParser:
    """The parser of one command.

    Args:
        verb: the command's name.
        description: what `--help` says above the options.
    """
    parser = argparse.ArgumentParser(
        prog=f"sft_main.py {verb}",
        description=description,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    _OPTIONS[verb](parser)
    return parser


def _config(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--config_file", "--config", metavar="FILE", help="the run's YAML file")


def _json(parser: argparse.ArgumentParser) -> None:
    _config(parser)
    parser.add_argument("--json", action="store_true", help="print one JSON document on stdout")


def _preview(parser: argparse.ArgumentParser) -> None:
    _json(parser)
    parser.add_argument("--num_samples", type=_positive, default=3, help="rows to show (3)")


def _evaluate(parser: argparse.ArgumentParser) -> None:
    _json(parser)
    parser.add_argument("--model", help="a folder with a model or an adapter; default: the model in output_dir")


def _generate(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", required=True, help="a folder with a model or an adapter")
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--prompts", type=Path, help="a .txt (one prompt a line), .json or .jsonl file")
    source.add_argument("--chat", action="store_true", help="chat in the terminal")
    parser.add_argument("--output", type=Path, help="where to write the answers as JSONL (stdout)")
    parser.add_argument("--system", metavar="TEXT", help="system prompt ('' for none); default: that of the training")
    parser.add_argument("--max_new_tokens", type=_positive, default=256, help="length limit of an answer (256)")
    parser.add_argument("--batch_size", type=_positive, default=8, help="prompts answered at a time (8)")
    parser.add_argument("--temperature", type=_not_negative, default=0.0, help="0 always takes the likeliest token (0)")
    parser.add_argument("--top_p", type=float, default=1.0, help="sample from the likeliest tokens of this mass (1)")
    parser.add_argument("--seed", type=int, default=0, help="of the sampling (0)")
    _trust(parser)


def _merge(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", required=True, help="the adapter's folder")
    parser.add_argument("--output_dir", required=True, help="a folder that is empty or does not exist")
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), help="of the merged weights")
    _trust(parser)


def _trust(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--trust_remote_code", action="store_true", help="run the code that the model brings along")


def _nothing(parser: argparse.ArgumentParser) -> None:
    """No options."""


_OPTIONS: dict[str, Callable[[argparse.ArgumentParser], None]] = {
    "train": _config,
    "check": _json,
    "preview": _preview,
    "estimate": _json,
    "evaluate": _evaluate,
    "generate": _generate,
    "merge": _merge,
    "schema": _nothing,
}


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
