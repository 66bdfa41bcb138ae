"""The README.md of a trained model: what it was made of, with which settings, how good it is, and how to use it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml
from jinja2 import Environment, FileSystemLoader, StrictUndefined

TEMPLATE = "model_card.md.jinja"


@dataclass(frozen=True)
class CardDataset:
    """One training data set: how many rows and tokens of it there were."""

    name: str
    rows_read: int
    rows_trained: int
    trained_tokens: int


@dataclass(frozen=True)
class CardFacts:
    """All that the card says.

    Attributes:
        title: the heading, e.g. the run's name.
        base_model: hub name or path; None for a model from random weights.
        is_adapter: whether the folder holds an adapter.
        path: how the folder is to be named in the examples.
        datasets: what was trained on.
        hyperparameters: the settings worth knowing, by config key; secrets do not belong here.
        metrics: final numbers by name, e.g. `eval_loss`.
        stop_tokens: the texts of the tokens that end a reply.
        chat: whether the model was trained through a chat template; false for plain text.
        summary: a sentence or two, e.g. tokens seen and time taken.
        versions: of the libraries, by name.
        license: an identifier for the front matter, where it is known.
    """

    title: str
    base_model: str | None
    is_adapter: bool
    path: str
    datasets: Sequence[CardDataset]
    hyperparameters: Mapping[str, Any]
    metrics: Mapping[str, float] = field(default_factory=dict)
    stop_tokens: Sequence[str] = ()
    chat: bool = True
    summary: str = ""
    versions: Mapping[str, str] = field(default_factory=dict)
    license: str | None = None


def _number(value: float | int) -> str:
    """Thousands separated in counts, four digits in measures."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return str(value)
    return f"{value:,}" if isinstance(value, int) else f"{value:.4g}"


def _cell(value: Any) -> str:
    """Text that cannot break out of a cell of a Markdown table."""
    return str(value).replace("|", "\\|").replace("\n", " ")


def _front_matter(facts: CardFacts) -> str:
    """The YAML block that the hub reads. A local path is no model id there and would be refused, so it is left out."""
    fields: dict[str, Any] = {
        "library_name": "peft" if facts.is_adapter else "transformers",
        "pipeline_tag": "text-generation",
        "tags": ["sft", *(["lora"] if facts.is_adapter else [])],
    }
    if facts.base_model and not Path(facts.base_model).exists() and facts.base_model.count("/") <= 1:
        fields["base_model"] = facts.base_model
    if facts.license:
        fields["license"] = facts.license
    return yaml.safe_dump(fields, sort_keys=True, allow_unicode=True)


def render_model_card(facts: CardFacts) -> str:
    """The card as Markdown with YAML front matter."""
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=False,  # Markdown, not HTML
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
        undefined=StrictUndefined,
    )
    environment.filters["number"] = _number
    environment.filters["cell"] = _cell
    return environment.get_template(TEMPLATE).render(facts=facts, front_matter=_front_matter(facts))


def write_model_card(output_dir: str | Path, facts: CardFacts) -> Path:
    """Write README.md into `output_dir`, over the one that peft leaves there; returns its path."""
    path = Path(output_dir) / "README.md"
    path.write_text(render_model_card(facts), encoding="utf-8")
    return path
