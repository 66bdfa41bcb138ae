"""Builds the config of a randomly initialized model (`from_scratch`), for pretraining and for tests."""

from __future__ import annotations

import dataclasses
import difflib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from sft.errors import Problem, UserError

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedTokenizerFast

KEY = "from_scratch"


def _read_settings(value: Mapping[str, Any] | str) -> dict[str, Any]:
    """Returns the mapping itself, or the content of the JSON or YAML file that `value` names; checks `model_type`."""
    loaded: Any = value
    if isinstance(value, str):
        path = Path(value)
        try:
            text = path.read_text(encoding="utf-8")
            loaded = json.loads(text) if path.suffix == ".json" else yaml.safe_load(text)
        except OSError as error:
            raise UserError(Problem(f"cannot read {value!r}: {error.strerror}", key=KEY)) from error
        except (ValueError, yaml.YAMLError) as error:
            raise UserError(Problem(f"{value!r} is not valid: {error}", key=KEY)) from error
    if not isinstance(loaded, Mapping) or not isinstance(loaded.get("model_type"), str):
        hint = "For example `from_scratch: {model_type: llama, ...}`."
        raise UserError(Problem("needs a `model_type`", hint, key=KEY))
    return dict(loaded)


def _check_fields(config_class: type, settings: Mapping[str, Any]) -> None:
    """Checks that the config class has all settings: it would keep others as attributes that no layer reads."""
    known = {field.name for field in dataclasses.fields(config_class) if field.init}
    known |= set(getattr(config_class, "attribute_map", {}))
    # A saved model's config.json also holds these.
    known |= {"architectures", "transformers_version", "torch_dtype", "dtype", "model_type", "use_cache"}
    problems = []
    for name in sorted(settings.keys() - known):
        close = difflib.get_close_matches(name, known, n=1)
        hint = f"Did you mean `{close[0]}`?" if close else f"{config_class.__name__} has no such setting."
        problems.append(Problem(f"unknown setting {name!r}", hint, key=f"{KEY}.{name}"))
    if problems:
        raise UserError(*problems)


def check_settings(value: Mapping[str, Any] | str) -> tuple[str, dict[str, Any]]:
    """Returns the model type and its settings, of which the names are checked; `build_config` checks the values.

    Raises:
        UserError: an unreadable file, an unknown model type, or settings that its config class does not have.
    """
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    settings = _read_settings(value)
    model_type = settings.pop("model_type")
    if model_type not in CONFIG_MAPPING:
        close = difflib.get_close_matches(model_type, list(CONFIG_MAPPING.keys()), n=3)
        hint = f"Did you mean {' or '.join(close)}?" if close else "For example llama, qwen2, gpt2, mistral."
        raise UserError(Problem(f"no such model type: {model_type!r}", hint, key=f"{KEY}.model_type"))
    _check_fields(CONFIG_MAPPING[model_type], settings)
    return model_type, settings


def build_config(value: Mapping[str, Any] | str, tokenizer: PreTrainedTokenizerFast) -> PreTrainedConfig:
    """Builds the model config from the user's settings; vocabulary size and token ids default to the tokenizer's.

    Raises:
        UserError: an unknown model type or setting, a value that the config class refuses, or too small a vocabulary.
    """
    from transformers import AutoConfig

    model_type, settings = check_settings(value)
    settings.setdefault("vocab_size", len(tokenizer))
    for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
        settings.setdefault(name, getattr(tokenizer, name))
    if settings["vocab_size"] < len(tokenizer):
        message = f"vocab_size is {settings['vocab_size']}, and the tokenizer has {len(tokenizer)} tokens"
        hint = "Remove vocab_size: it is taken from the tokenizer."
        raise UserError(Problem(message, hint, key=f"{KEY}.vocab_size"))
    try:
        return AutoConfig.for_model(model_type, **settings)
    except Exception as error:  # each config class validates in its own way
        raise UserError(Problem(f"{model_type} refuses these settings: {error}", key=KEY)) from error
