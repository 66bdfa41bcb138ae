"""Where a tokenizer's chat template comes from: the user's, its own, or one that ships in `sft/chat_templates/`."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sft.errors import Problem, UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

SHIPPED_DIR = Path(__file__).parent
DEFAULT = "plain"
# The control tokens that a shipped template writes, and that must be single tokens for it to work.
CONTROL_TOKENS: Mapping[str, tuple[str, ...]] = {"chatml": ("<|im_start|>", "<|im_end|>")}


def shipped_names() -> list[str]:
    """The names that `chat_template` takes for a template of our own."""
    return sorted(path.stem for path in SHIPPED_DIR.glob("*.jinja"))


def shipped(name: str) -> str:
    """The text of a shipped template."""
    return (SHIPPED_DIR / f"{name}.jinja").read_text(encoding="utf-8")


def resolve(value: str) -> tuple[str, str]:
    """The text behind a `chat_template` setting, and in words where it came from.

    A shipped name is tried first, then a file of that name, then the value itself if it is Jinja.

    Raises:
        UserError: the value is none of the three, or the file is unreadable.
    """
    if value in shipped_names():
        return shipped(value), f"the shipped `{value}` template"
    if "{{" in value or "{%" in value:
        return value, "the template written in the config"
    path = Path(value)
    hint = f"Give a file, a Jinja template written inline, or one of {', '.join(shipped_names())}."
    if not path.is_file():
        raise UserError(Problem(f"no such template file: {value!r}", hint, key="chat_template"))
    try:
        return path.read_text(encoding="utf-8"), f"the template in {path}"
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(Problem(f"cannot read {path}: {error}", hint, key="chat_template")) from error


def _require_control_tokens(tokenizer: PreTrainedTokenizerFast, name: str) -> None:
    """A template whose control tokens are cut into pieces would train the model on loose characters."""
    missing = [
        token for token in CONTROL_TOKENS.get(name, ()) if len(tokenizer.encode(token, add_special_tokens=False)) != 1
    ]
    if missing:
        raise UserError(
            Problem(
                f"the `{name}` template writes {', '.join(missing)}, which this vocabulary does not hold",
                f"Add them: `special_tokens: [{', '.join(repr(token) for token in missing)}]`; or use "
                f"`chat_template: {DEFAULT}`, which needs no new token.",
                key="chat_template",
            )
        )


def _probe(tokenizer: PreTrainedTokenizerFast, origin: str) -> None:
    """Render one exchange, so that a broken template is named before any data is read."""
    from jinja2 import TemplateError, TemplateSyntaxError, UndefinedError

    exchange = [{"role": "user", "content": "question"}, {"role": "assistant", "content": "answer"}]
    try:
        rendered = tokenizer.apply_chat_template(exchange, tokenize=False)
    except TemplateSyntaxError as error:
        raise UserError(
            Problem(f"{origin} is not valid Jinja: {error.message} (its line {error.lineno})", key="chat_template")
        ) from error
    except (UndefinedError, TypeError) as error:
        raise UserError(Problem(f"{origin} fails on a plain exchange: {error}", key="chat_template")) from error
    except TemplateError as error:
        # What the template itself refuses through raise_exception.
        raise UserError(Problem(f"{origin} refuses a plain exchange: {error}", key="chat_template")) from error
    if "answer" not in str(rendered):
        raise UserError(
            Problem(f"{origin} drops what the assistant says: nothing would be trained", key="chat_template")
        )


def install(tokenizer: PreTrainedTokenizerFast, value: str | None) -> str:
    """Set `tokenizer.chat_template` and return in words which one it is.

    Args:
        value: the `chat_template` setting; without one the tokenizer's own template stays, and a tokenizer that has
            none gets the shipped `plain`.

    Raises:
        UserError: the template is missing, is not Jinja, or needs tokens that the vocabulary lacks.
    """
    current: Any = tokenizer.chat_template
    if value is not None:
        text, origin = resolve(value)
        name = value if value in shipped_names() else ""
    elif current:
        return "the tokenizer's own template"
    else:
        text, name = shipped(DEFAULT), DEFAULT
        origin = f"the shipped `{DEFAULT}` template, because the tokenizer has none"
    if name == DEFAULT and not tokenizer.eos_token:
        raise UserError(
            Problem(
                f"the `{DEFAULT}` template ends each answer with the eos_token, and this tokenizer has none",
                "Name one: `special_tokens: {eos_token: '<|endoftext|>'}`.",
                key="special_tokens",
            )
        )
    _require_control_tokens(tokenizer, name)
    tokenizer.chat_template = text
    _probe(tokenizer, origin)
    return origin
