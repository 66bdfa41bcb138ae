"""The README.md of a trained model: its data, settings and metrics, and how to use it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml
from jinja2 import Environment, FileSystemLoader, StrictUndefined


@dataclass(frozen=True)
class CardFacts:
    """Everything that the card contains.

    Attributes:
        title: the heading, e.g. the run's name.
        base_model: hub name or path; None for a model trained from random weights.
        is_adapter: whether the folder holds an adapter.
        path: the folder, as written in the examples.
        datasets: the ledger's entry of each data set, by name.
        hyperparameters: settings by config key; no secrets.
        metrics: final values by name, e.g. `eval_loss`.
        stop_tokens: texts of the tokens that end a reply.
        chat: whether a chat template was trained; false for plain text.
        versions: of the libraries, by name.
    """

    title: str
    base_model: str | None
    is_adapter: bool
    path: str
    datasets: Mapping[str, Mapping[str, Any]]
    hyperparameters: Mapping[str, Any]
    metrics: Mapping[str, float] = field(default_factory=dict)
    stop_tokens: Sequence[str] = ()
    chat: bool = True
    versions: Mapping[str, str] = field(default_factory=dict)


def _number(value: float | int) -> str:
    """Formats a count with thousands separators, another number with four digits."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return str(value)
    return f"{value:,}" if isinstance(value, int) else f"{value:.4g}"


def _cell(value: Any) -> str:
    """Escapes a value for a cell of a Markdown table."""
    return str(value).replace("|", "\\|").replace("\n", " ")


def _front_matter(facts: CardFacts) -> str:
    """Returns the YAML block that the hub reads. It refuses a local path as `base_model`, so none is written."""
    fields: dict[str, Any] = {
        "library_name": "peft" if facts.is_adapter else "transformers",
        "pipeline_tag": "text-generation",
        "tags": ["sft", *(["lora"] if facts.is_adapter else [])],
    }
    if facts.base_model and not Path(facts.base_model).exists() and facts.base_model.count("/") <= 1:
        fields["base_model"] = facts.base_model
    return yaml.safe_dump(fields, sort_keys=True, allow_unicode=True)


def write_model_card(output_dir: str | Path, facts: CardFacts) -> Path:
    """Writes README.md to `output_dir`, over the one that peft writes there; returns its path."""
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=False,  # Markdown, not HTML
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
        undefined=StrictUndefined,
    )
    environment.filters |= {"number": _number, "cell": _cell}
    card = environment.get_template("model_card.md.jinja").render(facts=facts, front_matter=_front_matter(facts))
    path = Path(output_dir) / "README.md"
    path.write_text(card, encoding="utf-8")
    return path
