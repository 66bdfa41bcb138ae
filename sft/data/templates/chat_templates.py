"""Sets a tokenizer's chat template: the user's, the tokenizer's own, or one of the templates shipped in this folder."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sft.errors import Problem, UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

SHIPPED_DIR = Path(__file__).parent
DEFAULT = "plain"
# The control tokens that a shipped template writes; each must be a single token of the vocabulary.
CONTROL_TOKENS: Mapping[str, tuple[str, ...]] = {"chatml": ("<|im_start|>", "<|im_end|>")}


def shipped_names() -> list[str]:
    """Lists the names of the shipped templates."""
    return sorted(path.stem for path in SHIPPED_DIR.glob("*.jinja"))


def read_shipped(name: str) -> str:
    """Reads the text of a shipped template."""
    return (SHIPPED_DIR / f"{name}.jinja").read_text(encoding="utf-8")


def resolve(value: str) -> tuple[str, str]:
    """Returns the template that a `chat_template` setting names, and a description of its origin.

    The value is the name of a shipped template, a Jinja template itself, or else a file.

    Raises:
        UserError: the value is none of the three, or the file cannot be read.
    """
    if value in shipped_names():
        return read_shipped(value), f"the shipped `{value}` template"
    if "{{" in value or "{%" in value:
        return value, "the template written in the config"
    path = Path(value)
    hint = f"give a file, an inline Jinja template, or one of {', '.join(shipped_names())}"
    if not path.is_file():
        raise UserError(Problem(f"no such template file: {value!r}", hint, key="chat_template"))
    try:
        return path.read_text(encoding="utf-8"), f"the template in {path}"
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(Problem(f"cannot read {path}: {error}", hint, key="chat_template")) from error


def install(tokenizer: PreTrainedTokenizerFast, value: str | None) -> str:
    """Sets `tokenizer.chat_template` and returns a description of its origin.

    Args:
        value: the `chat_template` setting; None keeps the tokenizer's own template, or sets the shipped `plain` if it
            has none.

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
        text, name = read_shipped(DEFAULT), DEFAULT
        origin = f"the shipped `{DEFAULT}` template, because the tokenizer has none"
    if name == DEFAULT and not tokenizer.eos_token:
        message = f"the `{DEFAULT}` template ends each answer with the eos_token, and this tokenizer has none"
        hint = "name one: `special_tokens: {eos_token: '<|endoftext|>'}`"
        raise UserError(Problem(message, hint, key="special_tokens"))
    _require_control_tokens(tokenizer, name)
    tokenizer.chat_template = text
    _require_renders(tokenizer, origin)
    return origin


def _require_control_tokens(tokenizer: PreTrainedTokenizerFast, name: str) -> None:
    """Rejects a template whose control tokens the vocabulary would split: the model would learn loose characters."""
    tokens = CONTROL_TOKENS.get(name, ())
    missing = [token for token in tokens if len(tokenizer.encode(token, add_special_tokens=False)) != 1]
    if missing:
        message = f"the `{name}` template writes {', '.join(missing)}, which this vocabulary does not hold"
        hint = f"add them: `special_tokens: {missing}`; or use `chat_template: {DEFAULT}`, which needs no new token"
        raise UserError(Problem(message, hint, key="chat_template"))


def _require_renders(tokenizer: PreTrainedTokenizerFast, origin: str) -> None:
    """Renders one exchange, which reports a broken template before any data is read."""
    from jinja2 import TemplateError, TemplateSyntaxError, UndefinedError

    exchange = [{"role": "user", "content": "question"}, {"role": "assistant", "content": "answer"}]
    problem = ""
    try:
        if "answer" not in str(tokenizer.apply_chat_template(exchange, tokenize=False)):
            problem = "drops what the assistant says: nothing would be trained"
    except TemplateSyntaxError as error:
        problem = f"is not valid Jinja: {error.message} (its line {error.lineno})"
    except (UndefinedError, TypeError) as error:
        problem = f"fails on a plain exchange: {error}"
    except TemplateError as error:  # the template called raise_exception
        problem = f"refuses a plain exchange: {error}"
    if problem:
        raise UserError(Problem(f"{origin} {problem}", key="chat_template"))
