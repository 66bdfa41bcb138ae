"""Tells everything that can be wrong: the config, the model's files, the tokenizer, every row of the data."""

from __future__ import annotations

import json

from commands.options import Options
from sft.errors import UserError
from sft.report.check_report import Report
from sft.report.console import show_report


def run(options: Options) -> int:
    """Checks a run and prints the report; 0 if it would start."""
    with Report() as report:
        config = report.attempt(options.load_config)
        if config is not None:
            from preflight import check_run  # imports transformers: a mistake in the config is told without it

            check_run(config, report)
    if options.json:
        print(json.dumps(report.as_json(), ensure_ascii=False))
    else:
        show_report(report)
    return UserError.exit_code if report.errors else 0
