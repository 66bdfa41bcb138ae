"""What each tracker of `report_to` needs: its packages and environment variables."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from importlib.util import find_spec

from sft.config.schema import TrainingKeys
from sft.errors import Problem, UserError

MODULES: dict[str, tuple[str, ...]] = {
    "azure_ml": ("azureml.core",),
    "comet_ml": ("comet_ml",),
    "mlflow": ("mlflow",),
    "neptune": ("neptune",),
    "tensorboard": ("tensorboard",),
    "trackio": ("trackio",),
    "wandb": ("wandb",),
    "codecarbon": ("codecarbon",),
    "clearml": ("clearml",),
    "dagshub": ("dagshub", "mlflow"),
    "flyte": ("flytekit",),
    "dvclive": ("dvclive",),
    "swanlab": ("swanlab",),
    "kubeflow": (),
}
"""The modules that transformers' callback of each tracker imports."""
_PACKAGES = {"azureml.core": "azureml-core", "comet_ml": "comet-ml"}  # the others are named like their module
_ALTERNATIVES = {"tensorboard": "tensorboardX"}
_VARIABLES = {"kubeflow": "KUBEFLOW_TRAINER_SERVER_URL", "dagshub": "MLFLOW_TRACKING_URI"}


def require_trackers(keys: TrainingKeys) -> None:
    """Checks, before anything is loaded, that every tracker named in `report_to` can start.

    Raises:
        UserError: packages are not installed, or environment variables not set; all are listed.
    """
    if problems := list(_problems(keys)):
        raise UserError(*problems)


def _problems(keys: TrainingKeys) -> Iterator[Problem]:
    for name in [keys.report_to] if isinstance(keys.report_to, str) else keys.report_to:
        missing = [m for m in MODULES.get(name, ()) if not (_is_installed(m) or _is_installed(_ALTERNATIVES.get(m, m)))]
        if missing:
            packages = [_PACKAGES.get(module, module) for module in missing]
            hint = f"Install it: {sys.executable} -m pip install {' '.join(packages)}"
            yield keys.problem("report_to", f"{name} needs {' and '.join(packages)}, not installed here", hint)
        variable = _VARIABLES.get(name)
        if variable and variable not in os.environ:
            message = f"{name} needs the environment variable {variable}, which is not set"
            yield keys.problem("report_to", message, "Set it, or remove this tracker.")


def _is_installed(module: str) -> bool:
    """Returns whether a module can be imported; a folder without code, like the `wandb` of earlier runs, cannot."""
    try:
        spec = find_spec(module)
    except ModuleNotFoundError:  # its parent package is missing
        return False
    return spec is not None and spec.origin is not None
