"""The model card: its front matter parses, and its tables hold the given values."""

from __future__ import annotations

from pathlib import Path

import yaml

from sft.report.model_card import CardFacts, write_model_card


def facts(**changes: object) -> CardFacts:
    return CardFacts(
        **{
            "title": "run 7",
            "base_model": "owner/base",
            "is_adapter": True,
            "path": "outputs/run 7",
            "datasets": {"a|b.jsonl": {"rows_read": 1200, "rows_trained": 1180, "tokens": {"trained": 345678}}},
            "hyperparameters": {"learning_rate": 2e-5},
            "metrics": {"eval_loss": 0.53361},
            "stop_tokens": ["<|im_end|>", "</s>"],
            "versions": {"torch": "2.13.0"},
            **changes,
        }  # type: ignore[arg-type]
    )


def front_matter(text: str) -> dict:
    return yaml.safe_load(text.split("---\n")[1])


def test_the_card(tmp_path: Path) -> None:
    (tmp_path / "README.md").write_text("what peft wrote")
    text = write_model_card(tmp_path, facts()).read_text()
    assert front_matter(text) == {
        "base_model": "owner/base",
        "library_name": "peft",
        "pipeline_tag": "text-generation",
        "tags": ["sft", "lora"],
    }
    assert "| a\\|b.jsonl | 1,200 | 1,180 | 345,678 |" in text
    assert "| eval_loss | 0.5336 |" in text
    assert "| `learning_rate` | 2e-05 |" in text
    assert "Replies end with `<|im_end|>` or `</s>`" in text
    assert "sft_main.py merge" in text
    assert "what peft wrote" not in text
    assert "\n\n\n" not in text


def test_a_local_base_is_not_in_the_front_matter(tmp_path: Path) -> None:
    text = write_model_card(tmp_path, facts(base_model=str(tmp_path), is_adapter=False, chat=False)).read_text()
    assert "base_model" not in front_matter(text)
    assert front_matter(text)["library_name"] == "transformers"
    assert "apply_chat_template" not in text
    assert "sft_main.py merge" not in text


def test_from_scratch_has_no_base(tmp_path: Path) -> None:
    assert "from random weights" in write_model_card(tmp_path, facts(base_model=None, is_adapter=False)).read_text()
