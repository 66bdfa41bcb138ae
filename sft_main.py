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

import importlib
import os
import re
import sys
import time
from collections.abc import Sequence

import distributed_utils as distributed
from commands.options import SUMMARIES, read_options
from sft.distributed.onednn_cache import limit_onednn_cache
from sft.errors import Problem, UserError
from sft.report.console import console, show_error

_FIRST_RANK_HEADSTART = 5.0  # seconds


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one verb; returns the exit code."""
    limit_onednn_cache(os.environ)
    arguments = list(sys.argv[1:] if argv is None else argv)
    verb = arguments.pop(0) if arguments and arguments[0] in SUMMARIES else "train"
    try:
        if arguments and re.fullmatch(r"[a-z]+", arguments[0]):
            raise UserError(Problem(f"no command {arguments[0]!r}", f"the commands are {', '.join(SUMMARIES)}"))
        return run_verb(verb, arguments)
    except UserError as error:
        if not distributed.is_main_process():
            time.sleep(_FIRST_RANK_HEADSTART)  # it mostly has the same error, and its exit ends this process too
        show_error(error)
        return error.exit_code
    except KeyboardInterrupt as stop:
        if distributed.is_main_process():
            console.print("; ".join(["stopped", *getattr(stop, "__notes__", ())]), markup=False, soft_wrap=True)
        return 130


def run_verb(verb: str, arguments: Sequence[str]) -> int:
    """Parses the options of a verb, then imports and runs it: only now torch may be loaded, which takes seconds."""
    options = read_options(verb, arguments, (__doc__ or "") if verb == "train" else SUMMARIES[verb])
    code: int = importlib.import_module(f"commands.{verb}").run(options)
    return code


if __name__ == "__main__":
    distributed.end_process(main())
