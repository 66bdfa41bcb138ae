"""Resolves the folder or hub name in a model or tokenizer setting, and checks what the folder holds."""

from __future__ import annotations

import difflib
from pathlib import Path

from safetensors import SafetensorError

from sft.errors import Problem, UserError, first_line

ADAPTER_CONFIG = "adapter_config.json"
MODEL_CONFIG = "config.json"
# What transformers raises for files that are missing, damaged, or of another model.
LOAD_ERRORS = (OSError, ValueError, KeyError, TypeError, ImportError, SafetensorError)


def is_adapter(folder: Path) -> bool:
    """Returns whether `folder` holds a PEFT adapter and not a whole model."""
    return (folder / ADAPTER_CONFIG).is_file()


def is_model(folder: Path) -> bool:
    """Returns whether `folder` holds a whole model."""
    return (folder / MODEL_CONFIG).is_file() and not is_adapter(folder)


def _must_be_path(name: str) -> bool:
    """Returns whether `name` can only be a path: a hub name is `name` or `owner/name`, and nothing else."""
    if name.startswith((".", "/", "~")) or "\\" in name or name.count("/") > 1 or name.endswith("/"):
        return True
    owner, slash, _ = name.partition("/")
    return bool(slash) and Path(owner).is_dir()


def _suggest_path(path: Path) -> str:
    """Returns a hint for a path that does not exist: its nearest existing folder, or a similar name there."""
    parent = path
    while not parent.exists() and parent != parent.parent:
        missing, parent = parent.name, parent.parent
    if not parent.is_dir():
        return f"{parent} is a file."
    close = difflib.get_close_matches(missing, [entry.name for entry in parent.iterdir()], n=1, cutoff=0.5)
    return f"Did you mean {parent / close[0]}?" if close else f"The nearest folder that exists is {parent}."


def _describe_content(folder: Path) -> str:
    """Returns a hint for a folder that is no model: the models in it, or else its first entries."""
    names = sorted(entry.name for entry in folder.iterdir())
    inside = [name for name in names if is_model(folder / name) or is_adapter(folder / name)]
    if inside:
        return f"These folders in it hold one: {', '.join(inside)}."
    shown = ", ".join(names[:8]) + (", ..." if len(names) > 8 else "")
    return f"It holds {shown}." if names else "It is empty."


def resolve_reference(name: str, key: str) -> str:
    """Returns the absolute path of a folder that exists, or `name` unchanged if it is a name on the hub.

    Raises:
        UserError: `name` is a path that does not exist, or a file.
    """
    path = Path(name).expanduser()
    if path.is_dir():
        return str(path.resolve())
    if path.exists():
        raise UserError(Problem(f"{name!r} is a file", "Name the folder that holds it.", key=key))
    if _must_be_path(name):
        raise UserError(Problem(f"no such folder: {name!r}", _suggest_path(path.absolute()), key=key))
    return name


def require_model(reference: str, key: str) -> None:
    """Checks that a local folder holds a whole model.

    Raises:
        UserError: it holds an adapter, or no model; names what it does hold.
    """
    folder = Path(reference)
    if not folder.is_dir() or is_model(folder):
        return
    if is_adapter(folder):
        merge = f"sft_main.py merge --model {reference} --output_dir DIR"
        hint = f"Name its base model here, or merge it into a whole model first: {merge}."
        raise UserError(Problem(f"{reference!r} holds an adapter, not a whole model", hint, key=key))
    raise UserError(Problem(f"{reference!r} holds no {MODEL_CONFIG}: not a model", _describe_content(folder), key=key))


def require_weights(reference: str, key: str) -> None:
    """Checks that a local folder holds files of weights.

    Raises:
        UserError: it has none in a format that can be loaded.
    """
    folder = Path(reference)
    if folder.is_dir() and not any(any(folder.glob(pattern)) for pattern in ("*.safetensors", "*.bin")):
        raise UserError(Problem(f"{reference!r} holds no weights (*.safetensors)", _describe_content(folder), key=key))


def require_trained(folder: Path) -> None:
    """Checks that the folder named by `--model` holds a trained model or an adapter.

    Raises:
        UserError: there is no such folder, or it holds neither.
    """
    if not folder.is_dir():
        raise UserError(Problem(f"no such folder: {str(folder)!r}", _suggest_path(folder.absolute()), key="--model"))
    if not is_model(folder) and not is_adapter(folder):
        message = f"{str(folder)!r} holds neither a model nor an adapter"
        raise UserError(Problem(message, _describe_content(folder), key="--model"))


def load_failure(reference: str, error: Exception, key: str, what: str) -> UserError:
    """Returns a loader's error as a UserError that names what could not be loaded."""
    if Path(reference).is_dir():
        return UserError(Problem(f"cannot read the {what} in {reference!r}: {first_line(error)}", key=key))
    hint = (
        "Check the name, the network, and that you are logged in if the model is gated; without a network give the "
        "path of a local folder."
    )
    return UserError(Problem(f"cannot get the {what} {reference!r} from the hub: {first_line(error)}", hint, key=key))
