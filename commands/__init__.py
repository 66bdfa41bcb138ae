"""The verbs of `sft_main.py`, one file a verb: `run(options)` carries it out and returns the exit code."""
