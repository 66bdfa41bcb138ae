"""Which evaluation is the best one: the metrics that evaluations have, and which way of each is better.

Decided by it are the checkpoint that `load_best_model_at_end` ends with, when `save_strategy: best` saves, and when
the schedules that watch a metric (`reduce_lr_on_plateau`, `greedy`) lower the learning rate.
"""

from __future__ import annotations

from collections.abc import Iterator

from sft.config.schema import Config
from sft.errors import Problem

WATCHING = ("reduce_lr_on_plateau", "greedy")
"""Schedules that follow a metric of the evaluations."""
_SMALLER = ("loss", "perplexity", "entropy")
_PREFIX = "eval_"


def greater_is_better(metric: str) -> bool:
    """Whether the higher value of a metric is the better one, told by its name, e.g. `eval_NAME_perplexity`."""
    return not metric.endswith(_SMALLER)


def metric_names(config: Config) -> list[str]:
    """What each evaluation of the run measures; of several sets, each has all of it under its own name too."""
    measures = ["loss", "perplexity", "token_accuracy", "sequence_accuracy"]
    if config.log_entropy:
        measures.append("entropy")
    sets = config.eval_datasets or []
    names = [entry.called(f"eval_datasets_{number}") for number, entry in enumerate(sets)]
    named = [f"{name}_{measure}" for name in names for measure in measures] if len(names) > 1 else []
    return measures + named


def metric_problems(config: Config) -> Iterator[Problem]:
    """Upstream would look for the metric when the first evaluation is done, and end the run where there is none."""
    metric = config.metric_for_best_model
    if metric is not None:
        names = metric_names(config)
        if (metric if metric.startswith(_PREFIX) else _PREFIX + metric) not in [_PREFIX + name for name in names]:
            message = f"no evaluation of this run has a metric {metric!r}"
            hint = f"There are {', '.join(names)}" + (
                "." if config.log_entropy else "; entropy with log_entropy: true."
            )
            yield config.problem("metric_for_best_model", message, hint)
    if config.save_strategy == "best" and config.eval_strategy == "no":
        yield config.problem("save_strategy", "best needs evaluation", "Write eval_strategy: steps or epoch.")
