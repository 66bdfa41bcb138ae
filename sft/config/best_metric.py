"""The metrics that an evaluation has, and whether a higher or a lower value of each is better.

They decide which checkpoint `load_best_model_at_end` loads, when `save_strategy: best` saves, and when the schedules
that follow a metric (`reduce_lr_on_plateau`, `greedy`) lower the learning rate.
"""

from __future__ import annotations

from collections.abc import Iterator

from sft.config.schema import Config
from sft.errors import Problem

METRIC_SCHEDULES = ("reduce_lr_on_plateau", "greedy")
"""Learning rate schedules that follow an evaluation metric."""
_SMALLER = ("loss", "perplexity", "entropy")
_PREFIX = "eval_"


def greater_is_better(metric: str) -> bool:
    """Tells by a metric's name, e.g. `eval_NAME_perplexity`, whether a higher value is better."""
    return not metric.endswith(_SMALLER)


def list_metrics(config: Config) -> list[str]:
    """Returns the metrics of each evaluation; each of several sets also has all of them under its own name."""
    measures = ["loss", "perplexity", "token_accuracy", "sequence_accuracy"]
    if config.log_entropy:
        measures.append("entropy")
    sets = config.eval_datasets or []
    names = [entry.display_name(f"eval_datasets_{number}") for number, entry in enumerate(sets)]
    named = [f"{name}_{measure}" for name in names for measure in measures] if len(names) > 1 else []
    return measures + named


def check_best_metric(config: Config) -> Iterator[Problem]:
    """Yields a problem for a metric that no evaluation has; upstream would stop only after the first evaluation."""
    metric = config.metric_for_best_model
    if metric is not None:
        names = list_metrics(config)
        if (metric if metric.startswith(_PREFIX) else _PREFIX + metric) not in [_PREFIX + name for name in names]:
            message = f"no evaluation of this run has a metric {metric!r}"
            end = "." if config.log_entropy else "; entropy with log_entropy: true."
            yield config.problem("metric_for_best_model", message, f"There are {', '.join(names)}{end}")
    if config.save_strategy == "best" and config.eval_strategy == "no":
        yield config.problem("save_strategy", "best needs evaluation", "Write eval_strategy: steps or epoch.")
