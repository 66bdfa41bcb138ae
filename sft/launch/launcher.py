"""The program of `launch_training.sh`: parses the command line, makes a `Plan`, runs it and returns its exit code."""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from sft.errors import UserError
from sft.launch.options import parse_arguments
from sft.launch.plan import ENTRY, make_plan
from sft.launch.processes import run_plan

logger = logging.getLogger("sft.launch")


def main(argv: Sequence[str] | None = None, entry: Path = ENTRY) -> int:
    """Runs the training that the command line asks for and returns its exit code."""
    _setup_logging()
    try:
        arguments = parse_arguments(sys.argv[1:] if argv is None else argv)
        plan = make_plan(arguments, os.environ, entry)
    except UserError as error:
        for problem in error.problems:
            print(f"error: {problem}", file=sys.stderr)
        return error.exit_code
    if arguments.dry_run:
        print(plan.shell())
        return 0
    nodes = f" on node {plan.node_rank} of {plan.nodes}, first {plan.master_addr}" if plan.nodes > 1 else ""
    logger.info("starting %d process%s%s", plan.processes, "es" * (plan.processes > 1), nodes)
    return run_plan(plan)


def _setup_logging() -> None:
    """Sends the launcher's own lines to stderr. What is logged while the config is read, the run itself logs again."""
    logging.getLogger("sft").addHandler(logging.NullHandler())
    if logger.handlers:
        return
    handler = logging.StreamHandler()
    handler.setFormatter(logging.Formatter("[launch] %(message)s"))
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)


if __name__ == "__main__":
    sys.exit(main())
